"""How long an answer is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cards_integrations.rewards.base import Instant, Loader, Response, Reward, RewardModel
from cards_integrations.rewards.registry import register_reward


@register_reward
class LengthReward(Reward):
    """-|length - target| / target of a finished answer, in words or characters.

    An unfinished answer can still grow, and so is only penalised for being too long.
    """

    kind: Literal["length"] = "length"
    """Names this class in settings files."""
    target: Annotated[int, Field(ge=1)]
    """The length that an answer should have, in units."""
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
