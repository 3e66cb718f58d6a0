"""The worker of an engine: it loads the models and answers all requests, in one thread.

Every request is a task of the event loop, which runs the coroutine of its decoding method. One more task drives the
models, a step at a time. So methods, models and requests share one thread and need no lock.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from cards_integrations.chat.grammar import Grammar
from cards_integrations.chat.message import Message
from cards_integrations.chat.stop_strings import StopStrings
from cards_integrations.chat.template import ChatTokenizer, as_text
from cards_integrations.chat.tool_reader import ToolReader
from cards_integrations.decoding.base import Scale
from cards_integrations.decoding.sampling import Sampling
from cards_integrations.engine.admission import Admission, check_length, time_limit
from cards_integrations.engine.channel import Channels
from cards_integrations.engine.idle import IdleMoments
from cards_integrations.engine.inspection import CacheState, EngineState
from cards_integrations.engine.loop_thread import LoopThread
from cards_integrations.engine.preemption import cache_needs
from cards_integrations.engine.request import Chunk, EngineSettings, Request
from cards_integrations.engine.scales import TRIAL, KnownScale, Scales, remember
from cards_integrations.engine.scheduler import BestPerSecond
from cards_integrations.engine.session import Session
from cards_integrations.engine.step_loop import StepLoop
from cards_integrations.engine.telemetry import request_span
from cards_integrations.engine.thinking import Thinker, render
from cards_integrations.errors import CardsError, EngineClosed, ModelError, SettingsError, said
from cards_integrations.models.base import ConstrainedModel, Context, LanguageModel, LogitsReader, StateReader
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.randomness import fresh_seed
from cards_integrations.models.sources import ModelSource, build_model, source_name
from cards_integrations.progress import Advance, answering, phase, shown
from cards_integrations.rewards.base import Conversation, Response, Reward, RewardModel, scores
from cards_integrations.rewards.loader import RewardLoader
from cards_integrations.threads import ended_before_exit, in_thread, retrieve_error
from cards_integrations.trace import Alignment, Usage
from cards_integrations.transformer.free_memory import free_memory
from cards_integrations.transformer.kv_memory import KVMemory, budget
from cards_integrations.transformer.step_times import StepTimes
from cards_integrations.uncertainty import Measure, uncertainty

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
P = ParamSpec("P")
OnDone = Callable[[int, Alignment | Exception], None]
"""Called with the index of a request of a batch that has ended, and its answer or error."""
LONG = 100_000  # characters of a text that takes longer to tokenize than a step takes
MAX_PLAIN = 8  # sets of prompts whose plain answers are kept
log = logging.getLogger("cards_integrations")


def retrieved(work: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Mark the error of a coroutine as retrieved: asyncio would report it as lost if the caller has gone."""

    @wraps(work)
    async def run(*args: P.args, **options: P.kwargs) -> T:
        if task := asyncio.current_task():
            task.add_done_callback(retrieve_error)
        return await work(*args, **options)

    return run


