"""Cascade: a search with several kept prefixes, planned so that it costs what it may."""

from __future__ import annotations

import logging
import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from cards_integrations.decoding.base import Decoding, Session, StepCosts
from cards_integrations.decoding.beam import Beam
from cards_integrations.decoding.registry import register_method
from cards_integrations.decoding.search_plan import CountedTokens, plan_search
from cards_integrations.trace import SearchPlan

FLAT = 0.05  # of the largest gain so far: less than that is no gain
TOKENS = "tokens:"
MOST = 1000
log = logging.getLogger("cards_integrations")
_told: set[float] = set()  # budgets that bought nothing


def _as_budget(value: Any) -> float | str:
    counted = isinstance(value, str) and value.startswith(TOKENS)
    try:
        times = float(value.removeprefix(TOKENS) if counted else value)
    except (TypeError, ValueError):
        times = math.nan
    if not 1 <= times <= MOST:
        raise ValueError(f"{value!r} is neither a number from 1 to {MOST}, such as 1.4, nor of the form 'tokens:5'")
    return f"{TOKENS}{times:g}" if counted else times


@register_method
class Cascade(Decoding):
    """CARDS's cascade with several kept prefixes, which costs at most `budget` times as much as a plain answer.

    Round k drafts W_k children of the S_(k-1) prefixes that survived the round before, L_k tokens each and as equally
    many of each prefix as can be, and keeps the S_k of highest reward among them and the finished ones. The answer
    is the best of the last round. The plan of the (L_k, W_k, S_k) follows from the budget, the
    measured times of steps and the load when the request begins (`plan_search`). A round after one whose best
    draft was no better than its mean draft is half as wide, but not below 2.

    It needs neither a target nor a beta, a threshold or a calibration. It is a search rule: it does not sample from
    the reward-tilted distribution that quasi-rejection (`Cards`) approximates.

    Examples:
        >>> Cascade(budget="tokens:5")
        >>> Cascade(budget=1.4)
        >>> Cascade(plan=answer.plan)
    """

    method: Literal["cascade"] = "cascade"
    """Names this method in settings files."""
    budget: Annotated[float | str, BeforeValidator(_as_budget)] = "tokens:8"
    """What an answer costs at most, over a plain one of `max_tokens`. "tokens:8" is of the drafted tokens: a seed gives
    the same text on every device under every load. 1.4 is of the time of drafting and scoring, on this device under
    the load of the moment: on a busy one little is left for a search."""
    plan: SearchPlan | None = None
    """The rounds, such as those of an earlier answer (`Alignment.plan`); None plans by the budget."""

    async def generate(self, session: Session) -> None:
        session.plan = plan = self.plan or await self._planned(session)
        beam, gains = Beam(session), list[float]()
        for stage in plan.rounds:
            if beam.finished:
                break
            flat = bool(gains) and gains[-1] <= FLAT * max(gains)
            drafts = await beam.advance(stage, max(2, stage.width // 2) if flat else stage.width)
            if len(drafts) > 1:
                gains.append(max(drafts) - sum(drafts) / len(drafts))
        await beam.finish()

    async def _planned(self, session: Session) -> SearchPlan:
        if isinstance(self.budget, str):
            return plan_search(float(self.budget.removeprefix(TOKENS)), CountedTokens(), session.max_tokens)
        costs = await session.step_costs()
        plan = plan_search(self.budget, costs, session.max_tokens)
        if self.budget > 1 and all(stage.width == 1 for stage in plan.rounds):
            _warn_of_plain(self.budget, costs, session.max_tokens)
        return plan


def _warn_of_plain(budget: float, costs: StepCosts, tokens: int) -> None:
    """Tell that a budget buys nothing, once in a process."""
    if budget in _told:
        return
    _told.add(budget)
    two = (tokens * costs.draft(2) + costs.score(2 * tokens)) / (tokens * costs.draft(1))
    log.warning(
        "budget=%g buys no second draft on this device now: the choice between two answers costs %.1f times a plain "
        "one. The answer is plain. Use budget='tokens:5', or a larger one.",
        budget, two,
    )  # fmt: skip
