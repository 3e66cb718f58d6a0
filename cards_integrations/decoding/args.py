"""ARGS: token-level reward-guided search."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from cards_integrations.decoding.base import Decoding, Draft, Session
from cards_integrations.decoding.registry import register_method
from cards_integrations.decoding.resampling import weighted_choice
from cards_integrations.decoding.segmentation import FixedLength

TOKEN = FixedLength(length=1)


@register_method
class Args(Decoding):
    """Alignment as Reward-Guided Search (arXiv 2402.01694, algorithm 1).

    Each of the k most probable tokens v has the score log p(v | x, y) + weight * r(x, y + v). The token with the
    highest score is kept (ARGS-greedy), or one that is drawn from softmax(scores / temperature) (ARGS-stochastic).
    The authors use k = 10 and a weight of 1.5, for rewards of their model.
    """

    method: Literal["args"] = "args"
    """Names this method in settings files."""
    k: Annotated[int, Field(ge=1)] = 10
    """How many tokens are scored at each position: the most probable ones."""
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.5
    """Nats that a unit of reward is worth."""
    stochastic: bool = False
    """Draw the token by its score, instead of taking the one with the highest score."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.7
    """Temperature of the softmax over the scores; only used if `stochastic`."""

    async def generate(self, session: Session) -> None:
        while not session.finished:
            grown = await session.grow([None] * self.k, until=TOKEN, ranks=range(self.k))
            drafts = list({draft.rank: draft for draft in grown}.values())  # fewer than k tokens may be allowed
            scores = [draft.log_p + self.weight * draft.reward for draft in drafts]
            chosen = self._drawn(drafts, scores) if self.stochastic else drafts[scores.index(max(scores))]
            chosen.verdict = "accepted"
            await session.keep(chosen)

    def _drawn(self, drafts: list[Draft], scores: list[float]) -> Draft:
        weights = [math.exp((score - max(scores)) / self.temperature) for score in scores]
        return weighted_choice(drafts, weights, drafts[0].uniform)
