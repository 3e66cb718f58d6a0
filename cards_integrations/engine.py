"""The engine: loads once, runs all requests of a process in one batch, streams kept segments.

One worker thread runs an asyncio loop. Every request is a task in it (its decoding method); one
more task drives the models: sample, score what has ended, let the methods react, forward. So
methods, models and requests share one thread and need no lock, and callers may be on any thread or
event loop.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field

from cards_integrations.decoding.base import Decoding
from cards_integrations.errors import CardsError, CardsTimeout, EngineClosed, ModelError, PromptError, SettingsError
from cards_integrations.models.base import Context, Message
from cards_integrations.models.loading import LocalModel, ModelLoader, Placement
from cards_integrations.models.local import LocalLanguageModel
from cards_integrations.models.randomness import fresh_seed
from cards_integrations.models.sampling import Sampler
from cards_integrations.models.stops import StopStrings
from cards_integrations.rewards.base import Conversation, Response, Reward, RewardModel
from cards_integrations.session import Chunk, Pending, Session, score
from cards_integrations.trace import Alignment, Usage

T = TypeVar("T")
log = logging.getLogger("cards_integrations")


class EngineSettings(Placement):
    """What is about the machine, not the method.

    `width` is how many candidates a request may draft at once ("auto": what pays on the device,
    shared among the live requests); no result depends on it. `max_rows` is how many requests run at
    once; more of them wait.
    """

    width: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    max_rows: Annotated[int, Field(ge=1)] = 64


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


class Engine:
    """One language model and the reward models that guide it. Use `Engine.shared`."""

    _shared: ClassVar[dict[tuple[LocalModel, EngineSettings], Engine]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, model: LocalModel, settings: EngineSettings) -> None:
        self.model = model
        self.settings = settings
        self.owners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._worker: _Worker | None = None
        self._starting = threading.Lock()
        self._closed = False

    @classmethod
    def shared(cls, model: LocalModel, settings: EngineSettings, owner: Any = None) -> Engine:
        """The process's engine for these settings; nothing is loaded before the first request."""
        with cls._lock:
            engine = cls._shared.get((model, settings))
            if engine is None or engine._closed:
                engine = cls._shared[model, settings] = Engine(model, settings)
            if owner is not None:
                engine.owners[id(owner)] = owner
            return engine

    def run(self, request: Request) -> Alignment:
        """Block until the answer is written. Interrupting the wait cancels the request."""
        return self._wait(self._submit(request))

    def run_many(self, requests: Sequence[Request]) -> list[Alignment]:
        """Answers to all requests, drafted together; the first error cancels the rest."""
        futures = [self._submit(request) for request in requests]
        try:
            return [self._wait(future) for future in futures]
        finally:
            for future in futures:
                future.cancel()

    async def arun(self, request: Request) -> Alignment:
        """Like `run`, without blocking the event loop; cancelling the task cancels the request."""
        return await asyncio.wrap_future(self._submit(request))

    def stream(self, request: Request) -> Generator[Chunk | Alignment, None, None]:
        """A `Chunk` per kept segment, then the `Alignment`; closing the iterator stops the drafting."""
        inbox: queue.SimpleQueue[Chunk | Future[Alignment]] = queue.SimpleQueue()
        future = self._submit(request, inbox.put)
        future.add_done_callback(inbox.put)
        try:
            while not isinstance(item := inbox.get(), Future):
                yield item
            yield item.result()
        finally:
            future.cancel()

    async def astream(self, request: Request) -> AsyncGenerator[Chunk | Alignment, None]:
        """Like `stream`, without blocking the event loop."""
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Chunk | Future[Alignment]] = asyncio.Queue()

        def put(item: Chunk | Future[Alignment]) -> None:
            with suppress(RuntimeError):  # the caller's loop is gone, and nobody waits
                loop.call_soon_threadsafe(inbox.put_nowait, item)

        future = self._submit(request, put)
        future.add_done_callback(put)
        try:
            while not isinstance(item := await inbox.get(), Future):
                yield item
            yield item.result()
        finally:
            future.cancel()

    def score(self, reward: Reward, prompt: str | list[Message], texts: Sequence[str]) -> list[float]:
        """Rewards of whole answers to a prompt."""
        worker = self._running()
        return self._wait(worker.submit(worker.score_texts(reward, prompt, list(texts))))

    def loaded(self) -> LocalLanguageModel:
        """The language model, loaded if need be (its tokenizer may be used from any thread)."""
        return self._wait(self._running().language_model_ready())

    def close(self, owner: Any = None) -> None:
        """Stop and free the models, unless another owner still uses them.

        Requests that wait or run end with `EngineClosed`. The next use of an owner starts afresh.
        """
        with self._lock:
            if owner is not None:
                self.owners.pop(id(owner), None)
                if self.owners:
                    return
            self._closed = True
            if self._shared.get((self.model, self.settings)) is self:
                del self._shared[self.model, self.settings]
        with self._starting:
            if self._worker is not None:
                self._worker.stop()
                self._worker = None

    def _submit(self, request: Request, emit: Callable[[Chunk], None] | None = None) -> Future[Alignment]:
        worker = self._running()
        return worker.submit(worker.answer(request, emit))

    def _running(self) -> _Worker:
        with self._starting:
            if self._closed:
                raise EngineClosed("The engine was closed.")
            if self._worker is None or self._worker.failed:
                self._worker = _Worker(self.model, self.settings)
            return self._worker

    @staticmethod
    def _wait(future: Future[T]) -> T:
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


