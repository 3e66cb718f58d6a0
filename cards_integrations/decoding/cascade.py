"""Cascade: a search with several kept prefixes, planned so that it costs what it may."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from cards_integrations.decoding.base import Decoding, Draft, Session
from cards_integrations.decoding.registry import register_method
from cards_integrations.decoding.search_plan import CountedTokens, plan_search
from cards_integrations.decoding.segmentation import FixedLength
from cards_integrations.trace import SearchPlan, SearchRound

FLAT = 0.05  # of the largest gain so far: less than that is no gain
TOKENS = re.compile(r"tokens:(\d+(?:\.\d+)?)")


def _as_budget(value: Any) -> Any:
    if isinstance(value, str) and not TOKENS.fullmatch(value):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"budget={value!r}: pass a number such as 1.4, or 'tokens:5'") from None
    return value


@register_method
class Cascade(Decoding):
    """CARDS's cascade with several kept prefixes, which costs `budget` times as much as a plain answer.

    Round k drafts W_k children of the S_(k-1) prefixes that survived the round before, L_k tokens each and as equally
    many of each prefix as can be, and keeps the S_k of highest reward among them and the finished ones. The answer
    is the best of the last round. The plan of the (L_k, W_k, S_k) follows from the budget, the
    measured times of steps and the load when the request begins (`plan_search`). A round after one whose best
    draft was no better than its mean draft is half as wide, but not below 2.

    It needs neither a target nor a beta, a threshold or a calibration. It is a search rule: it does not sample from
    the reward-tilted distribution that quasi-rejection (`Cards`) approximates.

    Example:
        >>> Cascade(budget=2)
        >>> Cascade(budget="tokens:5")
        >>> Cascade(plan=answer.plan)
    """

    method: Literal["cascade"] = "cascade"
    """Names this method in settings files."""
    budget: Annotated[Annotated[float, Field(ge=1, le=1000)] | str, BeforeValidator(_as_budget)] = 1.4
    """What an answer costs over a plain one: 1.4 is of the time, on this device under the load of the moment;
    "tokens:5" is of the drafted tokens, with which a seed gives the same text on every device."""
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
            return plan_search(float(self.budget.removeprefix("tokens:")), CountedTokens(), session.max_tokens)
        return plan_search(self.budget, await session.step_costs(), session.max_tokens)


class Beam:
    """The prefixes that a search goes on with, the best one first.

    What all of them share is kept: it is streamed, and what was drafted beside it is freed.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.unkept: dict[Draft, list[Draft]] = {}  # of each prefix, in order: its drafts that are not kept yet

    @property
    def finished(self) -> bool:
        """True if no prefix can go on."""
        return bool(self.unkept) and all(prefix.finished for prefix in self.unkept)

    async def advance(self, stage: SearchRound, width: int) -> list[float]:
        """Draft a round, let its best go on, and return the rewards of its drafts."""
        done = {prefix: path for prefix, path in self.unkept.items() if prefix.finished}
        parents = self._parents(max(1, width - len(done)))
        drafts = await self.session.grow(parents, until=FixedLength(length=stage.tokens))
        grown = {d: [*self.unkept.get(p, []), d] for p, d in zip(parents, drafts, strict=True)}  # type: ignore[arg-type]
        self.unkept = done | grown
        await self._select(stage.survivors)
        return [draft.reward for draft in drafts]

    async def finish(self) -> None:
        """Keep the best prefix, and write it to its end."""
        await self._select(1)
        while not self.session.finished:
            [draft] = await self.session.grow([None], until=FixedLength(length=self.session.max_tokens))
            draft.verdict = "best"
            await self.session.keep(draft)

    def _parents(self, width: int) -> Sequence[Draft | None]:
        """As equally many children for each prefix as can be."""
        live = [prefix for prefix in self.unkept if not prefix.finished]
        for prefix in live[width:]:
            self.session.give_up(prefix)
        live = live[:width]
        return [live[child * len(live) // width] for child in range(width)] if live else [None] * width

    async def _select(self, survivors: int) -> None:
        """Give up all but the best prefixes, and keep what those share."""
        ranked = sorted(self.unkept, key=lambda prefix: -prefix.reward)
        for prefix in ranked[survivors:]:
            self.session.give_up(prefix)
        chosen = {prefix: self.unkept[prefix] for prefix in ranked[:survivors]}
        shared = [level[0] for level in takewhile(_all_same, zip(*chosen.values(), strict=False))]
        if shared:
            shared[-1].verdict = "best"
            await self.session.keep(shared[-1])
        self.unkept = {prefix: path[len(shared) :] for prefix, path in chosen.items()}


def _all_same(drafts: Sequence[Draft]) -> bool:
    return all(draft is drafts[0] for draft in drafts)
