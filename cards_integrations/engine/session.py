"""One request while it runs: what a decoding method drafts from, keeps into and reads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from typing import Protocol
from uuid import uuid4

from cards_integrations.chat.message import PARTIAL_CHARACTER
from cards_integrations.chat.tool_reader import ToolReader
from cards_integrations.decoding.base import Draft, Scale
from cards_integrations.engine.draft_pool import Drafts, Level, Pending, Plan, Question
from cards_integrations.errors import RewardError
from cards_integrations.models.base import Boundary, Context, LanguageModel
from cards_integrations.rewards.base import Conversation, Response, RewardModel
from cards_integrations.trace import DraftTrace, FinishReason, InvalidToolCall, Segment, ToolCall
from cards_integrations.transformer.step_times import StepTimes

log = logging.getLogger("cards_integrations")
FIRST_LEVEL = 2**32  # levels of a tree are numbered from here, segments from 0: each has its own random numbers
FREE = StepTimes({1: 0.0, 2: 0.0})  # a reward that costs this device nothing


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
        self.caller = copy_context()
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
        self.nodes: dict[Draft, Pending] = {}  # of the tree, in the order in which they grew
        self.next_level = FIRST_LEVEL
        self.drafting: Drafts | None = None
        self.questions: list[Question] = []
        self.rate = AcceptanceRate()
        self.conversation = conversation
        if reward is not None:
            reward.open(self.conversation)  # may refuse the prompt, and then nothing else is open
        desk.language_model.open(context)

    @property
    def seconds_to_score(self) -> StepTimes:
        return FREE if self.reward is None else self.reward.step_times or FREE

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
        self._give_up_ahead()
        if scored:
            self._judge()
        if self.context.sampler.greedy:
            limit = 1  # every candidate would be the same one
        begun = len(self.looked_at)  # by an earlier call for this segment
        plan = Plan(until, begun + limit, scored, passes)
        ahead = self.kept.next if self.kept is not None else None
        self.kept = None
        if ahead is not None and ahead.plan.drafts_like(plan):
            self.drafting = ahead
        else:
            if ahead is not None:
                ahead.drop()
            self.drafting = Drafts(self, plan, len(self.segments), None, begun)
        self.drafting.open()
        return self.drafting

    def better(self, best: Draft | None, draft: Draft) -> Draft:
        if best is None:
            return draft
        keep, lose = (draft, best) if draft.reward > best.reward else (best, draft)
        self.release(self.looked_at[lose])
        return keep

    async def keep(self, draft: Draft) -> None:
        if self.error is not None:
            raise self.error
        if draft in self.nodes:
            return self._keep_branch(self.nodes[draft])
        kept, drafts = self.looked_at[draft], self.looked_at
        self._give_up_segment(but=kept)
        self._append(kept, drafts)
        self.rate.saw(len(drafts), draft.verdict == "accepted")
        self.looked_at, self.kept = {}, kept

    async def grow(
        self,
        parents: Sequence[Draft | None],
        until: Boundary,
        scored: bool = True,
        ranks: Sequence[int] | None = None,
    ) -> list[Draft]:
        if scored:
            self._judge()
        plan = Plan(until, len(parents), scored, None)
        self.drafting = level = Level(self, plan, self.next_level, [self._node(parent) for parent in parents], ranks)
        self.next_level += 1
        for parent in level.parents:
            if parent is not None:
                parent.given_up = True  # it grows once, and is there as long as its children
        level.open()
        drafts = [draft async for draft in level]
        for draft in drafts if scored else ():
            draft.verdict = "rejected"  # until it is kept
        level.drafts, self.looked_at, self.drafting = self.looked_at, {}, None
        self.nodes.update(level.drafts)
        return drafts

    def give_up(self, draft: Draft) -> None:
        """Its columns are free again, once those that follow it are."""
        pending: Pending | None = self.nodes[draft]
        while pending is not None and not pending.kept:
            pending.given_up = pending.given_up or pending.draft is draft
            if not pending.given_up or pending.children:
                return
            self._forget(pending)
            pending = pending.parent

    def unkept(self, pending: Pending | None) -> list[Pending]:
        """A branch of the tree from the kept text on, this one last."""
        path: list[Pending] = []
        while pending is not None and not pending.kept:
            path.insert(0, pending)
            pending = pending.parent
        return path

    def _node(self, parent: Draft | None) -> Pending | None:
        if parent is None or (self.kept is not None and self.kept.draft is parent):
            return None
        return self.nodes[parent]

    def _keep_branch(self, last: Pending) -> None:
        path = self.unkept(last)
        for pending in reversed(list(self.nodes.values())):  # whoever follows another comes after it
            if pending not in path and last not in self.unkept(pending):
                self._forget(pending)
        for pending in path:
            assert pending.draft is not None
            assert pending.level is not None
            assert last.draft is not None
            pending.draft.verdict = last.draft.verdict
            del self.nodes[pending.draft]
            self._append(pending, pending.level.drafts)
        self.kept = last

    def _forget(self, pending: Pending) -> None:
        self.release(pending)
        assert pending.draft is not None
        del self.nodes[pending.draft]
        if pending.parent is not None:
            pending.parent.children -= 1

    def _append(self, kept: Pending, among: dict[Draft, Pending]) -> None:
        """Make a candidate the last segment of the answer."""
        draft, candidate = kept.draft, kept.candidate
        assert draft is not None
        kept.kept = True
        self.desk.language_model.keep(candidate)
        if kept.question is not None:
            kept.question.judge.keep(kept.question.response)
        self.log_likelihood += candidate.log_likelihood
        self.finish = candidate.finish
        drafts = tuple(_traced(held, pending) for held, pending in among.items())
        reward = draft.reward if kept.question else None
        parts = kept.question.response.parts if kept.question else {}
        segment = Segment(draft.text, tuple(candidate.ids), reward, draft.threshold, drafts, parts)
        self.segments.append(segment)
        log.debug(
            "request %s: segment %d, %d drafts, reward %s, %d tokens: %r", self.request_id, len(self.segments),
            len(drafts), reward, draft.end, draft.text,
        )  # fmt: skip
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
        for pending in reversed(list(self.nodes.values())):
            self.release(pending)
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
            text = text.rstrip(PARTIAL_CHARACTER)
            text = text[: len(text) - self.context.stop.held_back(text)]
        said, calls = self.reader.update(text, self.finished)
        self.emit(Chunk(said, segment, len(self.segments) - 1, calls))

    def _give_up_segment(self, but: Pending | None = None) -> None:
        """Drop all that was drafted for the open segment, looked at or not."""
        self._give_up_ahead()
        for pending in self.looked_at.values():
            if pending is not but:
                self.release(pending)

    def _give_up_ahead(self) -> None:
        """Drop what was drafted for the open segment and not looked at."""
        if self.drafting is not None:
            self.drafting.drop()
        self.drafting = None

    def release(self, pending: Pending) -> None:
        """Free what a candidate holds."""
        if pending.next is not None:
            pending.next.drop()
            pending.next = None
        pending.score.cancel()
        self.desk.language_model.drop(pending.candidate)
        if pending.question is not None:
            pending.question.judge.drop(pending.question.response)


def _traced(draft: Draft, pending: Pending) -> DraftTrace:
    reward = None if draft.verdict == "unscored" else draft.reward
    ids, parts = tuple(pending.candidate.ids), pending.question.response.parts if pending.question else {}
    return DraftTrace(draft.index, draft.text, ids, reward, draft.threshold, draft.verdict, parts)
