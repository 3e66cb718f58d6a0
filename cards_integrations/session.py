"""One request while it runs: what a decoding method drafts from, keeps into and reads."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol
from uuid import uuid4

from cards_integrations.decoding.base import Draft, Scale
from cards_integrations.errors import RewardError
from cards_integrations.models.base import Boundary, Candidate, Context, LanguageModel
from cards_integrations.models.randomness import Uniforms
from cards_integrations.models.step_times import StepTimes
from cards_integrations.models.tool_reader import ToolReader
from cards_integrations.rewards.base import Conversation, Response, RewardModel
from cards_integrations.trace import DraftTrace, FinishReason, InvalidToolCall, Segment, ToolCall

log = logging.getLogger("cards_integrations")
FREE = StepTimes({1: 0.0, 2: 0.0})  # a reward that costs this device nothing
LEAST = 0.02  # a candidate that is looked at with less probability is not drafted ahead


@dataclass(frozen=True)
class Chunk:
    """A kept segment as it is streamed: what is certain by now, and the segment itself.

    `number` is the segment's place in the answer, `text` what the answer says; the calls that it makes
    are in `calls`, each once it is whole.
    """

    text: str
    segment: Segment
    number: int
    calls: tuple[ToolCall | InvalidToolCall, ...] = ()


class Desk(Protocol):
    """What a session asks of the engine."""

    @property
    def language_model(self) -> LanguageModel:
        """Where candidates are drafted."""

    def wake(self) -> None:
        """There is something new to draft or to score."""


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
        return drafting is None or (bool(drafting.ahead) and drafting.ahead[0].question is self)


@dataclass(eq=False)
class Pending:
    """A candidate in the making, and then its way to a draft with a reward (NaN if none is asked for)."""

    candidate: Candidate
    score: asyncio.Future[float]
    ended: bool = False
    question: Question | None = None
    next: Drafts | None = None  # candidates of the next segment, if this one is kept
    _draft: Draft | None = None

    @property
    def draft(self) -> Draft | None:
        """The draft, once there is a score."""
        if self._draft is None and self.score.done() and not self.score.cancelled() and not self.score.exception():
            c = self.candidate
            self._draft = Draft(c.index, c.text, self.score.result(), c.end, c.uniforms.verdict)
        return self._draft


class AcceptanceRate:
    """The running share of candidates that pass; it begins as if one of four had."""

    def __init__(self) -> None:
        self.passed, self.looked_at = 1.0, 4.0

    @property
    def value(self) -> float:
        return self.passed / self.looked_at

    def saw(self, candidates: int, passed: bool) -> None:
        self.passed += passed
        self.looked_at += candidates


class Session:
    """Implements `decoding.base.Session` on a language model and a reward model."""

    def __init__(
        self, desk: Desk, context: Context, seed: int, conversation: Conversation,
        reward: RewardModel | None, scale: Scale | None, emit: Callable[[Chunk], None] | None, reader: ToolReader,
    ) -> None:  # fmt: skip
        self.request_id = uuid4().hex[:8]
        self.desk = desk
        self.context = context
        self.seed = seed
        self.reward = reward
        self.reward_scale = scale
        self.reader = reader
        self.emit = emit
        self.max_tokens = context.max_tokens
        self.finish: FinishReason | None = None
        self.error: Exception | None = None
        self.segments: list[Segment] = []
        self.log_likelihood = 0.0
        self.prompt_score: float | None = None
        self.looked_at: dict[Draft, Pending] = {}
        self.kept: Pending | None = None
        self.drafting: Drafts | None = None
        self.questions: list[Question] = []
        self.rate = AcceptanceRate()
        self.conversation = conversation
        if reward is not None:
            reward.open(self.conversation)  # may refuse the prompt, and then nothing else is open
        desk.language_model.open(context)

    @property
    def seconds_to_score(self) -> StepTimes:
        return FREE if self.reward is None else self.reward.times or FREE

    @property
    def finished(self) -> bool:
        return self.finish is not None

    async def prompt_reward(self) -> float:
        if self.prompt_score is None:
            asked = asyncio.get_running_loop().create_future()
            question = self.ask(Response(self.conversation, "", [], 0.0), asked)
            self.prompt_score = await asked
            question.judge.keep(question.response)
        return self.prompt_score

    def drafts(
        self, until: Boundary, limit: int, scored: bool = True, passes: Callable[[Draft], bool] | None = None
    ) -> Drafts:
        self._give_up_segment()
        if scored:
            self._judge()
        if self.context.sampler.greedy:
            limit = 1  # every candidate would be the same one
        plan = Plan(until, limit, scored, passes)
        ahead = self.kept.next if self.kept is not None else None
        self.kept = None
        if ahead is not None and ahead.plan.drafts_like(plan):
            self.drafting = ahead
        else:
            if ahead is not None:
                ahead.drop()
            self.drafting = Drafts(self, plan, len(self.segments), None)
        self.drafting.open()
        return self.drafting

    def better(self, best: Draft | None, draft: Draft) -> Draft:
        if best is None:
            return draft
        keep, lose = (draft, best) if draft.reward > best.reward else (best, draft)
        self.give_up(self.looked_at[lose])
        return keep

    async def keep(self, draft: Draft) -> None:
        if self.error is not None:
            raise self.error
        kept = self.looked_at[draft]
        candidate = kept.candidate
        self._give_up_segment(but=kept)
        self.desk.language_model.keep(candidate)
        if kept.question is not None:
            kept.question.judge.keep(kept.question.response)
        self.log_likelihood += candidate.log_likelihood
        self.finish = candidate.finish
        drafts = tuple(_traced(held, pending) for held, pending in self.looked_at.items())
        reward = draft.reward if kept.question else None
        parts = kept.question.response.parts if kept.question else {}
        segment = Segment(draft.text, tuple(candidate.ids), reward, draft.threshold, drafts, parts)
        self.segments.append(segment)
        log.debug(
            "request %s: segment %d, %d drafts, reward %s, %d tokens: %r", self.request_id, len(self.segments),
            len(drafts), reward, draft.end, draft.text,
        )  # fmt: skip
        self.rate.saw(len(self.looked_at), draft.verdict == "accepted")
        self.looked_at, self.kept = {}, kept
        self._stream(segment)

    def fail(self, error: Exception) -> None:
        """The language model has lost this request: whatever it waits for, or asks next, raises."""
        self.error = error
        waited_for = [pending.score for pending in self.drafting.ahead] if self.drafting else []
        for future in [*waited_for, *(question.score for question in self.questions)]:
            if not future.done():
                future.set_exception(error)

    def close(self) -> None:
        """Free the rows; nothing of this request is computed any more."""
        self._give_up_segment()
        if self.kept is not None and self.kept.next is not None:
            self.kept.next.drop()
        for question in self.questions:
            question.score.cancel()
        self.desk.language_model.close(self.context)
        if self.reward is not None:
            self.reward.close(self.conversation)

    def _judge(self) -> RewardModel:
        if self.reward is None:
            raise RewardError("This decoding method needs a reward model: pass reward=.")
        return self.reward

    def ask(self, response: Response, score: asyncio.Future[float]) -> Question:
        """Have a response scored, together with those of other requests."""
        question = Question(self, self._judge(), response, score)
        self.questions.append(question)
        self.desk.wake()
        return question

    def _stream(self, segment: Segment) -> None:
        """Emit what no later token can take back: not half a character, not half a stop string."""
        if self.emit is None:
            return
        text = self.context.text
        if not self.finished:
            text = text.rstrip("\ufffd")
            text = text[: len(text) - self.context.stop.held_back(text)]
        said, calls = self.reader.new(text, self.finished)
        self.emit(Chunk(said, segment, len(self.segments) - 1, calls))

    def _give_up_segment(self, but: Pending | None = None) -> None:
        """Drop all that was drafted for the open segment, looked at or not."""
        ahead = self.drafting.ahead if self.drafting else ()
        for pending in [*ahead, *self.looked_at.values()]:
            if pending is not but:
                self.give_up(pending)
        self.drafting = None

    def give_up(self, pending: Pending) -> None:
        if pending.next is not None:
            pending.next.drop()
            pending.next = None
        pending.score.cancel()
        self.desk.language_model.drop(pending.candidate)
        if pending.question is not None:
            pending.question.judge.drop(pending.question.response)


@dataclass(frozen=True)
class Plan:
    """What a method asked `Session.drafts` for."""

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
    """

    def __init__(self, session: Session, plan: Plan, segment: int, parent: Pending | None) -> None:
        self.session = session
        self.plan = plan
        self.segment = segment
        self.parent = parent
        self.begun = 0
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

    def begin(self) -> Pending:
        """Start the next candidate."""
        session = self.session
        uniforms = Uniforms(session.seed, self.segment, self.begun)
        parent = self.parent.candidate if self.parent else None
        candidate = Candidate(session.context, self.plan.until, uniforms, self.begun, parent)
        pending = Pending(candidate, asyncio.get_running_loop().create_future())
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
            self.session.give_up(pending)

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
            response.log_likelihood = session.log_likelihood + candidate.log_likelihood
        pending.question = self.session.ask(response, pending.score)


def _traced(draft: Draft, pending: Pending) -> DraftTrace:
    reward = None if draft.verdict == "unscored" else draft.reward
    ids, parts = tuple(pending.candidate.ids), pending.question.response.parts if pending.question else {}
    return DraftTrace(draft.index, draft.text, ids, reward, draft.threshold, draft.verdict, parts)
