"""Scales on disk, so that they are measured or calibrated once for all processes."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pydantic_core import PydanticSerializationError

from cards_integrations.decoding.base import Scale
from cards_integrations.models.sources import ModelSource
from cards_integrations.paths import cache_dir, write_atomically
from cards_integrations.rewards.base import Reward

K = TypeVar("K")
V = TypeVar("V")
MAX_FILES = 200
FILES_LEFT = 150  # once there have been more than `MAX_FILES`
MAX_CALIBRATED = 1024  # scales that a process keeps
CALIBRATED: dict[Path, Scale] = {}
"""The scales that this process has calibrated, by file; all its engines use them from that moment on."""


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
                remember(CALIBRATED, self._file(model, reward), scale, MAX_CALIBRATED)

    def calibrated(self, model: ModelSource, reward: Reward) -> Scale | None:
        """Return the scale that this process has calibrated; None if there is none."""
        with suppress(PydanticSerializationError):
            return CALIBRATED.get(self._file(model, reward)) if CALIBRATED and reward.is_reproducible else None
        return None

    def _file(self, model: ModelSource, reward: Reward) -> Path:
        settings = [model.model_dump(mode="json"), reward.model_dump(mode="json", exclude={"scale"})]
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return cache_dir() / "scales" / f"{key[:32]}.json"


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
