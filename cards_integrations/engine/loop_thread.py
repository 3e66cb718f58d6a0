"""A thread with an event loop, which runs coroutines for callers of other threads until it is stopped."""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from inspect import CORO_CREATED, getcoroutinestate
from typing import Any, TypeVar

from cards_integrations.errors import CardsError, EngineClosed, as_cards_error, said

T = TypeVar("T")
PATIENCE = 3.0  # seconds that running tasks have to end when the thread is stopped
log = logging.getLogger("cards_integrations")


class LoopThread(ABC):
    """A thread with an event loop. Whoever waits for it when it ends gets `EngineClosed`.

    A subclass says what happens when it begins, fails and ends, and calls `start` once it is ready for that.

    Attributes:
        error: Why nothing can be asked of it any more; None while it serves.
        stopping: True once it has been told to end.
    """

    def __init__(self, name: str) -> None:
        self.error: CardsError | None = None
        self.stopping = False
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._asked: dict[Future[Any], Coroutine[Any, Any, Any]] = {}

    @abstractmethod
    def _begin(self) -> None:
        """Called in the thread before the loop runs."""

    @abstractmethod
    def _give_up(self, error: CardsError) -> None:
        """Called in the thread when the loop itself has failed."""

    @abstractmethod
    def _ended(self) -> None:
        """Called in the thread after the loop has been closed."""

    # --- from any thread ---

    def start(self) -> None:
        """Start the thread; it is stopped when the interpreter exits at the latest."""
        atexit.register(self.stop)
        self.thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine in the loop.

        Raises:
            EngineClosed: The loop has ended.
        """
        try:
            future = asyncio.run_coroutine_threadsafe(work, self.loop)
        except RuntimeError:  # a signal handler has closed the engine amid this very call
            work.close()
            raise EngineClosed("The engine was closed.") from None
        self._asked[future] = work
        future.add_done_callback(self._asked.pop)
        if self.loop.is_closed():  # since the first line
            self._end_asked()
        return future

    def stop(self) -> None:
        """End the thread; whoever waits gets `EngineClosed`."""
        atexit.unregister(self.stop)
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._halt)
        if threading.current_thread() is not self.thread and self.thread.ident is not None:
            self.thread.join()

    # --- in the thread ---

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        self._begin()
        try:
            while not self.stopping:
                self._run_loop()
        except BaseException as error:
            self._give_up(as_cards_error(error, "The engine's event loop failed"))
            self.stopping = True
            raise
        finally:
            self.loop.run_until_complete(self._end_tasks())
            self.loop.close()
            self._end_asked()
            self._ended()

    def _run_loop(self) -> None:
        """Run until the loop is stopped. Users' code can do that too, or raise an exit: then `_main` runs it again."""
        try:
            self.loop.run_forever()
        except (SystemExit, KeyboardInterrupt) as error:
            log.warning("Code that runs in the engine's thread raised %s there; the engine goes on.", said(error))

    def _halt(self) -> None:
        self.stopping = True
        self.error = self.error or EngineClosed("The engine was closed.")
        self.loop.stop()

    async def _end_tasks(self) -> None:
        await asyncio.sleep(0)  # what was submitted last begins, so that it can say why it ends
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=PATIENCE)
            for task in left:
                log.warning("The engine was closed, and %r goes on although it was cancelled.", task.get_coro())

    def _end_asked(self) -> None:
        """Tell callers that the loop will not finish, or not even begin, what they have submitted."""
        for future, work in list(self._asked.items()):
            if getcoroutinestate(work) == CORO_CREATED:
                work.close()  # else Python would warn that nobody awaits it
            with suppress(InvalidStateError):  # cancelled in this moment
                future.set_exception(EngineClosed("The engine was closed while the request ran."))