class _Worker:
    """The thread, its loop, and everything that lives there."""

    def __init__(self, model: LocalModel, settings: EngineSettings) -> None:
        self.model = model
        self.settings = settings
        self.failed = False
        self.rewards: dict[Reward, RewardModel] = {}
        self.live: dict[Session, asyncio.Task[Any]] = {}
        self.error: CardsError | None = None
        self.loop = asyncio.new_event_loop()
        self.language_model: LocalLanguageModel
        self._loaded: Future[LocalLanguageModel] = Future()
        self._stopping = False
        self.thread = threading.Thread(target=self._main, name="cards-engine", daemon=True)
        self.thread.start()
        atexit.register(self.stop)

    # --- from any thread ---

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def language_model_ready(self) -> Future[LocalLanguageModel]:
        return self._loaded

    def stop(self) -> None:
        """End the thread; whoever waits gets `EngineClosed`. Also runs at interpreter exit."""
        atexit.unregister(self.stop)
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._halt)
        if threading.current_thread() is not self.thread:
            self.thread.join()

    # --- in the worker's thread ---

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loader = ModelLoader(self.settings)
            model, tokenizer = self.loader.causal(self.model)
            self.language_model = LocalLanguageModel(model, tokenizer, self.model.model)
        except Exception as error:
            self.failed = True  # the next request tries again
            self.error = error if isinstance(error, CardsError) else ModelError(f"{type(error).__name__}: {error}")
            self._loaded.set_exception(self.error)
        else:
            self._loaded.set_result(self.language_model)
        self._work = asyncio.Event()
        self._rows = asyncio.Semaphore(self.settings.max_rows)
        driver = None if self.failed else self.loop.create_task(self._drive())
        if self.failed:
            self.loop.call_later(0.1, self.loop.stop)
        self.loop.run_forever()
        self._end(driver)

    def _halt(self) -> None:
        self._stopping = True
        self.loop.stop()

    def _end(self, driver: asyncio.Task[None] | None) -> None:
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.close()

    async def answer(self, request: Request, emit: Callable[[Chunk], None] | None) -> Alignment:
        """One request, from its prompt to its alignment."""
        try:
            if self.error is not None:
                raise self.error
            async with asyncio.timeout(request.timeout), self._rows:
                return await self._answer(request, emit)
        except TimeoutError:
            raise CardsTimeout(f"No answer within timeout={request.timeout} seconds.") from None
        except asyncio.CancelledError:
            if self._stopping:
                raise EngineClosed("The engine was closed while the request ran.") from None
            raise

    async def _answer(self, request: Request, emit: Callable[[Chunk], None] | None) -> Alignment:
        began = time.perf_counter()
        model = self.language_model
        _, prompt_ids = model.chat.prompt(request.prompt)
        self._check_room(request, len(prompt_ids))
        usage = Usage(prompt_tokens=len(prompt_ids))
        stop, seed = StopStrings(request.stop), fresh_seed() if request.seed is None else request.seed
        context = Context(request.prompt, prompt_ids, request.max_tokens, request.sampler, stop, usage)
        settings = request.reward if request.decoding.needs_reward else None
        reward = self._reward(settings) if settings else None
        session = Session(self, context, seed, reward, settings.scale if settings else None, emit)
        task = asyncio.current_task()
        assert task is not None
        self.live[session] = task
        try:
            await request.decoding.generate(session)
        finally:
            self.live.pop(session, None)
            session.close()
        usage.completion_tokens = len(context.ids)
        usage.seconds = time.perf_counter() - began
        assert session.finish is not None
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
        )

    def _check_room(self, request: Request, prompt_tokens: int) -> None:
        window = self.language_model.context_window
        if prompt_tokens >= window:
            raise PromptError(f"The prompt has {prompt_tokens} tokens, and the model's context is {window}.")
        if prompt_tokens + request.max_tokens > window:
            raise SettingsError(
                f"max_tokens={request.max_tokens} does not fit: the prompt has {prompt_tokens} tokens, and the "
                f"model's context is {window}; the most that fits is {window - prompt_tokens}."
            )

    def _reward(self, settings: Reward) -> RewardModel:
        if settings not in self.rewards:
            self.rewards[settings] = settings.build(self.loader)
        return self.rewards[settings]

    async def score_texts(self, settings: Reward, prompt: str | list[Message], texts: list[str]) -> list[float]:
        if self.error is not None:
            raise self.error
        model = self._reward(settings)
        conversation = Conversation(prompt, Usage())
        model.open(conversation)
        try:
            return await score(model, [Response(conversation, text) for text in texts])
        finally:
            model.close(conversation)

    def width(self) -> int:
        """Candidates a request may draft at once: the settings', or a fair share of what pays here."""
        if self.settings.width != "auto":
            return self.settings.width
        most, rows = (4, 16) if self.loader.device.type == "cpu" else (16, 128)
        return max(1, min(most, rows // max(1, len(self.live))))

    def wake(self) -> None:
        self._work.set()

    async def _drive(self) -> None:
        """Sample, score what has ended, let the methods react, forward; for ever."""
        while True:
            await self._work.wait()
            try:
                ended = self.language_model.sample()
                busy = bool(ended)
                if ended:
                    self._deliver([candidate.waiter for candidate in ended])
                else:
                    busy = self.language_model.forward()
            except Exception as error:
                self._fail(error)
                busy = False
            if not busy:
                self._work.clear()
            # Two turns of the loop: in the first the rewards score, in the second the methods go on.
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    def _fail(self, error: Exception) -> None:
        """An error in a model's forward reaches every request in it; the next one finds clean rows."""
        log.exception("the language model failed")
        wrapped = ModelError(f"The language model failed: {type(error).__name__}: {error}")
        wrapped.__cause__ = error
        for session in self.live:
            session.fail(wrapped)
        self.language_model.reset()

    def _deliver(self, ended: list[tuple[Session, Pending]]) -> None:
        """Resolve finished candidates, the scored ones through their reward models, batched."""
        groups: dict[Any, list[tuple[Session, Pending]]] = {}
        for session, pending in ended:
            if not pending.scored:
                pending.done.set_result(float("nan"))
                continue
            model = session._needed
            groups.setdefault((model, None if model.across_requests else session), []).append((session, pending))
        for (model, _), group in groups.items():
            self.loop.create_task(self._judge(model, group))

    async def _judge(self, model: RewardModel, group: list[tuple[Session, Pending]]) -> None:
        """Score a group of candidates; if that fails, each request alone, so that one harms no other."""
        responses = []
        for session, pending in group:
            candidate = pending.candidate
            ids = [*candidate.context.ids, *candidate.ids] if candidate.whole else None
            pending.response = Response(session.conversation, candidate.response, ids)
            responses.append(pending.response)
        try:
            scores = await score(model, responses)
        except Exception as error:
            sessions = dict.fromkeys(session for session, _ in group)
            if len(sessions) > 1:
                for one in sessions:
                    await self._judge(model, [(s, p) for s, p in group if s is one and not p.done.done()])
                return
            for _, pending in group:
                if not pending.done.done():
                    pending.done.set_exception(error)
            return
        for (_, pending), value in zip(group, scores, strict=True):
            if not pending.done.done():
                pending.done.set_result(value)


def _forget_after_fork() -> None:
    """A forked child has no worker threads: it starts its own engines."""
    Engine._shared.clear()
    Engine._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
