"""How long a forward takes, by its number of tokens: measured once on a machine, and remembered.

What is drafted ahead depends on it, so it must not change from run to run: in half precision the
rounding of a product depends on the shape of the batch, and a seed would not give the same text.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cards_integrations.models.local.embedded import cache_dir

POINTS = (1, 16, 64)
MOST = 200  # models to remember


class StepTimes:
    """Seconds of a forward, between and beyond the measured points."""

    def __init__(self, measured: dict[int, float]) -> None:
        self.tokens = np.array(sorted(measured))
        self.seconds = np.maximum.accumulate([measured[n] for n in self.tokens])
        last = slice(-2, None)
        self.each = float(np.diff(self.seconds[last])[0] / np.diff(self.tokens[last])[0])

    @classmethod
    def together(cls, several: Iterable[StepTimes]) -> StepTimes:
        """Of forwards that run one after another."""
        each = list(several)
        return cls({n: sum(float(times.upto(n)[-1]) for times in each) for n in POINTS})

    def upto(self, most: int) -> NDArray[np.float64]:
        """For 1, 2, ... `most` tokens."""
        n = np.arange(1, most + 1)
        beyond = np.maximum(0, n - self.tokens[-1]) * self.each
        seconds: NDArray[np.float64] = np.interp(n, self.tokens, self.seconds) + beyond
        return seconds

    @property
    def fixed(self) -> float:
        """What one takes at least."""
        return float(self.seconds[0])


def step_times(what: str, model: Any, measure: Callable[[int], float]) -> StepTimes:
    """Those of a model on this machine; `measure(n)` is asked only if it is not known yet."""
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.node()
    threads = torch.get_num_threads()
    key = f"{what} {model.name_or_path} {model.dtype} on {device} {threads} torch {torch.__version__}"
    file = cache_dir() / "step_times.json"
    known: dict[str, dict[str, float]] = {}
    with suppress(OSError, ValueError):
        known = json.loads(file.read_text())
    if key not in known:
        known = dict(list(known.items())[-MOST + 1 :]) | {key: {str(n): measure(n) for n in POINTS}}
        with suppress(OSError):  # then it is measured again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            fresh = file.with_suffix(f".{os.getpid()}")
            fresh.write_text(json.dumps(known, indent=1))
            fresh.replace(file)
    return StepTimes({int(n): seconds for n, seconds in known[key].items()})


def least_seconds(work: Callable[[], Any], device: torch.device, times: int = 5) -> float:
    """Of several runs, the first of which warm up."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)
