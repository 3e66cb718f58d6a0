"""The engine: what callers use, from any thread and any event loop.

It loads its models once, at the first request, and streams kept segments to whoever asked.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import aclosing, closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, overload

from cards_integrations.chat.message import Message
from cards_integrations.engine.inspection import EngineState
from cards_integrations.engine.request import Chunk, EngineSettings, Request
from cards_integrations.engine.worker import OnDone, Worker
from cards_integrations.errors import CardsError, EngineClosed, PromptError
from cards_integrations.models.base import LanguageModel
from cards_integrations.models.sources import ModelSource
from cards_integrations.progress import shown, wanted
from cards_integrations.rewards.base import Reward
from cards_integrations.trace import Alignment
from cards_integrations.uncertainty import Measure

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Engine:
    """One language model and the reward models that guide it.

    Use `Engine.shared`: objects with equal settings share one engine in a process. Nothing is loaded before the
    first request.

    Args:
        model: The language model.
        settings: The settings of the machine.

    Attributes:
        progress: Whether calls from now on show their progress.
    """

    _shared: ClassVar[dict[tuple[ModelSource, EngineSettings], Engine]] = {}
    _lock: ClassVar[threading.RLock] = threading.RLock()  # a signal handler or a finalizer may close amid a call

    def __init__(self, model: ModelSource, settings: EngineSettings) -> None:
        self.model = model
        self.settings = settings
        self.progress = wanted()
        self.owners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.owned = False
        self._unanswered: set[Future[Any]] = set()
        self._worker: Worker | None = None
        self._starting = threading.RLock()
        self._closed = False

    @classmethod
    def shared(cls, model: ModelSource, settings: EngineSettings, owner: Any = None, progress: bool = True) -> Engine:
        """Return the process's engine for these settings; make it if there is none.

        A new engine replaces those of the same model whose owners are all gone. So a model is not held twice when an
        object is made again with other settings.

        Args:
            model: The language model.
            settings: The settings of the machine.
            owner: The object that uses the engine; it is referenced weakly.
            progress: Whether the next calls show their progress.
        """
        with cls._lock:
            engine = cls._shared.get((model, settings))
            abandoned = []
            if engine is None or engine._closed:
                abandoned = [other for other in cls._shared.values() if other.model == model and other._is_abandoned()]
                for other in abandoned:
                    other._retire()
                engine = cls._shared[model, settings] = Engine(model, settings)
            engine.progress = progress
            if owner is not None:
                engine.owned = True
                engine.owners[id(owner)] = owner
        for other in abandoned:
            other._stop()
        return engine

    @classmethod
    def release(cls, owner: Any) -> None:
        """Close every engine that this object used, unless others use it."""
        with cls._lock:
            used = [engine for engine in cls._shared.values() if id(owner) in engine.owners]
        for engine in used:
            engine.close(owner)

    # --- one answer ---

    def run(self, request: Request, on_segment: Callable[[Chunk], None] | None = None) -> Alignment:
        """Return the answer once it is written. Interrupting the wait cancels the request.

        Args:
            request: What to answer.
            on_segment: Called in the caller's thread with each segment of the answer when it has been kept.

        Raises:
            CardsError: The request cannot be answered; see its children.
        """
        if on_segment is None:
            return self._wait(self.submit(request))
        with closing(self.stream(request)) as items:
            while isinstance(item := next(items), Chunk):
                if item.thought is None:
                    on_segment(item)
            return item

    async def arun(self, request: Request, on_segment: Callable[[Chunk], Awaitable[None]] | None = None) -> Alignment:
        """Like `run`, without blocking the event loop; cancelling the task cancels the request."""
        if on_segment is None:
            return await asyncio.wrap_future(self.submit(request))
        async with aclosing(self.astream(request)) as items:
            while isinstance(item := await anext(items), Chunk):
                if item.thought is None:
                    await on_segment(item)
            return item

    def stream(self, request: Request) -> Generator[Chunk | Alignment, None, None]:
        """Yield a `Chunk` for each kept segment, then the `Alignment`; closing the iterator stops the drafting."""
        self._check_thread()
        inbox: queue.SimpleQueue[Chunk | Future[Alignment]] = queue.SimpleQueue()
        future = self.submit(request, inbox.put)
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

        future = self.submit(request, put)
        future.add_done_callback(put)
        try:
            while not isinstance(item := await inbox.get(), Future):
                yield item
            yield item.result()
        finally:
            future.cancel()

    def submit(self, request: Request, emit: Callable[[Chunk], None] | None = None) -> Future[Alignment]:
        """Begin an answer without waiting for it; cancelling the future stops the drafting.

        Args:
            request: What to answer.
            emit: Called in the engine's thread with each kept segment.
        """
        return self._ask(lambda worker: worker.answer(request, emit))

    # --- several answers ---

    @overload
    def run_many(
        self, requests: Sequence[Request], *, return_exceptions: Literal[False] = False
    ) -> list[Alignment]: ...
    @overload
    def run_many(self, requests: Sequence[Request], *, return_exceptions: bool) -> list[Alignment | Exception]: ...

    def run_many(self, requests: Sequence[Request], *, return_exceptions: bool = False) -> list[Any]:
        """Return the answers to all requests, which are drafted together; `stream_many` yields each as it ends.

        A request's `timeout` counts from the moment it gets a row, and so does not include the wait for others.

        Args:
            requests: What to answer.
            return_exceptions: Return errors in place of answers; otherwise the first error cancels the rest.
        """
        return self._wait(self.submit_many(requests, return_exceptions=return_exceptions))

    async def arun_many(self, requests: Sequence[Request]) -> list[Alignment]:
        """Like `run_many`, without blocking the event loop."""
        return await asyncio.wrap_future(self.submit_many(requests))

    def submit_many(
        self, requests: Sequence[Request], on_done: OnDone | None = None, *, return_exceptions: bool = False
    ) -> Future[list[Any]]:
        """Begin all answers at the same moment, without waiting for them.

        Args:
            requests: What to answer.
            on_done: Called in the engine's thread with the index of each request that ends, and its answer or error.
            return_exceptions: As for `run_many`.
        """
        return self._ask(lambda worker: worker.answer_all(requests, on_done, return_exceptions))

    def stream_many(self, requests: Sequence[Request]) -> Generator[tuple[int, Alignment | Exception], None, None]:
        """Yield the index of each request and its answer or error, in the order in which they end.

        Closing the iterator stops the drafting of the rest.
        """
        self._check_thread()
        inbox: queue.SimpleQueue[tuple[int, Alignment | Exception] | Future[Any]] = queue.SimpleQueue()
        future = self.submit_many(requests, lambda index, found: inbox.put((index, found)), return_exceptions=True)
        future.add_done_callback(inbox.put)
        try:
            while not isinstance(item := inbox.get(), Future):
                yield item
            item.result()
        finally:
            future.cancel()

    # --- what else its models can do ---

    def score(
        self, reward: Reward, prompt: str | list[Message], texts: Sequence[str], context: tuple[str, ...] = ()
    ) -> list[float]:
        """Return the rewards of whole answers to a prompt."""
        return self._wait(self.submit_score(reward, prompt, texts, context))

    async def ascore(
        self, reward: Reward, prompt: str | list[Message], texts: Sequence[str], context: tuple[str, ...] = ()
    ) -> list[float]:
        """Like `score`, without blocking the event loop."""
        return await asyncio.wrap_future(self.submit_score(reward, prompt, texts, context))

    def submit_score(
        self, reward: Reward, prompt: str | list[Message], texts: Sequence[str], context: tuple[str, ...] = ()
    ) -> Future[list[float]]:
        """Begin to score whole answers to a prompt, without waiting for them.

        Raises:
            PromptError: `texts` is not a list of strings.
        """
        answers = [*texts]
        if isinstance(texts, str) or not all(isinstance(each, str) for each in answers):
            raise PromptError("Answers to be scored are a list of strings: pass [text], or [answer.text].")
        return self._ask(lambda worker: worker.score_texts(reward, prompt, answers, context))

    def uncertainties(self, measure: Measure, answers: Sequence[Alignment]) -> list[list[float]]:
        """Return the language model's predictive uncertainty before each token of these answers."""
        return self._wait(self._ask(lambda worker: worker.uncertainties(measure, answers)))

    def states(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[torch.Tensor]:
        """Return the last hidden states of the language model while it reads answers.

        Args:
            texts: For each text the token ids of the prompt, and those of the answer.

        Returns:
            For each text the states after the prompt and after each token of the answer, (1 + tokens, hidden size),
            float32.
        """
        return self._wait(self._ask(lambda worker: worker.states(texts)))

    def loaded(self) -> LanguageModel:
        """Return the language model, loaded if need be. Its tokenizer may be used from any thread."""
        with self._starting:
            future = self._running().loaded
        return future.result()

    def inspect(self) -> EngineState:
        """Return what lives in the engine now; loads nothing."""
        self._check_thread()
        with self._starting:
            worker = self._worker
            if self._closed or worker is None:
                return EngineState("closed" if self._closed else "new")
            waiting = sum(not each.done() for each in list(self._unanswered))  # whose callbacks come a moment later
            future = worker.submit(worker.inspect())
        try:
            return replace(future.result(), waiting=waiting)
        except CancelledError:  # it was closed meanwhile
            return EngineState("closed")

    def close(self, owner: Any = None) -> None:
        """Stop and free the models, unless another owner still uses them.

        Requests that wait or run end with `EngineClosed`. The next use of an owner starts afresh.
        """
        with self._lock:
            if owner is not None:
                self.owners.pop(id(owner), None)
                if self.owners:
                    return
            self._retire()
        self._stop()

    def _is_abandoned(self) -> bool:
        """True if all its owners are gone, and no call waits for an answer."""
        return self.owned and not self.owners and not self._unanswered

    def _retire(self) -> None:
        """Take no more requests; called under the lock."""
        self._closed = True
        if self._shared.get((self.model, self.settings)) is self:
            del self._shared[self.model, self.settings]

    def _stop(self) -> None:
        with self._starting:
            if self._worker is not None:
                self._worker.stop()
                self._worker = None

    def _ask(self, work: Callable[[Worker], Coroutine[Any, Any, T]]) -> Future[T]:
        """Let the worker do something; the engine counts as used until that is done."""
        with self._starting, shown(self.progress):
            worker = self._running()
            future = worker.submit(work(worker))
            self._unanswered.add(future)
        future.add_done_callback(self._unanswered.discard)
        return future

    def _running(self) -> Worker:
        """Return the worker, started if need be; called under the lock, so that no request meets an ended loop."""
        if self._closed:
            raise EngineClosed("The engine was closed.")
        if self._worker is not None and self._worker.failed:
            self._worker.stop()
            self._worker = None
        if self._worker is None:
            self._worker = Worker(self.model, self.settings, self.progress)
        return self._worker

    def _wait(self, future: Future[T]) -> T:
        try:
            self._check_thread()
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _check_thread(self) -> None:
        """Refuse to wait in the engine's own thread, where the wait would never end."""
        worker = self._worker
        if worker is not None and worker.thread is threading.current_thread():
            raise CardsError(
                "This call waits for the engine in the engine's own thread, which could not go on. In an async reward "
                "or a decoding method await the async version instead, such as aalign or ascore; or make the reward a "
                "plain function, which runs in a thread of its own."
            )


def _forget_after_fork() -> None:
    """Let the engines of a forked child start afresh, as it has no worker threads."""
    for engine in Engine._shared.values():
        engine._worker, engine._starting = None, threading.RLock()
    Engine._shared.clear()
    Engine._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
