"""How long an answer is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cards_integrations.rewards.base import Instant, Loader, Response, Reward, RewardModel
from cards_integrations.rewards.registry import register_reward


@register_reward
class LengthReward(Reward):
    """-|length - target| / target of a finished answer, in words or characters.

    An unfinished answer can still grow, so it loses only what it is too long by.
    """

    kind: Literal["length"] = "length"
    """Names this class in settings files."""
    target: Annotated[int, Field(ge=1)]
    """The length to be reached, in units."""
    unit: Literal["words", "characters"] = "words"
    """Words are separated by whitespace."""

    @property
    def name(self) -> str:
        return f"length {self.target} {self.unit}"

    def build(self, loader: Loader) -> RewardModel:
        return Instant(self.name, self._score)

    def _score(self, response: Response) -> float:
        length = len(response.text.split()) if self.unit == "words" else len(response.text)
        excess = (length - self.target) / self.target
        return -abs(excess) if response.finished else min(0.0, -excess)
