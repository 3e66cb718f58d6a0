"""Optimal stopping with recall: draft while one more draft is worth its tokens, then keep the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cards_integrations.decoding.base import Draft, Session
from cards_integrations.models.base import Boundary


class OptimalStopping(BaseModel):
    """A search rule for a segment that needs no target: `price` is the reward that a token has to bring.

    The next `batch` drafts are worth E[max(M - best, 0)] with M the highest of their rewards, and cost
    price * batch * length. Drafting stops when the best so far has reached the reservation value xi,
    where both are equal (Weitzman 1979), and the best is kept. Rewards of a segment's drafts are taken
    for normal: the mean is that of the drafts and of the kept prefix's reward, the spread is pooled
    over all segments so far.

    This does not sample from the reward-tilted law that quasi-rejection approximates. Use `batch` > 1
    where several drafts cost about as much as one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    price: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    batch: Annotated[int, Field(ge=1)] = 1

    async def generate(self, session: Session, boundary: Boundary, limit: int) -> None:
        """Draft and keep until `session.finished`; at most `limit` drafts for a segment."""
        reward, written = await session.prompt_reward(), 0
        segments: list[list[float]] = []
        while not session.finished:
            rewards: list[float] = []
            segments.append(rewards)
            tokens, value = 0, math.inf

            def reaches(draft: Draft) -> bool:
                return draft.reward >= value  # noqa: B023 - asked during this segment only

            async for draft in session.drafts(until=boundary, limit=limit, passes=reaches):
                rewards.append(draft.reward)
                tokens += draft.end - written
                best = session.reject(draft)
                mean = (reward + sum(rewards)) / (1 + len(rewards))
                value = self.reservation(mean, pooled_spread(segments), tokens / len(rewards))
                draft.threshold = value if math.isfinite(value) else None
                if len(rewards) % self.batch == 0 and reaches(best):
                    best.verdict = "accepted"
                    await session.keep(best)
                    break
            else:
                best = await session.keep_best()
            reward, written = best.reward, best.end

    def reservation(self, mean: float, std: float | None, length: float) -> float:
        """xi with E[max(M - xi, 0)] = price * batch * length; infinite as long as no std is known."""
        if not std:
            return math.inf if std is None else mean
        cost = self.price * self.batch * length / std
        return mean + std * _excess_quantile(cost, self.batch)


def pooled_spread(segments: Sequence[Sequence[float]]) -> float | None:
    """The standard deviation within segments, over all of them; None while none has two drafts."""
    freedom = sum(len(rewards) - 1 for rewards in segments)
    squares = sum(float(np.var(rewards)) * len(rewards) for rewards in segments)
    return math.sqrt(squares / freedom) if freedom else None


def _excess_quantile(cost: float, k: int) -> float:
    """z with E[max(M - z, 0)] = cost, for M the highest of k standard normals."""
    z, excess = _excess(k)
    if cost >= excess[0]:
        return float(z[0] - (cost - excess[0]))  # so far below that M is certainly above
    return float(np.interp(-cost, -excess, z))


@lru_cache
def _excess(k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """E[max(M - z, 0)], the integral of P(M > x) from z on, at many z."""
    z = np.linspace(-8, 8, 4001)
    above = 1 - np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in z]) ** k
    steps = (above[1:] + above[:-1]) / 2 * np.diff(z)
    return z, np.append(np.flip(np.cumsum(np.flip(steps))), 0.0)
