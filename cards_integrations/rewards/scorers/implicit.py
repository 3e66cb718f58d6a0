"""The reward that a tuned model implies over its base: the difference of their log p."""

from __future__ import annotations

from collections.abc import Sequence

from cards_integrations.rewards.base import Response
from cards_integrations.rewards.scorers.composite import Composite
from cards_integrations.rewards.scorers.likelihood import Likelihood


class Implicit(Composite):
    """Scores by the difference of its two parts' log p."""

    owns_parts = True

    def __init__(self, name: str, models: Sequence[Likelihood], beta: float) -> None:
        super().__init__(name, models)
        self.beta = beta

    async def score(self, responses: Sequence[Response]) -> list[float]:
        tuned, base = await self.score_parts(responses)
        return [self.beta * (more - less) for more, less in zip(tuned, base, strict=True)]
