"""From logits to a token: temperature, top-k, and inverse transform sampling with one uniform."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch

BLOCK = 128  # logits that are searched together


class Sampler(BaseModel):
    """Samples from softmax(logits / temperature), restricted to the `top_k` most probable tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.7
    """Divides the logits; 0 takes the most probable token."""

    top_k: Annotated[int, Field(ge=0)] = 40
    """How many of the most probable tokens may be drawn; 0 for all."""

    @property
    def greedy(self) -> bool:
        """True if the most probable token is taken."""
        return self.temperature == 0

    def __call__(self, logits: torch.Tensor, rows: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        """Draw one token for each uniform.

        Token i is drawn from logits[rows[i]] with uniforms[i]: it is the first one at which the cumulative
        probability, in order of token ids, exceeds the uniform. The order is that of the ids and not of the
        probabilities, so that two almost equal logits that change places under another batch shape do not
        change the outcome.

        Args:
            logits: (n, vocabulary).
            rows: (m,) indices into the logits.
            uniforms: (m,) in [0, 1).

        Returns:
            Token ids (m,).
        """
        if self.greedy:
            return logits.argmax(-1)[rows]
        ids = None
        if 0 < self.top_k < logits.shape[-1]:
            ids = _largest(logits, self.top_k).sort(-1).values
            logits = logits.gather(-1, ids)
        cumulative = (logits.double() / self.temperature).softmax(-1).cumsum(-1)[rows]
        drawn = (cumulative <= (uniforms * cumulative[:, -1]).unsqueeze(-1)).sum(-1).clamp(max=logits.shape[-1] - 1)
        return drawn if ids is None else ids[rows, drawn]


def _largest(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Ids of the k largest logits, (n, vocabulary) -> (n, k).

    They are in the k blocks with the largest maxima, and searching those is several times faster than
    searching the whole vocabulary.
    """
    blocks, rest = divmod(logits.shape[-1], BLOCK)
    if rest or blocks <= k:
        return logits.topk(k).indices
    blocked = logits.view(-1, blocks, BLOCK)
    best = blocked.amax(-1).topk(k).indices
    found = blocked.gather(1, best.unsqueeze(-1).expand(-1, -1, BLOCK)).flatten(1).topk(k).indices
    ids: torch.Tensor = best.gather(1, found // BLOCK) * BLOCK + found % BLOCK
    return ids
