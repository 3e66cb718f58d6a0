"""Runs slow work, such as functions of users and the loading of models, in threads of its own."""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import copy_context
from typing import Any, TypeVar

from cards_integrations.errors import said

T = TypeVar("T")
EXIT_PATIENCE = 10.0  # seconds that the exit of the interpreter waits for a thread that is only waiting itself
WAITING = ("threading", "queue", "selectors", "socket", "ssl", "subprocess")  # modules whose functions only wait


class InterpreterExit(BaseException):
    """Raised in a thread that would delay the exit of the interpreter."""


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a new daemon thread, with the caller's context variables, and return its result.

    A call that hangs delays neither other calls nor the exit of the interpreter.

    Raises:
        Exception: Whatever the function raises.
        RuntimeError: The function raised something other than an `Exception`, such as SystemExit, or StopIteration,
            which a future cannot hold.
    """
    loop, context = asyncio.get_running_loop(), copy_context()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def run() -> None:
        result: Any = None
        failure: BaseException | None = None
        try:
            result = context.run(function, *args)
        except BaseException as error:
            failure = error if _fits_future(error) else RuntimeError(said(error))
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="cards-thread", daemon=True).start()
    return await future


def retrieve_error(task: asyncio.Task[Any]) -> None:
    """Mark the error of a finished task as seen: if its caller has gone, asyncio would log it as never retrieved."""
    if not task.cancelled():
        task.exception()


def in_own_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a new event loop and a new daemon thread, and wait for its result.

    A blocking call can so use asynchronous functions, even if a loop is running in the caller's thread.

    Raises:
        Exception: Whatever the coroutine raises.
    """
    future: Future[T] = Future()

    async def settle() -> None:
        try:
            future.set_result(await work)  # now: closing the loop may take long, say for a name server
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=copy_context().run, args=(asyncio.run, settle()), name="cards-thread", daemon=True).start()
    return future.result()


def _fits_future(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, StopIteration)


@contextmanager
def ended_before_exit() -> Iterator[None]:
    """Make the exit of the interpreter interrupt this thread inside the block, and wait until it has ended.

    A process that exits while a thread is in native code, such as torch's, aborts. So `InterpreterExit` is raised in
    the thread. It is raised between two bytecodes of Python: a long native call delays it until it returns.
    """
    thread = threading.current_thread()

    def finish() -> None:
        told, began = sys.unraisablehook, time.monotonic()
        # where it cannot propagate, as in __del__, Python reports and drops it: do not report it, and raise it again
        sys.unraisablehook = lambda what: None if what.exc_type is InterpreterExit else told(what)
        while thread.is_alive() and not (_only_waits(thread) and time.monotonic() > began + EXIT_PATIENCE):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident or 0), ctypes.py_object(InterpreterExit)
            )
            thread.join(0.5)

    atexit.register(finish)
    try:
        yield
    finally:
        atexit.unregister(finish)


def _only_waits(thread: threading.Thread) -> bool:
    """True if a thread waits for a lock or a socket, where the interpreter can safely leave it."""
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in WAITING
