"""Best-of-N: of N whole answers the one with the highest reward."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cards_integrations.decoding.base import Decoding, Session
from cards_integrations.decoding.registry import register_method
from cards_integrations.decoding.segmentation import FixedLength


@register_method
class BestOfN(Decoding):
    """N answers from p(y | x), drafted together; the one with the highest r(x, y) is kept.

    The expected KL divergence from p is at most log N - (N - 1) / N (Beirami et al., arXiv 2401.01879).
    """

    method: Literal["best_of_n"] = "best_of_n"
    """Names this method in settings files."""
    n: Annotated[int, Field(ge=1)] = 16
    """How many answers are drafted."""

    async def generate(self, session: Session) -> None:
        async for draft in session.drafts(until=FixedLength(length=session.max_tokens), limit=self.n):
            session.reject(draft)
        await session.keep_best()
