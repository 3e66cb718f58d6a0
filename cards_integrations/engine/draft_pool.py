"""Candidates on their way to drafts with rewards: of one segment, or of several branches of a tree."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cards_integrations.decoding.base import Draft
from cards_integrations.models.base import Boundary, Candidate
from cards_integrations.models.randomness import Uniforms
from cards_integrations.rewards.base import Response, RewardModel

if TYPE_CHECKING:
    from cards_integrations.engine.session import Session

LEAST = 0.02  # a candidate that is looked at with less probability is not drafted ahead


@dataclass(eq=False)
class Question:
    """A response that waits for its score."""

    session: Session
    judge: RewardModel
    response: Response
    score: asyncio.Future[float]

    @property
    def blocks(self) -> bool:
        """Is it what the method waits for?"""
        drafting = self.session.drafting
        return drafting is None or drafting.waits_for(self)


@dataclass(eq=False)
class Pending:
    """A candidate in the making, and then its way to a draft with a reward (NaN if none is asked for).

    In a tree, `parent` is the draft that it follows, and `level` are the drafts made together with it.
    """

    candidate: Candidate
    score: asyncio.Future[float]
    parent: Pending | None = None
    children: int = 0  # that still need its columns
    level: Level | None = None
    given_up: bool = False
    kept: bool = False
    ended: bool = False
    question: Question | None = None
    next: Drafts | None = None  # candidates of the next segment, if this one is kept
    _draft: Draft | None = None

    @property
    def draft(self) -> Draft | None:
        """The draft, once there is a score."""
        if self._draft is None and self.score.done() and not self.score.cancelled() and not self.score.exception():
            c, reward = self.candidate, self.score.result()
            finished, log_p = c.finish is not None, c.log_likelihood + c.end_log_p
            self._draft = Draft(c.index, c.text, reward, c.end, c.uniforms.verdict, finished, log_p, c.rank)
        return self._draft


@dataclass(frozen=True)
class Plan:
    """What a method asked `Session.drafts` for; `limit` is that of the segment, with those of earlier calls."""

    until: Boundary
    limit: int
    scored: bool
    passes: Callable[[Draft], bool] | None

    def drafts_like(self, other: Plan) -> bool:
        return (self.until, self.limit, self.scored) == (other.until, other.limit, other.scored)


class Drafts:
    """Candidates of one segment, in index order.

    They follow the kept text, or, drafted ahead of its verdict, a candidate (`parent`) of the
    segment before; if that is kept, the method goes on with these, and only then they are scored.
    The index of the first is `begun`.
    """

    def __init__(self, session: Session, plan: Plan, segment: int, parent: Pending | None, begun: int = 0) -> None:
        self.session = session
        self.plan = plan
        self.segment = segment
        self.parent = parent
        self.begun = begun
        self.ahead: deque[Pending] = deque()

    def open(self) -> None:
        """The method asks for these now: `parent`, if any, has been kept."""
        self.parent = None
        for pending in self.ahead:
            if pending.ended:
                self._to_verdict(pending)
        self.session.desk.wake()

    def __aiter__(self) -> Drafts:
        return self

    async def __anext__(self) -> Draft:
        session = self.session
        if session.error is not None:
            raise session.error
        if session.drafting is not self or (not self.ahead and self.begun == self.plan.limit):
            raise StopAsyncIteration
        if not self.ahead:
            self.begin()
        pending = self.ahead[0]
        await pending.score
        self.ahead.popleft()
        draft = pending.draft
        assert draft is not None
        session.looked_at[draft] = pending
        session.context.usage.drafts += 1
        return draft

    @property
    def vacancies(self) -> int:
        """How many more candidates may begin: by the limit, and by the memory. One always may."""
        left = self.plan.limit - self.begun
        if left <= 0 or not self.ahead:
            return left
        drafting = sum(not pending.ended for pending in self.ahead)
        model = self.session.desk.language_model
        return min(left, max(0, model.vacancies(self.session.context, self.plan.until) - drafting))

    def waits_for(self, question: Question) -> bool:
        """Does the method get nothing before this is answered?"""
        return bool(self.ahead) and self.ahead[0].question is question

    def begin(self) -> Pending:
        """Start the next candidate."""
        return self._begin(self.parent)

    def _begin(self, parent: Pending | None, rank: int | None = None) -> Pending:
        session = self.session
        uniforms = Uniforms(session.seed, self.segment, self.begun)
        origin = parent.candidate if parent else None
        candidate = Candidate(session.context, self.plan.until, uniforms, self.begun, origin, rank=rank)
        pending = Pending(candidate, asyncio.get_running_loop().create_future(), parent)
        candidate.waiter = (self, pending)
        session.desk.language_model.begin(candidate)
        session.desk.wake()
        self.ahead.append(pending)
        self.begun += 1
        return pending

    def ended(self, pending: Pending) -> None:
        pending.ended = True
        if self.parent is None:
            self._to_verdict(pending)

    def prospects(self, reach: float, rate: float) -> Iterator[tuple[float, Drafts, Pending | None]]:
        """What could be drafted, with the probability that the method will look at it.

        A pending of None stands for a candidate that has not begun. `reach` is the probability that
        the method gets here, `rate` that a candidate without a verdict passes.
        """
        everything = self.plan.passes is None
        for pending in self.ahead:
            passing = self._passing(pending, rate)
            if reach < LEAST:
                return
            if not pending.ended:
                yield reach, self, pending
            elif pending.candidate.finish is None and reach * passing >= LEAST:
                if pending.next is None:
                    pending.next = Drafts(self.session, self.plan, self.segment + 1, pending)
                yield from pending.next.prospects(reach * passing, rate)
            reach *= 1 if everything else 1 - passing
        for _ in range(self.vacancies):
            if reach < LEAST:
                return
            yield reach, self, None
            reach *= 1 if everything else 1 - rate

    def drop(self) -> None:
        for pending in self.ahead:
            self.session.release(pending)

    def _passing(self, pending: Pending, rate: float) -> float:
        if self.plan.passes is None:
            return 1 / self.plan.limit
        return rate if pending.draft is None else float(self.plan.passes(pending.draft))

    def _to_verdict(self, pending: Pending) -> None:
        if pending.score.done():
            return  # cancelled with the request that waits for it
        if not self.plan.scored:
            pending.score.set_result(math.nan)
            return
        session, candidate = self.session, pending.candidate
        response = Response(session.conversation, candidate.response, finished=candidate.finish is not None)
        if candidate.whole:
            response.ids = candidate.before + candidate.ids
            branch = session.unkept(pending)
            response.log_likelihood = session.log_likelihood + sum(p.candidate.log_likelihood for p in branch)
        if pending.parent is not None and pending.parent.question is not None:
            response.parent = pending.parent.question.response
        pending.question = self.session.ask(response, pending.score)


class Level(Drafts):
    """Drafts that a method asks for together: a child for each of its `parents`, None being the kept text.

    All of them are drafted and scored; they stay until they are given up, and can be parents in turn.
    With `ranks` a child takes the token of that rank, 0 being the most probable, and no random one.
    """

    def __init__(
        self,
        session: Session,
        plan: Plan,
        number: int,
        parents: Sequence[Pending | None],
        ranks: Sequence[int] | None,
    ) -> None:
        super().__init__(session, plan, number, None)
        self.parents = parents
        self.ranks = ranks
        self.drafts: dict[Draft, Pending] = {}

    def begin(self) -> Pending:
        parent = self.parents[self.begun]
        pending = self._begin(parent, None if self.ranks is None else self.ranks[self.begun])
        pending.level = self
        if parent is not None:
            parent.children += 1
        return pending

    def waits_for(self, question: Question) -> bool:
        return True

    def prospects(self, reach: float, rate: float) -> Iterator[tuple[float, Drafts, Pending | None]]:
        for pending in self.ahead:
            if not pending.ended:
                yield reach, self, pending
        for _ in range(self.vacancies):
            yield reach, self, None
