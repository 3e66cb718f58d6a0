"""The scale on which a reward scores plain answers of a model: published, remembered, or measured at first use."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import statistics
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic_core import PydanticSerializationError

from cards_integrations.decoding.base import Scale
from cards_integrations.models.sources import ModelSource
from cards_integrations.paths import cache_dir, write_atomically
from cards_integrations.rewards.base import Reward
from cards_integrations.trace import ScaleOrigin

K = TypeVar("K")
V = TypeVar("V")
MAX_MEASURED = 128  # rewards whose measured scales an engine keeps
MAX_LOOKED_UP = 1024  # rewards of which an engine knows what was stored when it first asked
MAX_FILES = 200
FILES_LEFT = 150  # once there have been more than `MAX_FILES`
TRIAL = "Yes."  # the answer on which a reward is tried before answers are drafted for its scale
log = logging.getLogger("cards_integrations")
CALIBRATED: dict[Path, Scale] = {}
"""The scales that this process has calibrated, by file; all its engines use them from that moment on."""


class KnownScale(NamedTuple):
    """A scale, and where it came from."""

    scale: Scale
    origin: ScaleOrigin


class ScaleStore:
    """Scales on disk, by model and reward, for rewards that are the same in another process.

    The least recently used files are removed, those without a calibration first.
    """

    def get(self, model: ModelSource, reward: Reward) -> Scale | None:
        """Return the stored scale; None if there is none, or if its file is damaged."""
        with suppress(OSError, ValueError, PydanticSerializationError):
            if reward.is_reproducible:
                file = self._file(model, reward)
                scale = Scale.model_validate_json(file.read_text())
                with suppress(OSError):  # of another user
                    os.utime(file)
                return scale
        return None

    def put(self, model: ModelSource, reward: Reward, scale: Scale) -> None:
        """Store a scale. If that is not possible, the scale is measured again next time."""
        with suppress(OSError, PydanticSerializationError):
            if reward.is_reproducible:
                file = self._file(model, reward)
                write_atomically(file, scale.model_dump_json())
                _tidy(file.parent)

    def calibrate(self, model: ModelSource, reward: Reward, scale: Scale) -> None:
        """Store a scale that a calibration has chosen; the engines of this process use it from now on."""
        self.put(model, reward, scale)
        with suppress(PydanticSerializationError):
            if reward.is_reproducible:
                remember(CALIBRATED, self._file(model, reward), scale, MAX_LOOKED_UP)

    def calibrated(self, model: ModelSource, reward: Reward) -> Scale | None:
        """Return the scale that this process has calibrated; None if there is none."""
        with suppress(PydanticSerializationError):
            return CALIBRATED.get(self._file(model, reward)) if CALIBRATED and reward.is_reproducible else None
        return None

    def _file(self, model: ModelSource, reward: Reward) -> Path:
        settings = [model.model_dump(mode="json"), reward.model_dump(mode="json", exclude={"scale"})]
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return cache_dir() / "scales" / f"{key[:32]}.json"


class Scales:
    """The scales that one engine needs; each is measured once, however many requests wait for it.

    A stored scale is read once, so that a calibration in another process does not change the answers of this one.

    Args:
        model: The language model that writes the plain answers.
        measure: Returns the rewards of plain answers to the prompts that suit a reward.
    """

    def __init__(self, model: ModelSource, measure: Callable[[Reward], Awaitable[list[float]]]) -> None:
        self.model = model
        self.measure = measure
        self.store = ScaleStore()
        self.looked_up: dict[Reward, KnownScale | None] = {}
        self.measuring: dict[Reward, asyncio.Task[Scale]] = {}  # tasks that have ended included

    @property
    def measured(self) -> int:
        """Rewards whose scale was measured here, or is being measured."""
        return len(self.measuring)

    async def of(self, reward: Reward) -> Scale:
        """Return the scale of a reward."""
        return (await self.known(reward)).scale

    async def known(self, reward: Reward) -> KnownScale:
        """Return the scale of a reward: as a calibration stored it, as the reward publishes it, or as measured now."""
        source = reward.scale_source
        for each in (reward, source):
            if (known := self._look_up(each)) is not None:
                return known
        if source not in self.measuring:
            for old in [measured for measured, task in self.measuring.items() if task.done()][: -MAX_MEASURED + 1]:
                del self.measuring[old]  # there may be a reward for each request
            self.measuring[source] = task = asyncio.create_task(self._measure(source))
            task.add_done_callback(lambda task: self._forget_failure(source, task))
        # shielded: a request that gives up does not stop the measurement for others
        return KnownScale(await asyncio.shield(self.measuring[source]), "measured")

    def _look_up(self, reward: Reward) -> KnownScale | None:
        """Return the scale if it is known without measuring."""
        if (calibrated := self.store.calibrated(self.model, reward)) is not None:
            return KnownScale(calibrated, "remembered")
        if reward not in self.looked_up:
            remember(self.looked_up, reward, self._read(reward), MAX_LOOKED_UP)
        return self.looked_up[reward]

    def _read(self, reward: Reward) -> KnownScale | None:
        stored = self.store.get(self.model, reward)
        if stored is not None:
            return KnownScale(stored, "remembered")
        if (published := reward.published_scale) is not None:
            mean, std = published
            return KnownScale(Scale(mean=mean, std=std), "published")
        return None

    async def standardised(self, reward: Reward) -> Reward:
        """Return the reward with the scales of its parts filled in, where it needs them."""
        if not reward.parts:
            return reward
        parts = [await self.standardised(part) for part in reward.parts]
        parts = [
            await self._with_scale(part) if reward.needs_scale_of(i) and not part.scale else part
            for i, part in enumerate(parts)
        ]
        return reward.with_parts(parts)

    async def _with_scale(self, part: Reward) -> Reward:
        scale = await self.of(part)
        return part.model_copy(update={"scale": (scale.mean, scale.std)})

    async def _measure(self, reward: Reward) -> Scale:
        log.info("measuring the scale of reward %r on %d plain answers, once", reward.name, len(reward.prompts))
        found = await self.measure(reward)
        scale = Scale(mean=statistics.fmean(found), std=statistics.stdev(found) if len(found) > 1 else 0.0)
        log.info("reward %r: plain answers have mean %.3g, standard deviation %.3g", reward.name, scale.mean, scale.std)
        if scale.std == 0:
            log.warning("The reward %r cannot guide: it gives every plain answer %.3g.", reward.name, scale.mean)
        self.store.put(self.model, reward, scale)
        return scale

    def _forget_failure(self, reward: Reward, task: asyncio.Task[Scale]) -> None:
        """Let the next request measure again if a measurement failed."""
        if task.cancelled() or task.exception() is not None:
            self.measuring.pop(reward, None)


def remember(table: dict[K, V], key: K, value: V, most: int) -> None:
    """Put a value into a table, and drop the oldest entries beyond `most`."""
    table[key] = value
    while len(table) > most:
        del table[next(iter(table))]


def _tidy(folder: Path) -> None:
    files = list(folder.iterdir())
    if len(files) > MAX_FILES:
        oldest = sorted(files, key=lambda file: (_is_calibrated(file), file.lstat().st_mtime))
        for file in oldest[:-FILES_LEFT]:
            with suppress(OSError):  # another process was faster
                file.unlink()


def _is_calibrated(file: Path) -> bool:
    with suppress(OSError, ValueError):
        return Scale.model_validate_json(file.read_text()).target is not None
    return False
