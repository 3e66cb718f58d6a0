"""Predictive uncertainty. It needs only torch: a vLLM server imports it, and nothing else of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Measure = Literal["entropy", "max_probability", "evidential"]


def uncertainty(measure: Measure, logits: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Return the predictive uncertainty of the next token (section 3.2 of arXiv 2406.16306).

    It is over the full vocabulary, with no temperature and no top-k.

    Args:
        measure: "entropy" is Shannon entropy -sum(p log p) in nats, "max_probability" is 1 - max(p), and
            "evidential" is V / sum(relu(logit) + 1), with V the size of the vocabulary.
        logits: Raw logits (n, vocabulary).
        log_p: Their log-softmax (n, vocabulary).

    Returns:
        (n,).
    """
    import torch

    if measure == "entropy":
        entropy: torch.Tensor = -torch.linalg.vecdot(log_p.exp(), log_p)
        return entropy
    if measure == "max_probability":
        return 1 - log_p.amax(-1).exp()
    return logits.shape[-1] / (logits.float().relu() + 1).sum(-1)
