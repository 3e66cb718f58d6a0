"""Plain sampling from the language model: nothing is scored, nothing is rejected."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cards_integrations.decoding.base import Decoding, Session
from cards_integrations.decoding.registry import register_method
from cards_integrations.decoding.segmentation import FixedLength


@register_method
class Sampling(Decoding):
    """Ancestral sampling, without a reward model."""

    method: Literal["sampling"] = "sampling"
    """Names this method in settings files."""
    chunk: Annotated[int, Field(ge=1)] = 8
    """How many tokens are streamed at a time."""
    needs_reward: ClassVar[bool] = False

    async def generate(self, session: Session) -> None:
        until = FixedLength(length=self.chunk)
        while not session.finished:
            async for draft in session.drafts(until=until, limit=1, scored=False):
                await session.keep(draft)
