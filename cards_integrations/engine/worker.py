"""The engine's thread: all requests of a process in one batch.

It runs an asyncio loop. Every request is a task in it (its decoding method); one more task drives
the models: sample, score what has ended, let the methods react, forward. So methods, models and
requests share one thread and need no lock.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from cards_integrations.chat.grammar import Grammar
from cards_integrations.chat.message import Message
from cards_integrations.chat.stop_strings import StopStrings
from cards_integrations.chat.tool_reader import ToolReader
from cards_integrations.chat.tools import Tools
from cards_integrations.decoding.base import Decoding, Scale
from cards_integrations.decoding.sampling import Sampling
from cards_integrations.engine.draft_pool import Question
from cards_integrations.engine.scales import Scales
from cards_integrations.engine.scheduler import BestPerSecond, FixedWidth, Scheduler
from cards_integrations.engine.session import Chunk, Session
from cards_integrations.errors import (
    CardsError,
    CardsTimeout,
    EngineClosed,
    ModelError,
    OutOfMemory,
    PromptError,
    SettingsError,
)
from cards_integrations.models.base import Context, LanguageModel
from cards_integrations.models.local.loading import ModelLoader, Placement
from cards_integrations.models.randomness import fresh_seed
from cards_integrations.models.sampling import Sampler
from cards_integrations.models.sources import ModelSource
from cards_integrations.rewards.base import (
    Conversation,
    Response,
    Reward,
    RewardLoader,
    RewardModel,
    scores,
    scoring,
)
from cards_integrations.threads import in_thread
from cards_integrations.trace import Alignment, InvalidToolCall, ToolCall, Usage
from cards_integrations.transformer.kv_memory import CacheNeed, KVMemory, budget
from cards_integrations.uncertainty import Measure, uncertainty

T = TypeVar("T")
LAST = 10.0  # seconds that the end of the interpreter waits for a model that is being loaded
DRAFTS = 256  # columns that candidates may take beside the kept text
log = logging.getLogger("cards_integrations")


class EngineSettings(Placement):
    """What is about the machine, not the method.

    `width` is how many candidates a request drafts at once; "auto" drafts what pays, by the time
    that a step takes here and the running acceptance rate, ahead of open verdicts, too. No result
    depends on it. `max_rows` is how many requests run at once; more of them wait.

    `kv_memory` is for the KV caches of all models: bytes, or, up to 1, a fraction of what is free once
    the language model is loaded. Requests that do not fit wait. What live requests leave holds
    finished texts, and a prompt that begins like one of them is read from there on only;
    `prefix_reuse=False` reads everything anew.
    """

    width: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    max_rows: Annotated[int, Field(ge=1)] = 64
    kv_memory: Annotated[float, Field(gt=0)] = 0.5
    prefix_reuse: bool = True


@dataclass(frozen=True)
class Request:
    """One answer to be written."""

    prompt: str | list[Message]
    decoding: Decoding
    reward: Reward | None = None
    sampler: Sampler = field(default_factory=Sampler)
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    seed: int | None = None
    timeout: float | None = None
    context: tuple[str, ...] = ()
    grammar: Grammar | None = None
    tools: Tools | None = None


class Worker:
    """The thread, its loop, and everything that lives there. Ended by `stop`."""

    def __init__(self, model: ModelSource, settings: EngineSettings) -> None:
        self.model = model
        self.settings = settings
        self.failed = False
        self.loader: ModelLoader
        self.rewards: RewardLoader
        self.scheduler: Scheduler
        self.scales = Scales(model, self._plain_rewards)
        self._plain: dict[tuple[Any, ...], list[Alignment]] = {}
        self.live: dict[Session, None] = {}  # in order of arrival
        self._judging: set[asyncio.Task[None]] = set()
        self.error: CardsError | None = None
        self.loop = asyncio.new_event_loop()
        self.language_model: LanguageModel
        self.loaded: Future[LanguageModel] = Future()
        self._stopping = False
        self.thread = threading.Thread(target=self._main, name="cards-engine", daemon=True)
        atexit.register(self.stop)
        self.thread.start()

    # --- from any thread ---

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    async def answer_all(self, requests: Sequence[Request], done: Callable[[], None] | None = None) -> list[Alignment]:
        """Answers to all, begun at the same moment; the first error cancels the rest. `done` is called for each."""
        tasks = [self.loop.create_task(self.answer(request, None)) for request in requests]
        if done is not None:
            for task in tasks:
                task.add_done_callback(lambda _: done())
        try:
            async with self._at_work():
                return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def stop(self) -> None:
        """End the thread; whoever waits gets `EngineClosed`. Also runs at interpreter exit."""
        atexit.unregister(self.stop)
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._halt)
        if threading.current_thread() is not self.thread and self.thread.ident is not None:
            self.thread.join()

    # --- in the worker's thread ---

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        self._work = asyncio.Event()
        self._rows = asyncio.Semaphore(self.settings.max_rows)
        self._admission, self._left = asyncio.Lock(), asyncio.Event()
        self._loading = self.loop.create_task(self._load())
        try:
            self.loop.run_forever()
        finally:
            self.loop.run_until_complete(self._end())
            self.loop.close()
            if not self.loaded.done():
                self.loaded.set_exception(EngineClosed("The engine was closed while the model was loaded."))
            elif not self.failed:
                self.loader.release()

    async def _load(self) -> None:
        """In a thread of its own, so that time limits hold, and the interpreter can exit meanwhile."""
        try:
            await in_thread(self._build)
        except Exception as error:
            self.failed = True  # the next request tries again
            self.error = error if isinstance(error, CardsError) else ModelError(f"{type(error).__name__}: {error}")
            self.loaded.set_exception(self.error)
        else:
            self.loaded.set_result(self.language_model)
            self._driver = self.loop.create_task(self._drive())

    def _build(self) -> None:
        finish = partial(threading.current_thread().join, LAST)  # an interpreter that ends amid torch's code aborts
        atexit.register(finish)
        try:
            self.loader = ModelLoader(
                self.settings,
                lambda device: KVMemory(budget(self.settings.kv_memory, device), self.settings.prefix_reuse),
            )
            self.language_model = self.model.build(self.loader, self.wake)
            self.rewards = RewardLoader(self.loader)
            self.scheduler = self._schedule()
        finally:
            atexit.unregister(finish)

    @property
    def memory(self) -> KVMemory:
        """For the caches of all models."""
        memory = self.loader.memory
        assert memory is not None  # its budget was given
        return memory

    def _schedule(self) -> Scheduler:
        if self.settings.width != "auto":
            return FixedWidth(self.settings.width)
        return BestPerSecond(self.language_model.times)

    def _halt(self) -> None:
        self._stopping = True
        self.error = self.error or EngineClosed("The engine was closed.")
        self.loop.stop()

    async def _end(self) -> None:
        await asyncio.sleep(0)  # what was submitted last begins, so that it can say why it ends
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def answer(self, request: Request, emit: Callable[[Chunk], None] | None) -> Alignment:
        """One request, from its prompt to its alignment."""
        if task := asyncio.current_task():
            task.add_done_callback(_look_at)
        limit = asyncio.timeout(request.timeout)
        try:
            async with limit, self._at_work():
                request = self._plain_if_unguided(request)
                reward, scale = await self._guide(request)
                async with nullcontext() if scoring.get() else self._rows:
                    return await self._answer(request, reward, scale, emit)
        except TimeoutError:
            if not limit.expired():
                raise
            raise CardsTimeout(f"No answer within timeout={request.timeout} seconds.") from None

    @asynccontextmanager
    async def _at_work(self) -> AsyncIterator[None]:
        """Once the model is loaded; what a caller is told where it is not, or the engine is closed meanwhile."""
        try:
            await asyncio.shield(self._loading)
            if self.error is not None:
                raise self.error
            yield
        except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:  # would end this thread
            raise ModelError(f"The request raised {type(error).__name__}: {error}") from error
        except asyncio.CancelledError:
            if self._stopping:
                raise EngineClosed("The engine was closed while the request ran.") from None
            raise

    def _plain_if_unguided(self, request: Request) -> Request:
        """As it is, or without a reward that has nothing to say about it."""
        prompt = self.language_model.chat.without_tools(request.prompt)
        if request.reward is None or request.reward.has_signal_for(Conversation(prompt, Usage(), request.context)):
            return request
        log.info("reward %r does not apply: a plain answer", request.reward.name)
        return replace(request, decoding=Sampling(), reward=None)

    async def _guide(self, request: Request) -> tuple[RewardModel | None, Scale | None]:
        """The reward model of a request, and its scale if the method asks for it."""
        if request.reward is None or not request.decoding.needs_reward:
            return None, None
        settings = await self.scales.standardised(request.reward)
        model = self.rewards[settings]
        return model, await self.scales.of(request.reward) if request.decoding.needs_scale else None

    async def _plain_rewards(self, reward: Reward) -> list[float]:
        """Rewards of plain answers, as many as there are prompts."""
        prompts = tuple(reward.prompts)
        if prompts not in self._plain:
            length = min(64, self.language_model.context_window // 4)
            self._plain[prompts] = await self.answer_all(
                [Request(p, Sampling(), max_tokens=length, seed=seed) for seed, (p, _) in enumerate(prompts)]
            )
        found = []
        for (prompt, context), answer in zip(prompts, self._plain[prompts], strict=True):
            found += await self.score_texts(reward, prompt, [answer.text], context)
        return found

    async def _answer(
        self, request: Request, reward: RewardModel | None, scale: Scale | None, emit: Callable[[Chunk], None] | None
    ) -> Alignment:
        began = time.perf_counter()
        model = self.language_model
        chat, tools, grammar = model.chat, request.tools, request.grammar
        _, prompt_ids = chat.prompt(request.prompt, tools)
        self._check_room(request, len(prompt_ids))
        usage = Usage(prompt_tokens=len(prompt_ids))
        stop, seed = StopStrings(request.stop), fresh_seed() if request.seed is None else request.seed
        context = Context(request.prompt, prompt_ids, request.max_tokens, request.sampler, stop, usage)
        if tools is not None:
            grammar = chat.tool_format.grammar(tools, chat.grammar_literal, grammar)
        if grammar is not None:
            context.matcher = model.matcher(grammar)
        reader = ToolReader(tools, chat.tool_format)
        conversation = Conversation(chat.without_tools(request.prompt), usage, request.context)
        async with nullcontext() if scoring.get() else self._admission:
            tokens = len(prompt_ids) + request.max_tokens + DRAFTS
            needs = [*model.cache_needs(tokens), *(reward.cache_needs(conversation, tokens) if reward else [])]
            await self._memory_for(needs)
            if self.error is not None:
                raise self.error  # while it waited
            session = Session(self, context, seed, conversation, reward, scale, emit, reader)
            for cache, _, columns in needs:
                cache.reserve(columns)
            self.live[session] = None
        told = session.request_id
        log.info("request %s: %s, prompt of %d tokens, seed %d", told, request.decoding.method, len(prompt_ids), seed)
        try:
            await request.decoding.generate(session)
        except BaseException as error:
            log.info("request %s: ended by %s: %s", told, type(error).__name__, error)
            raise
        finally:
            del self.live[session]
            session.close()
            self._left.set()
        usage.completion_tokens = len(context.ids)
        usage.seconds = time.perf_counter() - began
        assert session.finish is not None
        log.info(
            "request %s: %s after %d tokens, %d drafts of %d tokens, %.2f s",
            told, session.finish, usage.completion_tokens, usage.drafts, usage.drafted_tokens, usage.seconds,
        )  # fmt: skip
        parsed = reader.parse(context.text)
        return Alignment(
            text=context.text,
            token_ids=tuple(context.ids),
            prompt_ids=tuple(prompt_ids),
            reward=session.segments[-1].reward,
            segments=tuple(session.segments),
            usage=usage,
            finish_reason=session.finish,
            log_likelihood=session.log_likelihood,
            seed=seed,
            prompt_reward=session.prompt_score,
            model=model.name,
            method=request.decoding.method,
            request_id=told,
            content=parsed.content,
            tool_calls=tuple(call for call in parsed.calls if isinstance(call, ToolCall)),
            invalid_tool_calls=tuple(call for call in parsed.calls if isinstance(call, InvalidToolCall)),
        )

    async def _memory_for(self, needs: list[CacheNeed]) -> None:
        """Wait, first come first served, until the caches have room for one more request.

        One that a reward makes cannot wait: those that hold the room wait for the reward.
        """
        while not self.memory.admits(needs):
            if not self.live or scoring.get():
                raise OutOfMemory(
                    f"A request of {needs[0][2]} tokens needs more than the {self.memory.limit / 2**20:,.1f} MiB of "
                    "EngineSettings.kv_memory: use a shorter prompt, a smaller max_tokens, or more kv_memory."
                )
            self._left.clear()
            await self._left.wait()

    def _check_room(self, request: Request, prompt_tokens: int) -> None:
        window = self.language_model.context_window
        if prompt_tokens >= window:
            raise PromptError(f"The prompt has {prompt_tokens} tokens, and the model's context is {window}.")
        if prompt_tokens + request.max_tokens > window:
            raise SettingsError(
                f"max_tokens={request.max_tokens} does not fit: the prompt has {prompt_tokens} tokens, and the "
                f"model's context is {window}; the most that fits is {window - prompt_tokens}."
            )

    async def score_texts(
        self, reward: Reward, prompt: str | list[Message], texts: list[str], context: tuple[str, ...] = ()
    ) -> list[float]:
        """Rewards of finished answers to one prompt."""
        async with self._at_work():
            model = self.rewards[await self.scales.standardised(reward)]
            conversation = Conversation(self.language_model.chat.without_tools(prompt), Usage(), context)
            model.open(conversation)
            try:
                return await scores(model, [Response(conversation, text, finished=True) for text in texts])
            finally:
                model.close(conversation)
                self._left.set()

    async def uncertainties(self, measure: Measure, answers: Sequence[Alignment]) -> list[list[float]]:
        async with self._at_work():
            found = []
            for answer in answers:
                logits = self.language_model.read(answer.prompt_ids, answer.token_ids)
                found.append(uncertainty(measure, logits, logits.log_softmax(-1)).tolist())
                await asyncio.sleep(0)  # others take a step
            return found

    def wake(self) -> None:
        self._work.set()

    async def _drive(self) -> None:
        """Sample, score what has ended, let the methods react, forward; for ever."""
        while True:
            await self._work.wait()
            try:
                turns = self._step()
            except BaseException as error:  # SystemExit would end this thread
                try:
                    self._fail(error)
                except BaseException as again:
                    return self._give_up(again)
                turns = 0
            if turns == 0:
                self._work.clear()
            for _ in range(max(1, turns)):
                await asyncio.sleep(0)

    def _step(self) -> int:
        """One forward, or what has to come before it; returns for how many turns of the loop others go on."""
        self._tell_failed()
        if self._sample():
            return 1  # the methods that asked for no reward; others may begin in place of what ended
        chosen = self.scheduler.candidates(self.live)
        if self._sample():
            return 1
        questions = [question for session in self.live for question in session.questions]
        idle = not self.language_model.unread(chosen)
        if questions and (idle or self.scheduler.score_now(questions, len(self.live))):
            self._put(questions)
            return 2  # the rewards score, and then the methods react
        if idle:
            return 0
        self.language_model.forward(chosen)
        self._tell_failed()
        return 1

    def _tell_failed(self) -> None:
        """Requests that the language model cannot go on with."""
        for session in [s for s in self.live if s.context in self.language_model.failed]:
            session.fail(self.language_model.failed.pop(session.context))

    def _sample(self) -> bool:
        """Has a candidate ended?"""
        ended = self.language_model.sample()
        for candidate in ended:
            drafts, pending = candidate.waiter
            drafts.ended(pending)
        return bool(ended)

    def _put(self, questions: list[Question]) -> None:
        """Put questions to their reward models; to one that can take them, those of all requests at once."""
        groups: dict[tuple[RewardModel, Session | None], list[Question]] = {}
        for question in questions:
            judge, asking = question.judge, question.session
            groups.setdefault((judge, None if judge.across_requests else asking), []).append(question)
            asking.questions = []
        for (judge, session), group in groups.items():
            context = None if session is None else session.caller.copy()  # functions see what whoever asked has set
            task = self.loop.create_task(self._judge(judge, group), context=context)
            self._judging.add(task)  # the loop itself holds tasks weakly
            task.add_done_callback(self._judging.discard)
            for question in group:
                question.score.add_done_callback(partial(_unless_awaited, task, group))

    def _give_up(self, error: BaseException) -> None:
        """Nothing can be drafted any more: all are told, and the next request starts another worker."""
        self.error = ModelError(f"The engine cannot go on: {type(error).__name__}: {error}")
        self.failed = True
        for session in self.live:
            session.fail(self.error)

    def _fail(self, error: BaseException) -> None:
        """An error in a model's forward reaches every request in it; the next one finds clean rows."""
        log.exception("the language model failed")
        wrapped = ModelError(f"The language model failed: {type(error).__name__}: {error}")
        wrapped.__cause__ = error
        for session in self.live:
            session.fail(wrapped)
        self.language_model.reset()

    async def _judge(self, judge: RewardModel, group: list[Question]) -> None:
        """Score a group of responses; if that fails, each request alone, so that one harms no other."""
        group = [question for question in group if not question.score.done()]
        if not group:
            return  # all given up by now
        try:
            found = await scores(judge, [question.response for question in group])
        except Exception as error:
            for question in group:
                judge.drop(question.response)
            sessions = dict.fromkeys(question.session for question in group)
            if len(sessions) > 1:
                alone = [[question for question in group if question.session is one] for one in sessions]
                await asyncio.gather(*(self._judge(judge, questions) for questions in alone))
                return
            for question in group:
                if not question.score.done():
                    question.score.set_exception(error)
            return
        for question, value in zip(group, found, strict=True):
            if not question.score.done():
                question.score.set_result(value)
        self.wake()


def _look_at(task: asyncio.Task[Any]) -> None:
    """Its caller may have gone, and then nobody else looks at its error."""
    if not task.cancelled():
        task.exception()


def _unless_awaited(task: asyncio.Task[None], group: list[Question], _: asyncio.Future[float]) -> None:
    """End the scoring of what everybody has given up."""
    if all(question.score.done() for question in group):
        task.cancel()
