"""Rejection sampling of whole answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cards_integrations.decoding.acceptance import Acceptance
from cards_integrations.decoding.base import Draft, Session
from cards_integrations.decoding.registry import register_method
from cards_integrations.decoding.segmentation import FixedLength
from cards_integrations.decoding.targets import RewardTargeted


@register_method
class RejectionSampling(RewardTargeted):
    """Answers from p(y | x) until one is accepted, with probability min(1, exp((r(x, y) - r*) / beta)).

    With r* no less than any reward this samples p(y | x) exp(r / beta) exactly: the algorithm that CARDS
    applies to segments (arXiv 2406.16306, section 3.1; Statistical Rejection Sampling, arXiv 2309.06657).
    """

    method: Literal["rejection"] = "rejection"
    """Names this method in settings files."""
    max_rejections: Annotated[int, Field(ge=0)] = 63
    """After so many rejected answers one more is drawn, and the best of them all is kept."""

    async def generate(self, session: Session) -> None:
        target, beta = self.target_and_beta(session)
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
