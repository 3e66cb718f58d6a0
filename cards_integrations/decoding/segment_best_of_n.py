"""Best-of-n for each segment: blockwise selection, without a target."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cards_integrations.decoding.base import Decoding, Session
from cards_integrations.decoding.registry import register_method
from cards_integrations.decoding.segmentation import AnyBoundary, Uncertainty


@register_method
class SegmentBestOfN(Decoding):
    """n drafts for each segment; the one with the highest reward is kept.

    With fixed lengths it is the blockwise best-of-K of Controlled Decoding (arXiv 2310.17022, section 3.2).
    """

    method: Literal["segment_best_of_n"] = "segment_best_of_n"
    """Names this method in settings files."""
    n: Annotated[int, Field(ge=1)] = 4
    """Drafts of a segment."""
    boundary: AnyBoundary = Uncertainty()
    """Where a segment ends."""

    async def generate(self, session: Session) -> None:
        while not session.finished:
            async for draft in session.drafts(until=self.boundary, limit=self.n):
                session.reject(draft)
            await session.keep_best()
