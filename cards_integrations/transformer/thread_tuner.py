"""How many CPU threads a step gets: all on a quiet machine, fewer where they would wait for one another.

The threads of torch meet after each of the hundreds of small operations of a step. Where another process keeps a
core busy, one of them is always late, and a step takes twenty times as long as with a single thread. So now and
then one step is given another number of threads, and the faster number stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GAIN = 1.25  # by how much another number has to be faster
SLOW = 3.0  # times the usual seconds, from which on other numbers are tried at once
FIRST, LONGEST = 1.0, 60.0  # seconds between two rounds of trials, which double as long as nothing changes
SHARE = 20  # trials take at most this fraction of the time


class ThreadTuner:
    """Chooses the number of threads for each step by what steps have taken.

    In a round of trials one step each is run with every other number: half as many, a quarter, and so on.

    Args:
        most: The number on a quiet machine.
        use: Sets the number of threads of torch.
        clock: Returns seconds.
    """

    def __init__(self, most: int, use: Callable[[int], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self.threads = most
        self._most = most
        self._use = use
        self._clock = clock
        self._usual: dict[int, float] = {}  # seconds with the present number, by the size of the step
        self._trials: list[int] = []  # what is left of a round
        self._found: dict[int, float] = {}  # how much faster the others of this round were
        self._cost = 0.0  # seconds of this round
        self._interval = FIRST
        self._due = clock() + FIRST

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """Run a step with the threads that suit it.

        Args:
            tokens: Tokens that it reads.
        """
        threads = self._next(tokens.bit_length())
        if threads != self._most:
            self._use(threads)
        began = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - began
            if threads != self._most:
                self._use(self._most)  # what else runs in this process goes on as it was
        self._learn(threads, tokens.bit_length(), seconds)

    def _next(self, size: int) -> int:
        """Return the number of threads for a step of this size: one to try, if its time can be compared."""
        if not self._trials and self._clock() >= self._due:
            counts = [self._most >> shift for shift in range(self._most.bit_length())]
            self._trials = [count for count in counts if count != self.threads]
        return self._trials.pop(0) if self._trials and size in self._usual else self.threads

    def _learn(self, threads: int, size: int, seconds: float) -> None:
        usual = self._usual.get(size)
        if threads == self.threads or usual is None:
            if usual is not None and seconds > SLOW * usual:
                self._due = self._clock()
            self._usual[size] = seconds if usual is None else 0.7 * usual + 0.3 * seconds
            return
        self._found[threads] = usual / seconds
        self._cost += seconds
        if not self._trials:
            self._end_round(size, usual)

    def _end_round(self, size: int, usual: float) -> None:
        best = max(self._found, key=self._found.__getitem__)
        if self._found[best] > GAIN:
            self.threads, self._usual, self._interval = best, {size: usual / self._found[best]}, FIRST
        else:
            self._interval = min(2 * self._interval, LONGEST)
        self._due = self._clock() + max(self._interval, SHARE * self._cost)
        self._found, self._cost = {}, 0.0
