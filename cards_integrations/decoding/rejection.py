"""Rejection sampling of whole answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cards_integrations.decoding.acceptance import Acceptance
from cards_integrations.decoding.base import Draft, Session
from cards_integrations.decoding.registry import register_method
from cards_integrations.decoding.scaled import OnScale
from cards_integrations.decoding.segmentation import FixedLength


@register_method
class RejectionSampling(OnScale):
    """Answers from p(y | x) until one is accepted, with probability min(1, exp((r(x, y) - r*) / beta)).

    With r* no less than any reward this samples p(y | x) exp(r / beta) exactly: the algorithm that CARDS
    applies to segments (arXiv 2406.16306, section 3.1; Statistical Rejection Sampling, arXiv 2309.06657).
    After `max_rejections` rejected answers one more is drawn and the best of them all is kept.
    """

    method: Literal["rejection"] = "rejection"
    max_rejections: Annotated[int, Field(ge=0)] = 63

    async def generate(self, session: Session) -> None:
        target, beta = self.on_scale_of(session)
        accepts = Acceptance(self.acceptance, beta)

        def passes(draft: Draft) -> bool:
            return draft.index < self.max_rejections and accepts(draft.reward, target, draft.uniform)

        whole = FixedLength(length=session.max_tokens)
        async for draft in session.drafts(until=whole, limit=self.max_rejections + 1, passes=passes):
            draft.threshold = target
            if passes(draft):
                draft.verdict = "accepted"
                await session.keep(draft)
                break
            session.reject(draft)
        else:
            await session.keep_best()
