"""On which scale a reward scores a model's plain answers: published, remembered, or measured at first use."""

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

from pydantic_core import PydanticSerializationError

from cards_integrations.decoding.base import Scale
from cards_integrations.models.sources import ModelSource
from cards_integrations.paths import cache_dir
from cards_integrations.rewards.base import Reward

MOST = 128  # rewards whose scales are remembered
log = logging.getLogger("cards_integrations")


class ScaleStore:
    """Scales on disk, by model and reward."""

    def get(self, model: ModelSource, reward: Reward) -> Scale | None:
        with suppress(OSError, ValueError, PydanticSerializationError):
            if reward.lasting:
                return Scale.model_validate_json(self._file(model, reward).read_text())
        return None

    def put(self, model: ModelSource, reward: Reward, scale: Scale) -> None:
        with suppress(OSError, PydanticSerializationError):  # then it is measured again next time
            if not reward.lasting:
                return
            file = self._file(model, reward)
            file.parent.mkdir(parents=True, exist_ok=True)
            fresh = file.with_suffix(f".{os.getpid()}")
            fresh.write_text(scale.model_dump_json())
            fresh.replace(file)

    def _file(self, model: ModelSource, reward: Reward) -> Path:
        settings = [model.model_dump(mode="json"), reward.model_dump(mode="json", exclude={"scale"})]
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return cache_dir() / "scales" / f"{key[:32]}.json"


Rewarded = Callable[[Reward], Awaitable[list[float]]]
"""Rewards of plain answers to the prompts that suit a reward."""


class Scales:
    """The scales that one engine needs; each is measured once, however many requests wait for it."""

    def __init__(self, model: ModelSource, measure: Rewarded) -> None:
        self.model = model
        self.measure = measure
        self.store = ScaleStore()
        self.measuring: dict[Reward, asyncio.Task[Scale]] = {}  # and what was measured

    @property
    def measured(self) -> int:
        """Rewards whose scale was measured here, or is being measured."""
        return len(self.measuring)

    async def of(self, reward: Reward) -> Scale:
        """What a calibration has remembered, else what the reward publishes, else what is measured now."""
        alike = reward.scaled_like
        for known in (reward, alike):
            stored = self.store.get(self.model, known)
            if stored is not None:
                return stored
            if known.scale is not None:
                mean, spread = known.scale
                return Scale(mean=mean, std=spread)
        if alike not in self.measuring:
            for old in [measured for measured, task in self.measuring.items() if task.done()][: -MOST + 1]:
                del self.measuring[old]  # there may be a reward for each request
            self.measuring[alike] = task = asyncio.create_task(self._measure(alike))
            task.add_done_callback(lambda task: self._measured(alike, task))
        return await asyncio.shield(self.measuring[alike])  # whoever gives up does not stop it for the others

    def _measured(self, reward: Reward, task: asyncio.Task[Scale]) -> None:
        if task.cancelled() or task.exception() is not None:
            self.measuring.pop(reward, None)  # the next request tries again

    async def standardised(self, reward: Reward) -> Reward:
        """The reward with the scales of its parts, as far as it needs them."""
        if not reward.parts:
            return reward
        parts = [await self.standardised(part) for part in reward.parts]
        if reward.standardises:
            parts = [part if part.scale else await self._scaled(part) for part in parts]
        return reward.with_parts(parts)

    async def _scaled(self, part: Reward) -> Reward:
        scale = await self.of(part)
        return part.model_copy(update={"scale": (scale.mean, scale.std)})

    async def _measure(self, reward: Reward) -> Scale:
        log.warning(
            "measuring the scale of reward %r on %d plain answers of %s, once; target_reward= and beta= spare it",
            reward.name,
            len(reward.prompts),
            self.model.model,
        )
        found = await self.measure(reward)
        scale = Scale(mean=statistics.fmean(found), std=statistics.stdev(found) if len(found) > 1 else 0.0)
        log.warning("reward %r: mean %.3g, spread %.3g", reward.name, scale.mean, scale.std)
        if scale.std == 0:
            log.warning("reward %r gives every plain answer %.3g: it cannot guide", reward.name, scale.mean)
        self.store.put(self.model, reward, scale)
        return scale
