"""Calls of users' functions that nobody waits for any more: their threads cannot be ended, only counted."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from cards_integrations.errors import RewardError
from cards_integrations.threads import in_thread

MOST = 64  # threads that one function may leave hanging
T = TypeVar("T")


class HungCalls:
    """Counts them by the code that they run, so that each function made anew in a loop is the same one."""

    def __init__(self) -> None:
        self._hanging: Counter[Any] = Counter()
        self._lock = threading.Lock()

    async def call(self, name: str, function: Callable[..., T], *args: Any, then: Callable[[T], T]) -> T:
        """Call a function in a thread.

        Args:
            name: What errors call it.
            function: The function.
            args: Its arguments.
            then: Called in the same thread with what it returned.

        Raises:
            RewardError: Too many of its earlier calls have not come back.
        """
        code = _code(function)
        if self._hanging[code] >= MOST:
            raise RewardError(
                f"reward {name!r} is not asked any more: {MOST} of its calls, which were given up after `timeout` or "
                "with their requests, have still not returned. Give what it waits for a time limit of its own."
            )
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

    def _count(self, code: Any, change: int) -> None:
        self._hanging[code] += change
        if not self._hanging[code]:
            del self._hanging[code]


HUNG_CALLS = HungCalls()
"""Those of this process."""


def _code(function: Any) -> Any:
    """What stands for a function, whatever object it is bound to."""
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)
    return getattr(function, "__code__", type(function))
