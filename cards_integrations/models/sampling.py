"""From logits to a token: temperature, top-k, and one uniform by inverse transform."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch


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

    def __call__(self, logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        """One token for each row: logits (n, vocabulary), uniforms (n,) in [0, 1) -> ids (n,).

        The tokens are laid on [0, 1) in order of their id, so that two almost equal logits that
        change places under another batch shape do not change the outcome.
        """
        if self.greedy:
            return logits.argmax(-1)
        ids = None
        if 0 < self.top_k < logits.shape[-1]:
            ids = logits.topk(self.top_k).indices.sort(-1).values
            logits = logits.gather(-1, ids)
        upto = (logits.double() / self.temperature).softmax(-1).cumsum(-1)
        at = (upto <= (uniforms * upto[:, -1]).unsqueeze(-1)).sum(-1)
        at = at.clamp(max=logits.shape[-1] - 1)
        return at if ids is None else ids.gather(-1, at.unsqueeze(-1)).squeeze(-1)
