"""How long a forward takes, by its number of tokens: measured once on a machine, and remembered.

What is drafted ahead depends on it, so it must not change from run to run: in half precision the
rounding of a product depends on the shape of the batch, and a seed would not give the same text.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from cards_integrations.paths import cache_dir, write_atomically

if TYPE_CHECKING:
    import torch

POINTS = (1, 16, 64)  # numbers of tokens that are measured
MOST = 200  # models to remember

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
        self.tokens = np.array(sorted(measured))
        self.seconds = np.maximum.accumulate([measured[n] for n in self.tokens])
        last = slice(-2, None)
        self.per_token = float(np.diff(self.seconds[last])[0] / np.diff(self.tokens[last])[0])

    @classmethod
    def together(cls, several: Iterable[StepTimes]) -> StepTimes:
        """Return the times of forwards that run one after another."""
        each = list(several)
        return cls({n: sum(float(times.upto(n)[-1]) for times in each) for n in POINTS})

    def upto(self, most: int) -> NDArray[np.float64]:
        """Return the seconds of forwards with 1, 2, ... `most` tokens, (most,)."""
        n = np.arange(1, most + 1)
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
        measure: Measures the seconds of a forward with so many tokens.
    """
    import torch

    from cards_integrations.transformer.quantization import precision

    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.node()
    threads = torch.get_num_threads()
    key = f"{what} {model.name_or_path} {precision(model)} on {device} {threads} torch {torch.__version__}"
    known = _remembered()
    if key not in known:
        known = dict(list(known.items())[-MOST + 1 :]) | {key: {n: measure(n) for n in POINTS}}
        with suppress(OSError):  # then it is measured again next time
            write_atomically(_file(), json.dumps(known, indent=1))
    return StepTimes(known[key])


def _file() -> Path:
    return cache_dir() / "step_times.json"


def _remembered() -> dict[str, dict[int, float]]:
    """What the file says; nothing if there is none, or if it is damaged."""
    with suppress(OSError, ValueError):
        known = REMEMBERED.validate_json(_file().read_bytes())
        return {key: times for key, times in known.items() if set(times) == set(POINTS)}
    return {}


def least_seconds(work: Callable[[], Any], device: torch.device, times: int = 5) -> float:
    """Return the seconds of the fastest of several runs, the first of which warm up."""
    import torch

    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)
