"""One request while it runs: what its decoding method sees, its trace and its stream."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from uuid import uuid4

from cards_integrations.chat.message import PARTIAL_CHARACTER
from cards_integrations.chat.tool_reader import ToolReader
from cards_integrations.decoding.base import Decoding, Draft, Scale, StepCosts
from cards_integrations.engine.draft_pool import DraftPool, PendingDraft, SegmentDrafts, SessionHost
from cards_integrations.engine.request import Chunk
from cards_integrations.engine.scoring import ScoreQueue
from cards_integrations.engine.sentence_end import certain_sentences, cut_after_sentence
from cards_integrations.errors import CardsError, RewardError
from cards_integrations.models.base import Boundary, Context, StepwiseModel
from cards_integrations.rewards.base import Conversation, Response, RewardModel, scoring
from cards_integrations.trace import (
    Alignment,
    DraftTrace,
    FinishReason,
    Guidance,
    InvalidToolCall,
    SearchPlan,
    Segment,
    Thinking,
    TokenLogprob,
    ToolCall,
)
from cards_integrations.transformer.step_times import StepTimes

log = logging.getLogger("cards_integrations")
FREE = StepTimes({1: 0.0, 2: 0.0})  # of a reward that costs this device nothing


class AcceptanceRate:
    """The running share of candidates that pass; it starts as if one of four had passed."""

    def __init__(self) -> None:
        self.passed, self.examined = 1.0, 4.0

    @property
    def value(self) -> float:
        return self.passed / self.examined

    def update(self, examined: int, passed: bool) -> None:
        """Count the candidates of a segment, the last of which may have passed."""
        self.passed += passed
        self.examined += examined


class Session:
    """Implements `decoding.base.Session` on a language model and a reward model.

    Args:
        host: The engine.
        context: The prompt and the answer so far.
        seed: Seed of all random numbers of the request.
        conversation: The prompt as the reward model reads it.
        reward_model: Scores the drafts; None if nothing is scored.
        scale: How the reward scores plain answers; None where the method does not ask.
        emit: Called with each kept segment.
        reader: Reads tool calls in the text.
    """

    def __init__(
        self, host: SessionHost, context: Context, seed: int, conversation: Conversation,
        reward_model: RewardModel | None, scale: Scale | None, emit: Callable[[Chunk], None] | None,
        reader: ToolReader,
    ) -> None:  # fmt: skip
        self.request_id = uuid4().hex[:8]
        self.host = host
        self.context = context
        self.seed = seed
        self.conversation = conversation
        self.reward_scale = scale
        self.max_tokens = context.max_tokens
        self.plan: SearchPlan | None = None
        self.finish: FinishReason | None = None
        self.segments: list[Segment] = []
        self.kept_at: list[float] = []  # when each segment was kept, in seconds of `time.perf_counter`
        self.acceptance_rate = AcceptanceRate()
        self.reward_model = reward_model
        self.scores = ScoreQueue(reward_model, host.wake) if reward_model is not None else None
        self.pool = DraftPool(context, seed, conversation, self.scores, host)
        self.preempted = False
        self.cut = False  # True if the answer was cut to whole sentences
        self.depth = scoring.get()  # above 0 if a reward made this request
        self._reward_freed = False
        self._prompt_reward: float | None = None
        self._reader = reader
        self._emit = emit
        context.states = reward_model is not None and reward_model.reads_states
        with ExitStack() as opened:  # a request that is refused leaves nothing open
            if reward_model is not None:
                reward_model.open(conversation)
                opened.callback(reward_model.close, conversation)
            host.language_model.open(context)
            opened.pop_all()

    # --- what a decoding method sees ---

    @property
    def finished(self) -> bool:
        return self.finish is not None

    async def prompt_reward(self) -> float:
        if self._prompt_reward is None:
            if self.pool.error is not None:
                raise self.pool.error
            response = Response(self.conversation, "", [], 0.0)
            if self.context.states:
                response.states = await self.pool.prompt_states()
            self._prompt_reward = await self._score_queue().submit(response)
            self._score_queue().reward_model.keep(response)
        return self._prompt_reward

    async def step_costs(self) -> StepCosts:
        await asyncio.sleep(0)  # after this, requests that begin together are all live
        return self.host.step_costs(self.seconds_to_score)

    def drafts(
        self, until: Boundary, limit: int, scored: bool = True, passes: Callable[[Draft], bool] | None = None
    ) -> SegmentDrafts:
        self._check(scored)
        if self.context.sampler.greedy:
            limit = 1  # all candidates would be the same
        return self.pool.open_segment(until, limit, scored, passes)

    def reject(self, draft: Draft) -> Draft:
        return self.pool.reject(draft)

    async def keep_best(self) -> Draft:
        best = self.pool.best_rejected
        if best is None:
            raise CardsError("keep_best() has nothing to keep: reject() a draft of this segment first.")
        best.verdict = "best"
        await self.keep(best)
        return best

    async def keep(self, draft: Draft) -> None:
        if self.pool.error is not None:
            raise self.pool.error
        alone = draft in self.pool.examined
        for kept, examined in self.pool.keep(draft):
            self._append(kept, examined)
            if alone:
                self.acceptance_rate.update(len(examined), draft.verdict == "accepted")

    async def grow(
        self,
        parents: Sequence[Draft | None],
        until: Boundary,
        scored: bool = True,
        ranks: Sequence[int] | None = None,
    ) -> list[Draft]:
        self._check(scored)
        return await self.pool.grow(parents, until, scored, ranks)

    def give_up(self, draft: Draft) -> None:
        self.pool.give_up(draft)

    def _check(self, scored: bool) -> None:
        """Refuse to draft what could not be kept or scored."""
        if self.pool.error is not None:
            raise self.pool.error
        if self.finished:
            raise CardsError(
                "The answer is finished: a decoding method drafts until `session.finished`, and no further."
            )
        if scored:
            self._score_queue()

    # --- what the engine does ---

    async def write(self, decoding: Decoding) -> None:
        """Let a method write the answer.

        Raises:
            CardsError: The method ended before the answer did.
        """
        await decoding.generate(self)
        if not self.finished:
            raise CardsError(
                f"The decoding method {decoding.method!r} ended before the answer did: it drafts and keeps until "
                "`session.finished`."
            )

    @property
    def seconds_to_score(self) -> StepTimes:
        """Seconds for which the reward model keeps the language model's device busy, by the number of tokens."""
        return FREE if self.reward_model is None else self.reward_model.step_times or FREE

    @property
    def can_be_preempted(self) -> bool:
        """True if it holds rows that can be freed: no reward waits for it, and the reward model is not reading them."""
        return not self.depth and (not self.preempted or self._can_free_reward)

    @property
    def _can_free_reward(self) -> bool:
        return not self._reward_freed and self.scores is not None and not self.scores.under_way

    def preempt(self) -> None:
        """Free the rows; nothing is drafted or scored until `resume`."""
        if not self.preempted and isinstance(self.host.language_model, StepwiseModel):
            self.host.language_model.preempt(self.context)
            log.info("request %s: preempted, for the caches are full", self.request_id)
        self.preempted = True
        if self.reward_model is not None and self._can_free_reward:
            self._reward_freed = True
            with self.pool.own_errors():
                self.reward_model.preempt(self.conversation)

    def resume(self) -> None:
        """Go on: what was kept and drafted will be read again."""
        if isinstance(self.host.language_model, StepwiseModel):
            self.host.language_model.resume(self.context)
        if self.reward_model is not None and self._reward_freed:
            with self.pool.own_errors():
                self.reward_model.resume(self.conversation)
        self.preempted = self._reward_freed = False

    def fail(self, error: Exception) -> None:
        """Let everything that the method awaits, now or later, raise this error."""
        self.pool.fail(error)
        if self.scores is not None:
            self.scores.fail(error)

    def close(self) -> None:
        """Free the rows, whatever that raises; nothing of this request is computed any more."""
        with ExitStack() as closing:
            if self.reward_model is not None:
                closing.callback(self.reward_model.close, self.conversation)
            closing.callback(self.host.language_model.close, self.context)
            if self.scores is not None:
                closing.callback(self.scores.cancel)
            self.pool.close()

    def rescored(self, response: Response, reward: float) -> None:
        """Set the reward of an answer that was cut, and is scored again."""
        self.segments[-1] = replace(self.segments[-1], reward=reward, parts=response.parts)

    def response(self) -> Response:
        """Return the finished answer, to be scored as a whole."""
        context, log_p = self.context, self.pool.log_likelihood
        return Response(self.conversation, context.text, list(context.ids), log_p, finished=True)

    def alignment(
        self, method: str, began: float, guidance: Guidance | None = None, thinking: Thinking | None = None
    ) -> Alignment:
        """Return the finished answer with its trace.

        Args:
            method: Name of the decoding method.
            began: When the request began, in seconds of `time.perf_counter`.
            guidance: What the rewards were compared with.
            thinking: The thoughts before the answer.
        """
        context = self.context
        assert self.finish is not None  # a method goes on until then
        context.usage.completion_tokens = len(context.ids)
        context.usage.seconds = time.perf_counter() - began
        parsed = self._reader.parse(context.text)
        return Alignment(
            text=context.text,
            token_ids=tuple(context.ids),
            prompt_ids=tuple(context.prompt_ids),
            reward=self.segments[-1].reward,
            segments=tuple(self.segments),
            kept_at=tuple(kept - began for kept, _ in zip(self.kept_at, self.segments, strict=False)),
            usage=context.usage,
            finish_reason=self.finish,
            log_likelihood=self.pool.log_likelihood,
            seed=self.seed,
            prompt_reward=self._prompt_reward,
            model=self.host.language_model.name,
            method=method,
            guidance=guidance,
            plan=self.plan,
            thinking=thinking,
            request_id=self.request_id,
            content=parsed.content,
            tool_calls=tuple(call for call in parsed.calls if isinstance(call, ToolCall)),
            invalid_tool_calls=tuple(call for call in parsed.calls if isinstance(call, InvalidToolCall)),
            logprobs=self._logprobs(),
        )

    def _logprobs(self) -> tuple[TokenLogprob, ...]:
        """Return the kept tokens with their log p, if the request reports them."""
        if self.context.logprobs is None:
            return ()
        text_of, ids = self.host.language_model.chat.token_text, self.context.ids
        tops = self.pool.top or [()] * len(ids)
        return tuple(
            TokenLogprob(text_of(token), token, log_p, tuple(TokenLogprob(text_of(i), i, p) for i, p in top))
            for token, log_p, top in zip(ids, self.pool.log_p, tops, strict=True)
        )

    def _score_queue(self) -> ScoreQueue:
        if self.scores is None:
            raise RewardError("This decoding method needs a reward model: pass reward=.")
        return self.scores

    def _append(self, kept: PendingDraft, examined: dict[Draft, PendingDraft]) -> None:
        """Add a kept segment to the trace, and stream it."""
        draft, candidate = kept.draft, kept.candidate
        assert draft is not None
        self.finish = candidate.finish
        drafts = tuple(_traced(each, pending) for each, pending in examined.items())
        reward = draft.reward if kept.response else None
        segment = Segment(draft.text, tuple(candidate.ids), reward, draft.threshold, drafts, kept.parts)
        self.segments.append(segment)
        self.kept_at.append(time.perf_counter())
        log.debug(
            "request %s: segment %d, %d drafts, reward %s, %d tokens: %r", self.request_id, len(self.segments),
            len(drafts), reward, draft.end, draft.text,
        )  # fmt: skip
        if self.finish == "length" and self.context.whole_sentences:
            self._cut()
        self._stream(segment)

    def _cut(self) -> None:
        """Cut the answer after its last whole sentence."""
        context, chat = self.context, self.host.language_model.chat
        found = cut_after_sentence(context.text, context.ids, lambda ids: chat.decode(ids, context.start))
        if found is None:
            return
        self.cut = True
        context.text, length = found
        del context.ids[length:]
        self.pool.cut(length)
        self.segments = _cut_segments(self.segments, context.text, length)

    def _stream(self, segment: Segment) -> None:
        """Emit the text that no later token can take back: no part of a character or of a stop string."""
        if self._emit is None:
            return
        text = self.context.text
        if not self.finished:
            text = text.rstrip(PARTIAL_CHARACTER)
            text = text[: len(text) - self.context.stop.held_back(text)]
            text = certain_sentences(text) if self.context.whole_sentences else text
        text, calls = self._reader.update(text, self.finished)
        self._emit(Chunk(text, segment, len(self.segments) - 1, calls))


def _cut_segments(segments: Sequence[Segment], text: str, tokens: int) -> list[Segment]:
    """Return the segments of an answer that was cut to this text and so many tokens."""
    found: list[Segment] = []
    for segment in segments:
        if tokens <= 0:
            break
        found.append(replace(segment, text=segment.text[: len(text)], token_ids=segment.token_ids[:tokens]))
        text, tokens = text[len(segment.text) :], tokens - len(segment.token_ids)
    return found


def _traced(draft: Draft, pending: PendingDraft) -> DraftTrace:
    reward = None if draft.verdict == "unscored" else draft.reward
    ids, before = tuple(pending.candidate.ids), pending.parent
    parent = None if before is None or before.kept else before.candidate.index
    return DraftTrace(draft.index, draft.text, ids, reward, draft.threshold, draft.verdict, pending.parts, parent)
