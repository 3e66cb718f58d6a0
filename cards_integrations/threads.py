"""Slow work in threads of its own: functions of users, the loading of models."""

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
EXIT_PATIENCE = 10.0  # seconds that the end of the interpreter waits for a thread that waits for something itself
WAITING = ("threading", "queue", "selectors", "socket", "ssl", "subprocess")  # modules in which a thread only waits


class InterpreterExit(BaseException):
    """Raised in a thread that the end of the interpreter has to wait for."""


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a new daemon thread, with the caller's context variables, and return its result.

    A call that hangs delays neither other calls nor the exit of the interpreter.

    Raises:
        Exception: Whatever the function raises.
        RuntimeError: The function raised what is no `Exception` (SystemExit, say), or StopIteration, which a
            future cannot hold.
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
    """Look at the error of a task that has ended: its caller may have gone, and then nobody else does."""
    if not task.cancelled():
        task.exception()


def in_own_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a new event loop and a new daemon thread, and wait for its result.

    So a blocking call may use what is asynchronous, even where the caller's thread has a running loop.

    Raises:
        Exception: Whatever the coroutine raises.
    """
    future: Future[T] = Future()

    async def settle() -> None:
        try:
            future.set_result(await work)  # the end of the loop may have to wait, say for a name server
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=copy_context().run, args=(asyncio.run, settle()), name="cards-thread", daemon=True).start()
    return future.result()


def _fits_future(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, StopIteration)


@contextmanager
def ended_before_exit() -> Iterator[None]:
    """Let the end of the interpreter wait for what this thread does inside the block, and cut it short.

    An interpreter that ends amid native code, such as torch's, aborts. So `InterpreterExit` is raised in the thread,
    which it meets between two lines of Python, at the latest when a long native call has returned.
    """
    thread = threading.current_thread()

    def finish() -> None:
        told, began = sys.unraisablehook, time.monotonic()
        # raised where nothing can be raised, it is told and forgotten; it will be raised again
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
    """True if a thread is inside of a lock or a socket, where the interpreter may leave it."""
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in WAITING
