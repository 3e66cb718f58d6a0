"""A reward that another package brings: all that it needs is a kind and `score`."""

from typing import Literal

from cards_integrations.rewards import Reward


class BrevityReward(Reward):
    """Minus the number of words by which an answer misses `words`."""

    kind: Literal["brevity"] = "brevity"
    words: int = 10

    def score(self, prompt: str, responses: list[str]) -> list[float]:
        return [-abs(len(response.split()) - self.words) for response in responses]
