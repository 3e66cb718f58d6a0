"""Optimal stopping with recall: draft while one more draft is worth its tokens, then keep the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from cards_integrations.decoding.base import Draft, Scale, Session
from cards_integrations.models.base import Boundary
from cards_integrations.settings_model import SettingsModel


class OptimalStopping(SettingsModel):
    """A search rule that needs no target, only the price of a token in units of the reward.

    The next `batch` drafts are worth E[max(M - best, 0)], with M the highest of their rewards, and cost
    price * batch * length. Drafting stops when the best so far has reached the reservation value xi,
    where both are equal (Weitzman 1979), and the best is kept. The rewards of a segment's drafts are assumed to be
    normal: the mean is that of the drafts and of the kept prefix's reward, the standard deviation is pooled
    over all segments so far.

    This does not sample from the reward-tilted distribution that quasi-rejection approximates.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    price: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """The reward that a drafted token has to bring."""
    unit: Literal["reward", "std"] = "reward"
    """What the price is in: "reward", or "std", standard deviations of the rewards of plain answers, so that one price
    serves every reward."""
    batch: Annotated[int, Field(ge=1)] = 1
    """Drafts between two decisions; more than 1 pays off where several drafts cost about as much as one."""

    def in_rewards(self, scale: Scale | None) -> OptimalStopping:
        """Return the rule with its price in units of the reward, given the scale of the reward."""
        if self.unit == "reward":
            return self
        std = 1.0 if scale is None or not scale.std else scale.std
        return OptimalStopping(price=self.price * std, batch=self.batch)

    async def generate(self, session: Session, boundary: Boundary, limit: int) -> None:
        """Draft and keep until `session.finished`.

        Args:
            session: The request.
            boundary: Where a segment ends.
            limit: The most drafts of a segment.
        """
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
                value = self.reservation(mean, pooled_std(segments), tokens / len(rewards))
                draft.threshold = value if math.isfinite(value) else None
                if len(rewards) % self.batch == 0 and reaches(best):
                    best.verdict = "accepted"
                    await session.keep(best)
                    break
            else:
                best = await session.keep_best()
            reward, written = best.reward, best.end

    def reservation(self, mean: float, std: float | None, length: float) -> float:
        """Return the reservation value xi, with E[max(M - xi, 0)] = price * batch * length.

        Args:
            mean: Mean reward of a draft.
            std: Its standard deviation; None if it is not known.
            length: Mean length of a draft in tokens.

        Returns:
            xi in units of the reward; infinite if `std` is not known.
        """
        if not std:
            return math.inf if std is None else mean
        cost = self.price * self.batch * length / std
        return mean + std * _excess_quantile(cost, self.batch)


def pooled_std(segments: Sequence[Sequence[float]]) -> float | None:
    """Return the standard deviation within segments, over all of them; None while none has two drafts."""
    freedom = sum(len(rewards) - 1 for rewards in segments)
    squares = sum(float(np.var(rewards)) * len(rewards) for rewards in segments)
    return math.sqrt(squares / freedom) if freedom else None


def _excess_quantile(cost: float, k: int) -> float:
    """z with E[max(M - z, 0)] = cost, for M the highest of k standard normals."""
    z, excess = _expected_excess(k)
    if cost >= excess[0]:
        return float(z[0] - (cost - excess[0]))  # z is so low that M is above it for certain
    return float(np.interp(-cost, -excess, z))


@lru_cache
def _expected_excess(k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Many z, and E[max(M - z, 0)] at each: the integral of P(M > x) from z on."""
    z = np.linspace(-8, 8, 4001)
    above = 1 - np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in z]) ** k
    steps = (above[1:] + above[:-1]) / 2 * np.diff(z)
    return z, np.append(np.flip(np.cumsum(np.flip(steps))), 0.0)
