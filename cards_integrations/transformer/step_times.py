"""How long a forward takes, by its number of tokens: measured on a machine, and remembered.

What is drafted ahead depends on these times, so they should not change from run to run: in half precision the rounding
of a product depends on the shape of the batch, and a seed would not give the same text. Only times of a busy machine
are replaced: implausible ones at once, and ones that are far off when the engine is idle.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from cards_integrations.paths import cache_dir, write_atomically
from cards_integrations.progress import phase

if TYPE_CHECKING:
    import torch

POINTS = (1, 16, 64, 256)  # numbers of tokens that are measured
MOST = 200  # models that are remembered
RUNS = 5  # of a forward, of which the fastest counts
LONG = 0.5  # seconds after which two runs are enough
TRIES = 3  # measurements, if the first are implausible
FAR_OFF = 1.5  # times that are this many times longer than those of an idle engine are replaced
LOCK_TIMEOUT = 5.0  # seconds to wait for another process that writes

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
REMEMBERED = TypeAdapter(dict[str, dict[int, Seconds]])
"""The file: seconds by the number of tokens, for each model on its machine."""


class StepTimes:
    """Seconds of a forward, interpolated between the measured points and extrapolated beyond the last two.

    Args:
        measured: Seconds by the number of tokens, of at least two numbers. A forward of more tokens
            is never taken to be faster than one of fewer.
    """

    def __init__(self, measured: dict[int, float]) -> None:
        self.unconfirmed: tuple[Callable[[], dict[int, float]], str] | None = None  # how to measure again, and the key
        self.set(measured)

    def set(self, measured: dict[int, float]) -> None:
        """Replace the measurements."""
        self.tokens = np.array(sorted(measured))
        self.seconds = np.maximum.accumulate([measured[n] for n in self.tokens])
        last = slice(-2, None)
        self.per_token = float(np.diff(self.seconds[last])[0] / np.diff(self.tokens[last])[0])

    @property
    def measured(self) -> dict[int, float]:
        """Seconds by the number of tokens, at the measured points."""
        return {int(n): float(seconds) for n, seconds in zip(self.tokens, self.seconds, strict=True)}

    @classmethod
    def together(cls, several: Iterable[StepTimes]) -> StepTimes:
        """Return the times of forwards that run one after another."""
        each = list(several)
        return cls({n: sum(times.at(n) for times in each) for n in POINTS})

    def upto(self, most: int) -> NDArray[np.float64]:
        """Return the seconds of forwards with 1, 2, ... `most` tokens, (most,)."""
        return self._seconds(np.arange(1, most + 1))

    def at(self, tokens: int) -> float:
        """Return the seconds of a forward with `tokens` tokens."""
        return float(self._seconds(np.array([tokens]))[0])

    def _seconds(self, n: NDArray[np.int_]) -> NDArray[np.float64]:
        beyond = np.maximum(0, n - self.tokens[-1]) * self.per_token
        seconds: NDArray[np.float64] = np.interp(n, self.tokens, self.seconds) + beyond
        return seconds

    @property
    def fixed(self) -> float:
        """Seconds that a forward takes at least."""
        return float(self.seconds[0])


def step_times(what: str, model: Any, measure: Callable[[int], float]) -> StepTimes:
    """Return the step times of a model on this machine, measured unless they are remembered.

    Args:
        what: What the forward is for; drafting and scoring are remembered separately.
        model: The transformers model.
        measure: Measures the seconds of a forward with a number of tokens.
    """
    from cards_integrations.transformer.quantization import precision

    key = f"{what} {model.name_or_path} {precision(model)} on {_machine(model.device)}"
    known = _remembered().get(key)
    if known is None:
        with phase(f"timing the steps of {what}, once"):
            known = _store(key, _measured(measure))
    times = StepTimes(known)
    if model.device.type == "cpu":  # a GPU is seldom shared
        times.unconfirmed = lambda: _measured(measure), key
    return times


def confirm(times: StepTimes, undisturbed: Callable[[], bool]) -> None:
    """Measure step times a second time, and replace them if they were far too long: the machine was busy then.

    Args:
        times: Measured or remembered times; changed in place, and in the file.
        undisturbed: Returns, after the measurement, whether nothing else ran in this process.
    """
    if times.unconfirmed is None:
        return
    measure, key = times.unconfirmed
    again = measure()
    if not undisturbed():
        return
    times.unconfirmed = None
    known = times.measured
    if any(known[n] > FAR_OFF * again[n] for n in POINTS):
        times.set(_store(key, again))


def _measured(measure: Callable[[int], float]) -> dict[int, float]:
    """Return the seconds by the number of tokens: the least of several tries if they are implausible."""
    found = {n: measure(n) for n in POINTS}
    for _ in range(TRIES - 1):
        if is_plausible(found):
            break
        found = {n: min(seconds, measure(n)) for n, seconds in found.items()}
    return found


def is_plausible(seconds: Mapping[int, float]) -> bool:
    """Return True unless more tokens are much faster than fewer, or slower than one by one."""
    return all(
        0.8 * seconds[fewer] <= seconds[more] <= 2 * more / fewer * seconds[fewer]
        for fewer, more in pairwise(sorted(seconds))
    )


def _machine(device: torch.device) -> str:
    """Return what step times depend on, without the host name, which differs from container to container."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu()} {_cpus()}"
    return f"{name} {torch.get_num_threads()} torch {torch.__version__}"


@cache
def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _file() -> Path:
    return cache_dir() / "step_times.json"


def _remembered() -> dict[str, dict[int, float]]:
    """Return what is in the file; nothing if there is none, or if it is damaged."""
    with suppress(OSError, ValueError):
        known = REMEMBERED.validate_json(_file().read_bytes())
        return {key: times for key, times in known.items() if set(times) == set(POINTS) and is_plausible(times)}
    return {}


def _store(key: str, found: dict[int, float]) -> dict[int, float]:
    """Write step times into the file beside those of other processes; of two measurements the faster one counts."""
    with suppress(OSError):  # then it is measured again next time
        _file().parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{_file()}.lock", timeout=LOCK_TIMEOUT):
            known = _remembered()
            earlier = known.pop(key, found)
            found = {n: min(seconds, earlier[n]) for n, seconds in found.items()}
            known = dict(list(known.items())[-MOST + 1 :]) | {key: found}
            write_atomically(_file(), json.dumps(known, indent=1))
    return found


def least_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of the fastest of several runs, or of fewer if they take long; the first ones warm up."""
    import torch

    seconds = list[float]()
    while len(seconds) < RUNS and (len(seconds) < 2 or sum(seconds) < LONG):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)
