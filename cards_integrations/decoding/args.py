"""ARGS: token-level reward-guided search."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from cards_integrations.decoding.base import Decoding, Draft, Session
from cards_integrations.decoding.registry import register_method
from cards_integrations.decoding.segmentation import FixedLength

TOKEN = FixedLength(length=1)


@register_method
class Args(Decoding):
    """Alignment as Reward-Guided Search (arXiv 2402.01694, algorithm 1): each of the k most probable tokens v
    is scored as log p(v | x, y) + weight * r(x, y + v).

    Greedy (`stochastic=False`) takes the highest score, otherwise the token is drawn from
    softmax(scores / temperature). The authors use k = 10 and a weight of 1.5, for rewards of their model.
    """

    method: Literal["args"] = "args"
    k: Annotated[int, Field(ge=1)] = 10
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.5
    stochastic: bool = False
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.7

    async def generate(self, session: Session) -> None:
        while not session.finished:
            grown = await session.grow([None] * self.k, until=TOKEN, ranks=range(self.k))
            drafts = list({draft.rank: draft for draft in grown}.values())  # fewer than k tokens may be allowed
            scores = [draft.log_p + self.weight * draft.reward for draft in drafts]
            chosen = self._drawn(drafts, scores) if self.stochastic else drafts[scores.index(max(scores))]
            chosen.verdict = "accepted"
            await session.keep(chosen)

    def _drawn(self, drafts: list[Draft], scores: list[float]) -> Draft:
        highest = max(scores)
        return drawn(drafts, [math.exp((score - highest) / self.temperature) for score in scores], drafts[0].uniform)


def drawn(drafts: list[Draft], weights: list[float], uniform: float) -> Draft:
    """One of the drafts with a probability that is proportional to its weight, by one uniform in [0, 1)."""
    at = uniform * sum(weights)
    for draft, weight in zip(drafts, weights, strict=True):
        at -= weight
        if at < 0:
            return draft
    return drafts[-1]
