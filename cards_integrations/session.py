"""One request while it runs: what a decoding method drafts from, keeps into and reads."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cards_integrations.decoding.base import Draft
from cards_integrations.errors import RewardError
from cards_integrations.models.base import Boundary, Candidate, Context, LanguageModel
from cards_integrations.models.randomness import Uniforms
from cards_integrations.rewards.base import Conversation, Response, RewardModel
from cards_integrations.trace import DraftTrace, FinishReason, Segment


@dataclass(frozen=True)
class Chunk:
    """A kept segment as it is streamed: the text that is certain by now, and the segment itself."""

    text: str
    segment: Segment


class Desk(Protocol):
    """What a session asks of the engine."""

    @property
    def language_model(self) -> LanguageModel:
        """Where candidates are drafted."""

    def width(self) -> int:
        """Candidates that a request may draft at once now."""

    def wake(self) -> None:
        """There is something new to draft."""


@dataclass(eq=False)
class Pending:
    """A candidate in the making: `done` resolves to its reward (NaN where no `judge` scores it)."""

    candidate: Candidate
    judge: RewardModel | None
    done: asyncio.Future[float]
    response: Response | None = None


class Session:
    """Implements `decoding.base.Session` on a language model and a reward model."""

    def __init__(
        self, desk: Desk, context: Context, seed: int, reward: RewardModel | None,
        scale: tuple[float, float] | None, emit: Callable[[Chunk], None] | None,
    ) -> None:  # fmt: skip
        self.desk = desk
        self.context = context
        self.seed = seed
        self.reward = reward
        self.reward_scale = scale
        self.emit = emit
        self.max_tokens = context.max_tokens
        self.finish: FinishReason | None = None
        self.error: Exception | None = None
        self.segments: list[Segment] = []
        self.log_likelihood = 0.0
        self.prompt_score: float | None = None
        self.looked_at: dict[Draft, Pending] = {}
        self.drafting: Drafts | None = None
        self.streamed = 0
        self.conversation = Conversation(context.prompt, context.usage)
        if reward is not None:
            reward.open(self.conversation)  # may refuse the prompt, and then nothing else is open
        desk.language_model.open(context)

    @property
    def finished(self) -> bool:
        return self.finish is not None

    async def prompt_reward(self) -> float:
        if self.prompt_score is None:
            judge, response = self._judge(), Response(self.conversation, "", [])
            [self.prompt_score] = await score(judge, [response])
            judge.keep(response)
        return self.prompt_score

    def drafts(self, until: Boundary, limit: int, scored: bool = True) -> Drafts:
        self._give_up()
        judge = self._judge() if scored else None
        if self.context.sampler.greedy:
            limit = 1  # every candidate would be the same one
        self.drafting = Drafts(self, until, limit, judge)
        return self.drafting

    def better(self, best: Draft | None, draft: Draft) -> Draft:
        if best is None:
            return draft
        keep, lose = (draft, best) if draft.reward > best.reward else (best, draft)
        self._drop(self.looked_at[lose])
        return keep

    async def keep(self, draft: Draft) -> None:
        if self.error is not None:
            raise self.error
        kept = self.looked_at[draft]
        candidate = kept.candidate
        self._give_up(but=kept)
        self.desk.language_model.keep(candidate)
        if self.reward is not None and kept.response is not None:
            self.reward.keep(kept.response)
        self.log_likelihood += candidate.log_likelihood
        self.finish = candidate.finish
        drafts = tuple(_traced(held, pending.candidate) for held, pending in self.looked_at.items())
        reward = draft.reward if kept.judge else None
        segment = Segment(draft.text, tuple(candidate.ids), reward, draft.threshold, drafts)
        self.segments.append(segment)
        self.looked_at = {}
        self._stream(segment)

    def fail(self, error: Exception) -> None:
        """The language model has lost this request: whatever it waits for, or asks next, raises."""
        self.error = error
        for pending in self.drafting.ahead if self.drafting else ():
            if not pending.done.done():
                pending.done.set_exception(error)

    def close(self) -> None:
        """Free the rows; nothing of this request is computed any more."""
        self._give_up()
        self.desk.language_model.close(self.context)
        if self.reward is not None:
            self.reward.close(self.conversation)

    def _judge(self) -> RewardModel:
        if self.reward is None:
            raise RewardError("This decoding method needs a reward model: pass reward=.")
        return self.reward

    def _stream(self, segment: Segment) -> None:
        """Emit what no later token can take back: not half a character, not half a stop string."""
        text = self.context.text
        certain = len(text)
        if not self.finished:
            certain = len(text.rstrip("\ufffd"))
            certain -= self.context.stop.held_back(text[:certain])
        new, self.streamed = text[self.streamed : certain], max(self.streamed, certain)
        if self.emit is not None:
            self.emit(Chunk(new, segment))

    def _give_up(self, but: Pending | None = None) -> None:
        """Drop all that was drafted for the open segment, looked at or not."""
        ahead = self.drafting.ahead if self.drafting else ()
        for pending in [*ahead, *self.looked_at.values()]:
            if pending is not but:
                self._drop(pending)
        self.drafting = None

    def _drop(self, pending: Pending) -> None:
        pending.done.cancel()
        self.desk.language_model.drop(pending.candidate)
        if self.reward is not None and pending.response is not None:
            self.reward.drop(pending.response)


class Drafts:
    """Candidates of one segment in index order; several are drafted at once, as the engine decides."""

    def __init__(self, session: Session, until: Boundary, limit: int, judge: RewardModel | None) -> None:
        self.session = session
        self.until = until
        self.limit = limit
        self.judge = judge
        self.begun = 0
        self.ahead: deque[Pending] = deque()

    def __aiter__(self) -> Drafts:
        return self

    async def __anext__(self) -> Draft:
        session = self.session
        if session.error is not None:
            raise session.error
        if session.drafting is not self:
            raise StopAsyncIteration
        self._refill()
        if not self.ahead:
            raise StopAsyncIteration
        pending = self.ahead[0]
        reward = await pending.done
        self.ahead.popleft()
        candidate = pending.candidate
        draft = Draft(candidate.index, candidate.text, reward, candidate.end, candidate.uniforms.verdict)
        session.looked_at[draft] = pending
        session.context.usage.drafts += 1
        return draft

    def _refill(self) -> None:
        session = self.session
        while self.begun < self.limit and len(self.ahead) < session.desk.width():
            uniforms = Uniforms(session.seed, len(session.segments), self.begun)
            candidate = Candidate(session.context, self.until, uniforms, self.begun)
            session.desk.language_model.begin(candidate)
            pending = Pending(candidate, self.judge, asyncio.get_running_loop().create_future())
            candidate.waiter = (session, pending)
            self.ahead.append(pending)
            self.begun += 1
            session.desk.wake()


async def score(model: RewardModel, responses: list[Response]) -> list[float]:
    """The scores, or a `RewardError` that names the reward and the text that caused it."""
    try:
        scores = [float(value) for value in await model.score(responses)]
    except RewardError:
        raise
    except Exception as error:
        texts = ", ".join(repr(response.text) for response in responses)
        raise RewardError(f"reward {model.name!r} failed for {texts}: {type(error).__name__}: {error}") from error
    if len(scores) != len(responses):
        raise RewardError(f"reward {model.name!r} returned {len(scores)} scores for {len(responses)} texts.")
    for value, response in zip(scores, responses, strict=True):
        if not math.isfinite(value):
            raise RewardError(f"reward {model.name!r} returned {value} for the text {response.text!r}.")
    return scores


def _traced(draft: Draft, candidate: Candidate) -> DraftTrace:
    reward = None if draft.verdict == "unscored" else draft.reward
    return DraftTrace(draft.index, draft.text, tuple(candidate.ids), reward, draft.threshold, draft.verdict)
