"""How many threads steps get, on a machine whose other processes come and go."""

from __future__ import annotations

from contextlib import suppress

import pytest

from cards_integrations.transformer.thread_tuner import SHARE, ThreadTuner


class Machine:
    """Four cores and their clock. Threads that do not find a core of their own make a step thirty times as long."""

    def __init__(self, cores: int = 4) -> None:
        self.now, self.threads, self.cores, self.free = 0.0, cores, cores, cores
        self.tuner = ThreadTuner(cores, self.use, lambda: self.now)

    def use(self, threads: int) -> None:
        self.threads = threads

    def step(self, tokens: int = 1) -> float:
        began = self.now
        with self.tuner.step(tokens):
            late = 30.0 if self.threads > self.free else 1.0
            self.now += 0.04 * (1 + tokens / 16) * late / self.threads**0.5
        assert self.threads == self.cores  # between steps
        return self.now - began

    def run(self, seconds: float) -> list[float]:
        end = self.now + seconds
        steps: list[float] = []
        while self.now < end:
            steps.append(self.step(1 + len(steps) % 7))
        return steps


def test_a_quiet_machine_gets_all_threads() -> None:
    machine = Machine()
    machine.run(300)
    assert machine.tuner.threads == 4


@pytest.mark.parametrize(("free", "expected"), [(3, 2), (2, 2), (1, 1)])
def test_a_busy_machine_gets_fewer_and_a_quiet_one_all_again(free: int, expected: int) -> None:
    machine = Machine()
    machine.run(10)
    machine.free = free
    machine.run(20)
    assert machine.tuner.threads == expected
    busy = machine.run(600)
    alone = 0.04 * 1.25 / expected**0.5
    assert sum(busy) / len(busy) < alone * (1.3 + 2 / SHARE)
    assert machine.tuner.threads == expected
    machine.free = 4
    machine.run(200)
    assert machine.tuner.threads == 4


def test_a_machine_that_is_busy_from_the_beginning() -> None:
    machine = Machine()
    machine.free = 1
    machine.run(60)
    assert machine.tuner.threads == 1


def test_one_thread_is_one_thread() -> None:
    machine = Machine(1)
    machine.run(100)
    assert machine.tuner.threads == 1


def test_an_error_gives_the_threads_back() -> None:
    machine = Machine()
    machine.free = 1
    machine.run(60)
    with suppress(ZeroDivisionError), machine.tuner.step(1):
        assert machine.threads == 1
        raise ZeroDivisionError
    assert machine.threads == 4
