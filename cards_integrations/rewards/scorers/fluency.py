"""Repetition and log p as one score, 0 where there is nothing to object to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cards_integrations.rewards.base import Response
from cards_integrations.rewards.scorers.composite import Composite
from cards_integrations.rewards.scorers.likelihood import Likelihood
from cards_integrations.rewards.scorers.repetition import per_length


class Fluency(Composite):
    """-repetition - max(0, least log p - mean log p), in nats per token.

    Args:
        name: What errors call the reward.
        own: Gives log p under the language model that drafts.
        repetition: Gives the share of repeated n-grams.
        least_log_p: The least mean log p that costs nothing.
    """

    owns_parts = True

    def __init__(self, name: str, own: Likelihood, repetition: Callable[[Response], float], least_log_p: float) -> None:
        super().__init__(name, [own])
        self.own = own
        self.repetition = repetition
        self.least_log_p = least_log_p

    async def score(self, responses: Sequence[Response]) -> list[float]:
        [log_p] = await self.score_parts(responses)
        return [-self.repetition(r) - self._shortfall(r, own) for r, own in zip(responses, log_p, strict=True)]

    def _shortfall(self, response: Response, log_p: float) -> float:
        """Return by how many nats the mean log p falls short, per length."""
        tokens = len(self.own.answer_ids(response))
        return per_length(max(0.0, self.least_log_p * tokens - log_p), tokens)
