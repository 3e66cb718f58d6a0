"""Cascade: a search with several kept prefixes, planned to stay within a budget."""

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

FLAT = 0.05  # share of the largest gain so far below which a round has gained nothing
TOKENS = "tokens:"
MAX_BUDGET = 1000  # times the cost of a plain answer
log = logging.getLogger("cards_integrations")
_warned: set[float] = set()  # budgets that bought nothing


def _as_budget(value: Any) -> float | str:
    counted = isinstance(value, str) and value.startswith(TOKENS)
    try:
        times = float(value.removeprefix(TOKENS) if counted else value)
    except (TypeError, ValueError):
        times = math.nan
    if not 1 <= times <= MAX_BUDGET:
        raise ValueError(
            f"{value!r} is neither a number from 1 to {MAX_BUDGET}, such as 1.4, nor of the form 'tokens:5'"
        )
    return f"{TOKENS}{times:g}" if counted else times


@register_method
class Cascade(Decoding):
    """CARDS's cascade with several kept prefixes, which costs at most `budget` times as much as a plain answer.

    Round k drafts W_k children of L_k tokens each, spread evenly over the S_(k-1) prefixes that survived the round
    before. Of these and the finished prefixes, the S_k with the highest rewards survive. The answer is the best of the
    last round. The plan of all (L_k, W_k, S_k) is made when the request begins, from the budget, the measured times of
    steps and the load (`plan_search`). After a round whose best draft was hardly better than its mean draft, the next
    one is half as wide, but not narrower than 2.

    No target, beta, threshold or calibration is needed. This is a search rule: it does not sample from the
    reward-tilted distribution that quasi-rejection (`Cards`) approximates.

    Examples:
        >>> Cascade(budget="tokens:5")
        >>> Cascade(budget=1.4)
        >>> Cascade(plan=answer.plan)
    """

    method: Literal["cascade"] = "cascade"
    """Names this method in settings files."""
    budget: Annotated[float | str, BeforeValidator(_as_budget)] = "tokens:8"
    """The most that an answer may cost, relative to a plain one of `max_tokens`. "tokens:8" counts drafted tokens, so
    that a seed gives the same text on every device and under every load. 1.4 counts the time of drafting and scoring
    on this device under its present load: on a busy device little is left for a search."""
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
    """Warn, once in a process, that a budget buys nothing."""
    if budget in _warned:
        return
    _warned.add(budget)
    two = (tokens * costs.draft(2) + costs.score(2 * tokens)) / (tokens * costs.draft(1))
    log.warning(
        "budget=%g buys no second draft on this device now: the choice between two answers costs %.1f times a plain "
        "one. The answer is plain. Use budget='tokens:5', or a larger one.",
        budget, two,
    )  # fmt: skip
