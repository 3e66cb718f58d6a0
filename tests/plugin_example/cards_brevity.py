"""A reward that another distribution brings: all that it needs is a kind and `score`."""

from __future__ import annotations

from typing import Literal

from cards_integrations.rewards import Reward


class BrevityReward(Reward):
    """Minus the number of words, times `weight`."""

    kind: Literal["brevity"] = "brevity"
    weight: float = 1.0

    def score(self, prompt: str, responses: list[str]) -> list[float]:
        return [-self.weight * len(response.split()) for response in responses]
