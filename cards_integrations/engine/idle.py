"""What an engine does while it is idle: it checks its step times."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

from cards_integrations.threads import InterpreterExit, ended_before_exit
from cards_integrations.transformer.step_times import StepTimes, confirm

IDLE_AFTER = 2.0  # seconds without a request


class IdleMoments:
    """Measures step times a second time while the engine is idle, in a thread of its own.

    Args:
        step_times: Returns the step times that are used now.
    """

    def __init__(self, step_times: Callable[[], Iterable[StepTimes]]) -> None:
        self._step_times = step_times
        self._requests = 0  # running
        self._begun = 0  # requests so far
        self._timer: asyncio.TimerHandle | None = None

    def enter(self) -> None:
        """Note that a request begins."""
        self._requests += 1
        self._begun += 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def leave(self) -> None:
        """Note that a request has ended."""
        self._requests -= 1
        if self._requests == 0:
            self._timer = asyncio.get_running_loop().call_later(IDLE_AFTER, self._idle)

    def _idle(self) -> None:
        self._timer = None
        waiting = [times for times in self._step_times() if times.unconfirmed is not None]
        if waiting:
            threading.Thread(target=self._confirm, args=(waiting,), name="cards-idle", daemon=True).start()

    def _confirm(self, waiting: list[StepTimes]) -> None:
        begun = self._begun
        with suppress(Exception, InterpreterExit), ended_before_exit():  # the engine may be closed meanwhile
            for times in waiting:
                if self._begun == begun:
                    confirm(times, lambda: self._begun == begun)
