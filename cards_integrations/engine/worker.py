"""The worker of an engine: it loads the models and answers all requests, in one thread.

Every request is a task of the event loop, which runs the coroutine of its decoding method. One more task drives the
models, a step at a time. So methods, models and requests share one thread and need no lock.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from cards_integrations.chat.message import Message
from cards_integrations.decoding.sampling import Sampling
from cards_integrations.engine.admission import Admission, time_limit
from cards_integrations.engine.answer_writer import AnswerWriter
from cards_integrations.engine.idle import IdleMoments
from cards_integrations.engine.inspection import CacheState, EngineState
from cards_integrations.engine.loop_thread import LoopThread
from cards_integrations.engine.request import Chunk, EngineSettings, Request
from cards_integrations.engine.scale_store import remember
from cards_integrations.engine.scales import TRIAL, KnownScale, Scales
from cards_integrations.engine.scheduler import BestPerSecond
from cards_integrations.engine.step_loop import StepLoop
from cards_integrations.engine.telemetry import request_span
from cards_integrations.errors import CardsError, EngineClosed, ModelError, said
from cards_integrations.models.base import LanguageModel, LogitsReader, StateReader
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.sources import ModelSource, build_model, source_name
from cards_integrations.progress import Advance, answering, phase, shown
from cards_integrations.rewards.base import Conversation, Reward, RewardModel
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
        self.writer: AnswerWriter
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

    def _check(self) -> None:
        """Raise the error after which nobody is served any more, if there is one."""
        if self.error is not None:
            raise self.error

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
            self.writer = AnswerWriter(self.language_model, self.steps, self.admission, self.memory, self._check)
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
            return await self.writer.score(reward_model, prompt, texts, context)

    @retrieved
    async def uncertainties(self, measure: Measure, answers: Sequence[Alignment]) -> list[list[float]]:
        """Return the predictive uncertainty before each token of these answers."""
        async with self._serving():
            model = self.language_model
            if not isinstance(model, LogitsReader):
                raise ModelError("Logits of whole answers are read by a local model only: leave segment_length out.")
            found: list[list[float]] = []
            for answer in answers:
                found.append([])
                for logits in model.read(answer.prompt_ids, answer.token_ids):
                    found[-1] += uncertainty(measure, logits, logits.log_softmax(-1)).tolist()
                    await asyncio.sleep(0)  # others take a step
            return found

    @retrieved
    async def states(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[torch.Tensor]:
        """Return the language model's hidden states after each prompt, and after each token of its answer."""
        import torch

        async with self._serving():
            model = self.language_model
            if not isinstance(model, StateReader):
                raise ModelError(f"Hidden states are read from a local model: {model.name!r} has none. Use LocalModel.")
            found = []
            for prompt_ids, ids in texts:
                pieces = []
                for states in model.read_states(prompt_ids, ids):
                    pieces.append(states.cpu())
                    await asyncio.sleep(0)  # others take a step
                found.append(torch.cat(pieces))
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
            self._check()
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
                    answer = await self.writer.write(request, reward_model, scale, emit)
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


def _report(on_done: OnDone, index: int, task: asyncio.Task[Alignment]) -> None:
    """Call `on_done` for a request of a batch that has ended, unless it was cancelled."""
    error = asyncio.CancelledError() if task.cancelled() else task.exception()
    if not isinstance(error, asyncio.CancelledError):
        on_done(index, error if isinstance(error, Exception) else task.result())