class Worker(LoopThread):
    """The engine's thread and everything that lives in it, until `stop`.

    Args:
        model: The language model to load.
        settings: The settings of the machine.
        progress: Whether loading shows its progress.
    """

    def __init__(self, model: ModelSource, settings: EngineSettings, progress: bool = True) -> None:
        super().__init__("cards-engine")
        self.model = model
        self.progress = progress
        self.settings = settings
        self.failed = False
        self.loaded: Future[LanguageModel] = Future()
        self.loader: ModelLoader
        self.rewards: RewardLoader
        self.language_model: LanguageModel
        self.steps: StepLoop
        self.admission: Admission
        self.scales = Scales(model, self._rewards_of_plain_answers)
        self.idle = IdleMoments(self._step_times)
        self._plain: dict[tuple[Any, ...], list[Alignment]] = {}
        self.start()

    # --- the thread ---

    def _begin(self) -> None:
        self._loading = self.loop.create_task(self._load())

    def _give_up(self, error: CardsError) -> None:
        """Serve nobody any more: the next request starts another worker."""
        self.error = error
        self.failed = True

    def _ended(self) -> None:
        if not self.loaded.done():
            self.loaded.set_exception(EngineClosed("The engine was closed while the model was loaded."))
        elif not self.failed:
            self.loader.release()

    # --- loading ---

    async def _load(self) -> None:
        """Load the models in another thread, so that time limits hold and the interpreter can exit meanwhile."""
        try:
            with shown(self.progress), phase(f"loading {source_name(self.model)}"):
                await in_thread(self._build)
        except Exception as error:
            self.failed = True  # the next request tries again
            self.error = error if isinstance(error, CardsError) else ModelError(said(error))
            self.loaded.set_exception(self.error)
        else:
            self.admission = Admission(self.settings.max_rows, self.memory, self.steps.preemption)
            self.loaded.set_result(self.language_model)
            self._driver = self.loop.create_task(self.steps.run())

    def _build(self) -> None:
        with ended_before_exit():
            self.loader = ModelLoader(self.settings, self._kv_memory)
            self.language_model = build_model(self.model, self.loader, self._wake)
            self.rewards = RewardLoader(self.loader)
            self.steps = StepLoop(self.language_model, self.settings.width, self.memory, self._give_up)

    def _kv_memory(self, device: torch.device) -> KVMemory:
        limit = budget(self.settings.kv_memory, device)
        return KVMemory(limit, self.settings.prefix_reuse, partial(free_memory, device))

    def _wake(self) -> None:
        self.steps.wake()

    @property
    def memory(self) -> KVMemory:
        """The budget of the caches of all models."""
        memory = self.loader.memory
        assert memory is not None  # its budget was given
        return memory

    # --- answering ---

    @retrieved
    async def answer(
        self, request: Request, emit: Callable[[Chunk], None] | None = None, in_batch: bool = False, told: bool = False
    ) -> Alignment:
        """Answer one request.

        Args:
            request: What to answer.
            emit: Called in this thread with each kept segment.
            in_batch: Do not count the wait for a row, behind others of the same batch, in the time limit.
            told: Whether the caller is told when it ends, and so needs no other progress.
        """
        with request_span(request, source_name(self.model), emit) as span:
            return span.end(await self._answer(request, span.emit, in_batch, not told and emit is None))

    @retrieved
    async def answer_all(
        self, requests: Sequence[Request], on_done: OnDone | None = None, return_exceptions: bool = False
    ) -> list[Any]:
        """Answer requests that begin at the same moment.

        Args:
            requests: What to answer.
            on_done: Called in this thread with the index of each request that ends, and its answer or error.
            return_exceptions: Return errors in place of answers; otherwise the first error cancels the rest.
        """
        told = on_done is not None
        tasks = [self.loop.create_task(self.answer(request, in_batch=True, told=told)) for request in requests]
        if on_done is not None:
            for index, task in enumerate(tasks):
                task.add_done_callback(partial(_report, on_done, index))
        try:
            async with self._serving():
                return await asyncio.gather(*tasks, return_exceptions=return_exceptions)
        finally:
            for task in tasks:
                task.cancel()

    @retrieved
    async def score_texts(
        self, reward: Reward, prompt: str | list[Message], texts: list[str], context: tuple[str, ...] = ()
    ) -> list[float]:
        """Return the rewards of finished answers to one prompt."""
        async with self._serving(), self.rewards.lease(await self.scales.standardised(reward)) as reward_model:
            chat = self.language_model.chat
            conversation = Conversation(chat.without_tools(prompt), Usage(), context)
            characters = len(as_text(prompt)) + sum(map(len, texts))
            tokens = await _unblocking(characters, _tokens_of, chat, prompt, texts)
            async with self._open_to_score(reward_model, conversation, tokens):
                return await scores(reward_model, [Response(conversation, text, finished=True) for text in texts])

    @retrieved
    async def uncertainties(self, measure: Measure, answers: Sequence[Alignment]) -> list[list[float]]:
        """Return the predictive uncertainty before each token of these answers."""
        async with self._serving():
            model = self.language_model
            if not isinstance(model, LogitsReader):
                raise ModelError("Logits of whole answers are read by a local model only: leave segment_length out.")
            found = []
            for answer in answers:
                logits = model.read(answer.prompt_ids, answer.token_ids)
                found.append(uncertainty(measure, logits, logits.log_softmax(-1)).tolist())
                await asyncio.sleep(0)  # others take a step
            return found

    @retrieved
    async def states(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[torch.Tensor]:
        """Return the language model's hidden states after each prompt, and after each token of its answer."""
        async with self._serving():
            model = self.language_model
            if not isinstance(model, StateReader):
                raise ModelError(f"Hidden states are read from a local model: {model.name!r} has none. Use LocalModel.")
            found = []
            for prompt_ids, ids in texts:
                found.append(model.read_states(prompt_ids, ids).cpu())
                await asyncio.sleep(0)  # others take a step
            return found

    async def inspect(self) -> EngineState:
        """Return what lives here now."""
        tasks = len(asyncio.all_tasks()) - 1  # without this one
        if not self.loaded.done() or self.failed:
            return EngineState("failed" if self.failed else "loading", tasks=tasks)
        stepwise, memory = self.steps.stepwise, self.memory
        return EngineState(
            status="ready",
            requests=len(self.steps.live),
            scoring=self.steps.scoring.calls,
            tasks=tasks,
            caches=tuple(map(CacheState.of, memory.caches)),
            memory_limit=memory.limit,
            cached_prefixes=memory.prefix_lengths,
            prefix_bytes=memory.prefix_bytes,
            rewards=tuple(model.name for model in self.rewards.built.values()),
            preempted=self.steps.preemption.count,
            measured_scales=self.scales.measured,
            steps=stepwise.steps if stepwise else 0,
            forwards=stepwise.forwards if stepwise else 0,
            tokens=stepwise.tokens if stepwise else 0,
            step_seconds=self.steps.measured_times,
        )

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[None]:
        """Wait until the model is loaded, and turn what ends a call from outside into errors for its caller."""
        try:
            await asyncio.shield(self._loading)
            if self.error is not None:
                raise self.error
            yield
        except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:  # would end this thread
            raise ModelError(f"The request raised {said(error)}") from error
        except asyncio.CancelledError:
            if self.stopping:
                raise EngineClosed("The engine was closed while the request ran.") from None
            task = asyncio.current_task()
            if task is not None and not task.cancelling():  # nobody has cancelled it
                raise ModelError("The request raised CancelledError, and nobody had cancelled it.") from None
            raise

    async def _answer(
        self, request: Request, emit: Callable[[Chunk], None] | None, in_batch: bool, progress: bool
    ) -> Alignment:
        whole, each = (None, request.timeout) if in_batch else (request.timeout, None)
        async with time_limit(whole), self._serving(), AsyncExitStack() as leased:
            request = self._plain_if_unguided(request)
            async with time_limit(each):
                reward_model, scale = await leased.enter_async_context(self._reward_model(request))
            with answering(wanted=progress) as advance:
                async with self.admission.row(), time_limit(each):
                    answer = await self._decode(request, reward_model, scale, emit)
                advance()
                return answer

    def _plain_if_unguided(self, request: Request) -> Request:
        """Return the request, without its reward if that has no signal for it."""
        prompt = self.language_model.chat.without_tools(request.prompt)
        if request.reward is None or request.reward.has_signal_for(Conversation(prompt, Usage(), request.context)):
            return request
        log.info("reward %r has no signal for this prompt: writing a plain answer", request.reward.name)
        return replace(request, decoding=Sampling(), reward=None)

    @asynccontextmanager
    async def _reward_model(self, request: Request) -> AsyncIterator[tuple[RewardModel | None, KnownScale | None]]:
        """Hold the reward model of a request, with its scale if the method asks for it, inside the block."""
        self.idle.enter()
        try:
            if request.reward is None or not request.decoding.needs_reward:
                yield None, None
                return
            settings = await self.scales.standardised(request.reward)
            async with self.rewards.lease(settings, timed=self.settings.width == "auto") as model:
                yield model, await self.scales.known(request.reward) if request.decoding.needs_scale else None
        finally:
            self.idle.leave()

    def _step_times(self) -> list[StepTimes]:
        """Return the step times by which drafting and scoring are planned now."""
        scheduler = self.steps.scheduler
        own = [scheduler.times] if isinstance(scheduler, BestPerSecond) else []
        return [*own, *self.rewards.step_times]

    async def _decode(
        self,
        request: Request,
        reward: RewardModel | None,
        known: KnownScale | None,
        emit: Callable[[Chunk], None] | None,
    ) -> Alignment:
        began, method = time.perf_counter(), request.decoding.method
        scale, origin = known or (None, None)
        model = self.language_model
        prompt = await _unblocking(len(as_text(request.prompt)), render, request, model.chat)
        check_length(len(prompt.ids), request.max_tokens, model.context_window)
        seed = fresh_seed() if request.seed is None else request.seed
        open_session = partial(self._session, Usage(prompt_tokens=len(prompt.ids)), reward, scale)
        thinker = Thinker(request, model.chat, model.context_window, open_session, emit)
        channels = Channels(model.chat, isinstance(model, ConstrainedModel), open_session)
        begun = await channels.enter(await thinker.think(prompt, seed), seed)
        async with open_session(begun.request, begun.ids, seed, True, emit) as session:
            log.info(
                "request %s: %s, prompt of %d tokens, seed %d",
                session.request_id, method, len(session.context.prompt_ids), session.seed,
            )  # fmt: skip
            try:
                await session.write(request.decoding)
            except BaseException as error:
                log.info("request %s: ended by %s", session.request_id, said(error))
                raise
        if session.cut and reward is not None and session.segments[-1].reward is not None:
            await self._score_again(session, reward)
        guidance = request.decoding.guidance(scale, origin)
        answer = session.alignment(method, began, guidance, begun.thinking)
        usage = answer.usage
        log.info(
            "request %s: %s after %d tokens, %d drafts of %d tokens, %.2f s", answer.request_id, answer.finish_reason,
            usage.completion_tokens, usage.drafts, usage.drafted_tokens, usage.seconds,
        )  # fmt: skip
        if answer.out_of_reach:
            log.info("request %s: no candidate was accepted: the target is out of reach", answer.request_id)
        return answer

    async def _score_again(self, session: Session, reward: RewardModel) -> None:
        """Score an answer again that was cut after its last segment had been scored."""
        response, context = session.response(), session.context
        tokens = len(context.prompt_ids) + len(context.ids)
        async with self._open_to_score(reward, session.conversation, tokens):
            session.rescored(response, *await scores(reward, [response]))

    @asynccontextmanager
    async def _open_to_score(self, reward: RewardModel, conversation: Conversation, tokens: int) -> AsyncIterator[None]:
        """Keep a conversation of so many tokens open inside the block, so that its whole answers can be scored."""
        async with self.admission.memory_to_score(reward.cache_needs(conversation, tokens)):
            reward.open(conversation)
        try:
            yield
        finally:
            reward.close(conversation)
            self.admission.scored()

    @asynccontextmanager
    async def _session(
        self, usage: Usage, reward: RewardModel | None, scale: Scale | None,
        request: Request, prompt_ids: list[int], seed: int, guided: bool, emit: Callable[[Chunk], None] | None,
    ) -> AsyncIterator[Session]:  # fmt: skip
        """Open a session as soon as there is memory for it; it is live inside the block."""
        chat = self.language_model.chat
        reward = reward if guided else None
        check_length(len(prompt_ids), request.max_tokens, self.language_model.context_window)
        context = self._context(request, prompt_ids, usage)
        conversation = Conversation(chat.without_tools(request.prompt), usage, request.context)
        needs = partial(cache_needs, self.steps.stepwise, context, conversation, reward)
        async with self.admission.memory(needs(), needs(whole=True)):
            if self.error is not None:
                raise self.error  # set while this request waited
            reader = ToolReader(request.tools, chat.tool_format)
            session = Session(self.steps, context, seed, conversation, reward, scale, emit, reader)
            self.memory.evict_for(0)
            self.steps.live[context] = session
        try:
            yield session
        finally:
            del self.steps.live[context]
            session.close()
            self.steps.memory_freed()

    def _context(self, request: Request, prompt_ids: list[int], usage: Usage) -> Context:
        chat, grammar = self.language_model.chat, request.grammar
        stop = self._stop_strings(request)
        start = chat.answer_start(request.prompt, prompt_ids, stop.strings)
        context = Context(request.prompt, prompt_ids, request.max_tokens, request.sampler, stop, usage, start=start)
        context.logprobs = request.logprobs
        context.whole_sentences = request.finish_at == "sentence" and grammar is None and request.tools is None
        if request.tools is not None:
            grammar = chat.tool_format.grammar(request.tools, chat.grammar_literal, grammar)
        if grammar is not None:
            context.matcher = self._constrained(grammar).matcher(grammar)
        return context

    def _stop_strings(self, request: Request) -> StopStrings:
        """Return the strings that end the answer; none do within a grammar or a call, whose parts are no answers."""
        tools = request.tools
        if request.grammar is not None or (tools is not None and tools.forced):
            return StopStrings()
        reader = ToolReader(tools, self.language_model.chat.tool_format)
        return StopStrings(request.stop, None if tools is None else reader.in_call)

    def _constrained(self, grammar: Grammar) -> ConstrainedModel:
        model = self.language_model
        if not isinstance(model, ConstrainedModel):
            raise SettingsError(
                "Grammars, response formats and enforced tool calls need a local model: a server does not go on with "
                "a grammar from one segment to the next. Use LocalModel, or tool_choice='auto'."
            )
        return model

    async def _rewards_of_plain_answers(self, reward: Reward) -> list[float]:
        """Return a reward for a plain answer to each of the prompts that suit the reward."""
        with phase(f"measuring the scale of reward {reward.name!r}, once", len(reward.prompts)) as advance:
            return await self._scored_plain_answers(reward, advance)

    async def _scored_plain_answers(self, reward: Reward, advance: Advance) -> list[float]:
        prompts = tuple(reward.prompts)
        answers = self._plain.get(prompts)
        if answers is None:
            (prompt, context), length = prompts[0], min(64, self.language_model.context_window // 4)
            await self.score_texts(reward, prompt, [TRIAL], context)  # a reward that always fails, fails here
            answers = await self.answer_all(
                [
                    Request(p, Sampling(), max_tokens=length, seed=seed, thinking="off")
                    for seed, (p, _) in enumerate(prompts)
                ],
                lambda index, answer: advance(),
            )
            remember(self._plain, prompts, answers, MAX_PLAIN)
        found = []
        for (prompt, context), answer in zip(prompts, answers, strict=True):
            found += await self.score_texts(reward, prompt, [answer.text], context)
        return found


async def _unblocking(characters: int, work: Callable[..., T], *args: Any) -> T:
    """Call a function that reads so many characters of text: in a thread if they are many, so that others go on."""
    return await in_thread(work, *args) if characters > LONG else work(*args)


def _tokens_of(chat: ChatTokenizer, prompt: str | list[Message], texts: Sequence[str]) -> int:
    """Return how many tokens a prompt and answers to it have."""
    return len(chat.prompt(prompt)[1]) + sum(len(chat.encode(text)) for text in texts)


def _report(on_done: OnDone, index: int, task: asyncio.Task[Alignment]) -> None:
    """Call `on_done` for a request of a batch that has ended, unless it was cancelled."""
    error = asyncio.CancelledError() if task.cancelled() else task.exception()
    if not isinstance(error, asyncio.CancelledError):
        on_done(index, error if isinstance(error, Exception) else task.result())
