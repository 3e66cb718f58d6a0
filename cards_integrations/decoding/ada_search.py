"""AdaSearch and AdaBeam: blockwise search that spends more on some blocks than on others."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cards_integrations.decoding.base import Decoding, Session
from cards_integrations.decoding.beam import Beam
from cards_integrations.decoding.registry import register_method
from cards_integrations.trace import SearchPlan, SearchRound

RATIO = {"decay": 0.5, "uniform": 1.0, "growth": 2.0}


@register_method
class AdaSearch(Decoding):
    """Adaptive blockwise search (arXiv 2510.23334): blocks of equal length, and a schedule of how many drafts each has.

    The best draft of a block goes on (AdaSearch), or the `beams` best ones (AdaBeam). Over `blocks` blocks there
    are n drafts each on average; here "decay" halves them from block to block, and "growth" doubles them.
    The authors score with process rewards, and find the first blocks to matter most; in our measurements the last
    ones do (docs/method.md).
    """

    method: Literal["ada_search"] = "ada_search"
    """Names this method in settings files."""
    n: Annotated[int, Field(ge=1)] = 16
    """Drafts of a block, on average."""
    blocks: Annotated[int, Field(ge=1, le=64)] = 3
    """Blocks of an answer that reaches `max_tokens`."""
    schedule: Literal["decay", "uniform", "growth"] = "decay"
    """How the number of drafts changes from block to block."""
    beams: Annotated[int, Field(ge=1)] = 1
    """How many drafts of a block go on."""

    async def generate(self, session: Session) -> None:
        session.plan = plan = self.plan_for(session.max_tokens)
        beam = Beam(session)
        for stage in plan.rounds:
            if not beam.finished:
                await beam.advance(stage, stage.width)
        await beam.finish()

    def plan_for(self, max_tokens: int) -> SearchPlan:
        """Return the rounds of an answer of so many tokens."""
        blocks = min(self.blocks, max_tokens)
        weights = [RATIO[self.schedule] ** k for k in range(blocks)]
        widths = [max(1, round(self.n * blocks * weight / sum(weights))) for weight in weights]
        ends = [max_tokens * k // blocks for k in range(blocks + 1)]
        survivors = [*(min(self.beams, width) for width in widths[:-1]), 1]
        rounds = zip(ends, ends[1:], widths, survivors, strict=False)
        return SearchPlan(tuple(SearchRound(end - begin, w, s) for begin, end, w, s in rounds))
