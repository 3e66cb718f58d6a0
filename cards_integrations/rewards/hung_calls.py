"""Calls of users' functions that were given up but still run: a thread cannot be ended, nor a task that refuses to.

They are counted, and a function with too many of them is not called any more.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from cards_integrations.errors import RewardError, said
from cards_integrations.threads import in_thread, retrieve_error

MOST = 64  # calls that one function may leave hanging
PATIENCE = 1.0  # seconds that a task has to end once it is cancelled
T = TypeVar("T")


class HungCalls:
    """Counts calls that hang by the code that they run, so that a function made again in a loop counts as the same."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Reset all counts."""
        self._hanging: Counter[Any] = Counter()
        self._lock = threading.Lock()

    def check(self, name: str, function: Callable[..., Any]) -> None:
        """Refuse to call a function of which too many calls hang.

        Args:
            name: What errors call the reward.
            function: The function.

        Raises:
            RewardError: Too many of its calls hang.
        """
        if self._hanging[_code(function)] >= MOST:
            raise RewardError(
                f"reward {name!r} is not asked any more: {MOST} of its calls, which were given up after `timeout` or "
                "with their requests, have still not returned. Give what it waits for a time limit of its own."
            )

    async def call(self, function: Callable[..., T], *args: Any, then: Callable[[T], T]) -> T:
        """Call a function in a thread.

        Args:
            function: The function.
            args: Its arguments.
            then: Called in the same thread with what it returned.
        """
        code = _code(function)
        returned, given_up = threading.Event(), threading.Event()

        def run() -> T:
            try:
                return then(function(*args))
            finally:
                with self._lock:
                    returned.set()
                    if given_up.is_set():
                        self._count(code, -1)

        try:
            return await in_thread(run)
        except BaseException:
            with self._lock:
                if not returned.is_set():
                    given_up.set()
                    self._count(code, 1)
            raise

    async def finish(self, function: Callable[..., Any], work: Awaitable[T]) -> T:
        """Await an async function in a task, which is given up if it does not end when it is cancelled.

        Args:
            function: The function.
            work: What it returned.
        """
        code, task = _code(function), asyncio.ensure_future(_contained(work))
        try:
            await asyncio.wait({task})
            return task.result()
        except BaseException:
            task.add_done_callback(retrieve_error)
            task.cancel()
            try:
                await asyncio.wait({task}, timeout=PATIENCE)
            finally:
                self._count_until_done(code, task)
            raise

    def _count_until_done(self, code: Any, task: asyncio.Task[Any]) -> None:
        if task.done():
            return
        with self._lock:
            self._count(code, 1)

        def ended(_: asyncio.Task[Any]) -> None:
            with self._lock:
                self._count(code, -1)

        task.add_done_callback(ended)

    def _count(self, code: Any, change: int) -> None:
        self._hanging[code] += change
        if not self._hanging[code]:
            del self._hanging[code]


HUNG_CALLS = HungCalls()
"""Those of this process; a forked child has none of its parent's threads."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=HUNG_CALLS.forget)


async def _contained(work: Awaitable[T]) -> T:
    """Await it; what would end the loop, were it raised in a task, becomes an error like others."""
    try:
        return await work
    except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:
        raise RuntimeError(said(error)) from error


def _code(function: Any) -> Any:
    """Return the code of a function, whatever object it is bound to."""
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)
    return getattr(function, "__code__", type(function))
