"""The decoding method of a calibration: several scored candidates for each segment."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cards_integrations.decoding.base import Decoding, Session
from cards_integrations.decoding.segmentation import AnyBoundary, Uncertainty


class Pilot(Decoding):
    """Draw and score several candidates for each segment, and keep one whatever its reward."""

    method: Literal["pilot"] = "pilot"
    boundary: AnyBoundary = Uncertainty()
    """Where a segment ends."""
    candidates: int = Field(4, ge=2)
    """The number of candidates of each segment."""
    keep: Literal["first", "best"] = "first"
    """Which candidate is kept: `first` gives plain answers, `best` gives texts like those of guided answers."""

    async def generate(self, session: Session) -> None:
        """Draft and keep until the session is finished."""
        await session.prompt_reward()
        while not session.finished:
            drafts = [draft async for draft in session.drafts(until=self.boundary, limit=self.candidates)]
            for draft in drafts:
                draft.verdict = "rejected"
            kept = drafts[0] if self.keep == "first" else max(drafts, key=lambda draft: draft.reward)
            kept.verdict = "accepted"
            await session.keep(kept)
