"""Speculative rejection: many answers at once, the least promising of which are given up on the way."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cards_integrations.decoding.base import Decoding, Draft, Session
from cards_integrations.decoding.registry import register_method
from cards_integrations.decoding.segmentation import FixedLength


@register_method
class SpeculativeRejection(Decoding):
    """Speculative Rejection (arXiv 2410.20290, algorithm 1).

    n answers are drafted together. At every checkpoint the unfinished ones are scored, and the worst fraction of all
    is given up. The best that is left is kept.

    The authors start with as many answers as fit into memory, and set a checkpoint where it is full
    (`fraction` 0.5); here both are settings, so that a result does not depend on the machine.
    """

    method: Literal["speculative_rejection"] = "speculative_rejection"
    """Names this method in settings files."""
    n: Annotated[int, Field(ge=1)] = 16
    """Answers to begin with."""
    checkpoint: Annotated[int, Field(ge=1)] = 16
    """Tokens from one checkpoint to the next."""
    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the answers that a checkpoint gives up (the paper's alpha); one answer stays at least."""

    async def generate(self, session: Session) -> None:
        alive: list[Draft | None] = [None] * self.n
        finished: list[Draft] = []
        until = FixedLength(length=self.checkpoint)
        while alive:
            drafts = await session.grow(alive, until=until)
            ranked = sorted([*finished, *drafts], key=lambda draft: -draft.reward)
            lost = ranked[max(1, round(len(ranked) * (1 - self.fraction))) :]
            for draft in lost:
                session.give_up(draft)
            finished = [draft for draft in ranked if draft not in lost and draft.finished]
            alive = [draft for draft in drafts if draft not in lost and not draft.finished]
        best = max(finished, key=lambda draft: draft.reward)
        best.verdict = "best"
        await session.keep(best)
