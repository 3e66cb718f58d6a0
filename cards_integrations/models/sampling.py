"""From logits to a token: temperature, top-k, and one uniform by inverse transform."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch

BLOCK = 128


class Sampler(BaseModel):
    """softmax(logits / temperature) restricted to the `top_k` most probable tokens.

    `temperature=0` takes the most probable token; `top_k=0` restricts nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.7
    top_k: Annotated[int, Field(ge=0)] = 40

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def __call__(self, logits: torch.Tensor, rows: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        """One token for each uniform: logits (n, vocabulary), rows and uniforms (m,) -> ids (m,).

        The i-th token is drawn from logits[rows[i]] by uniforms[i] in [0, 1). The tokens are laid on
        [0, 1) in order of their id, so that two almost equal logits that change places under
        another batch shape do not change the outcome.
        """
        if self.greedy:
            return logits.argmax(-1)[rows]
        ids = None
        if 0 < self.top_k < logits.shape[-1]:
            ids = _largest(logits, self.top_k).sort(-1).values
            logits = logits.gather(-1, ids)
        upto = (logits.double() / self.temperature).softmax(-1).cumsum(-1)[rows]
        at = (upto <= (uniforms * upto[:, -1]).unsqueeze(-1)).sum(-1).clamp(max=logits.shape[-1] - 1)
        return at if ids is None else ids[rows, at]


def _largest(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Ids of the k largest logits, (n, vocabulary) -> (n, k).

    They lie in the k blocks with the largest maxima, and a search among those is several times
    faster than one of the whole vocabulary.
    """
    blocks, rest = divmod(logits.shape[-1], BLOCK)
    if rest or blocks <= k:
        return logits.topk(k).indices
    blocked = logits.view(-1, blocks, BLOCK)
    best = blocked.amax(-1).topk(k).indices
    found = blocked.gather(1, best.unsqueeze(-1).expand(-1, -1, BLOCK)).flatten(1).topk(k).indices
    ids: torch.Tensor = best.gather(1, found // BLOCK) * BLOCK + found % BLOCK
    return ids
