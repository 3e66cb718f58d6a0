"""Predictive uncertainty; torch alone, for the plug-in of a server that has nothing else of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Measure = Literal["entropy", "max_probability", "evidential"]


def uncertainty(measure: Measure, logits: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Predictive uncertainty from raw logits and their log-softmax (n, vocabulary) -> (n,); section 3.2 of the paper.

    `entropy` is Shannon entropy in nats, `max_probability` is 1 - max p, `evidential` is
    V / sum(relu(logit) + 1). Full vocabulary, no temperature, no top-k.
    """
    import torch

    if measure == "entropy":
        entropy: torch.Tensor = -torch.linalg.vecdot(log_p.exp(), log_p)
        return entropy
    if measure == "max_probability":
        return 1 - log_p.amax(-1).exp()
    return logits.shape[-1] / (logits.float().relu() + 1).sum(-1)
