"""On which scale a reward scores a model's plain answers: published, remembered, or measured at first use."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import statistics
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from pydantic_core import PydanticSerializationError

from cards_integrations.decoding.base import Scale
from cards_integrations.models.sources import ModelSource
from cards_integrations.paths import cache_dir, write_atomically
from cards_integrations.rewards.base import Reward

MAX_MEASURED = 128  # rewards whose measured scales an engine keeps
log = logging.getLogger("cards_integrations")


class ScaleStore:
    """Scales on disk, by model and reward, for rewards that mean the same in another process."""

    def get(self, model: ModelSource, reward: Reward) -> Scale | None:
        """Return the stored scale; None if there is none, or if its file is damaged."""
        with suppress(OSError, ValueError, PydanticSerializationError):
            if reward.is_reproducible:
                return Scale.model_validate_json(self._file(model, reward).read_text())
        return None

    def put(self, model: ModelSource, reward: Reward, scale: Scale) -> None:
        """Store a scale; if that is not possible, it is measured again next time."""
        with suppress(OSError, PydanticSerializationError):
            if reward.is_reproducible:
                write_atomically(self._file(model, reward), scale.model_dump_json())

    def _file(self, model: ModelSource, reward: Reward) -> Path:
        settings = [model.model_dump(mode="json"), reward.model_dump(mode="json", exclude={"scale"})]
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return cache_dir() / "scales" / f"{key[:32]}.json"


class Scales:
    """The scales that one engine needs; each is measured once, however many requests wait for it.

    Args:
        model: The language model that writes the plain answers.
        measure: Gives the rewards of plain answers to the prompts that suit a reward.
    """

    def __init__(self, model: ModelSource, measure: Callable[[Reward], Awaitable[list[float]]]) -> None:
        self.model = model
        self.measure = measure
        self.store = ScaleStore()
        self.measuring: dict[Reward, asyncio.Task[Scale]] = {}  # and what was measured

    @property
    def measured(self) -> int:
        """Rewards whose scale was measured here, or is being measured."""
        return len(self.measuring)

    async def of(self, reward: Reward) -> Scale:
        """The scale of a reward: what a calibration stored, else what the reward publishes, else measured now."""
        source = reward.scale_source
        for known in (reward, source):
            stored = self.store.get(self.model, known)
            if stored is not None:
                return stored
            if known.scale is not None:
                mean, std = known.scale
                return Scale(mean=mean, std=std)
        if source not in self.measuring:
            for old in [measured for measured, task in self.measuring.items() if task.done()][: -MAX_MEASURED + 1]:
                del self.measuring[old]  # there may be a reward for each request
            self.measuring[source] = task = asyncio.create_task(self._measure(source))
            task.add_done_callback(lambda task: self._forget_failure(source, task))
        return await asyncio.shield(self.measuring[source])  # whoever gives up does not stop it for the others

    async def standardised(self, reward: Reward) -> Reward:
        """The reward with the scales of its parts, as far as it needs them."""
        if not reward.parts:
            return reward
        parts = [await self.standardised(part) for part in reward.parts]
        if reward.needs_part_scales:
            parts = [part if part.scale else await self._with_scale(part) for part in parts]
        return reward.with_parts(parts)

    async def _with_scale(self, part: Reward) -> Reward:
        scale = await self.of(part)
        return part.model_copy(update={"scale": (scale.mean, scale.std)})

    async def _measure(self, reward: Reward) -> Scale:
        log.warning(
            "measuring the scale of reward %r on %d plain answers of %s, once; not with target_reward= and beta=",
            reward.name, len(reward.prompts), self.model.model,
        )  # fmt: skip
        found = await self.measure(reward)
        scale = Scale(mean=statistics.fmean(found), std=statistics.stdev(found) if len(found) > 1 else 0.0)
        log.warning("reward %r: mean %.3g, standard deviation %.3g", reward.name, scale.mean, scale.std)
        if scale.std == 0:
            log.warning("reward %r gives every plain answer %.3g: it cannot guide", reward.name, scale.mean)
        self.store.put(self.model, reward, scale)
        return scale

    def _forget_failure(self, reward: Reward, task: asyncio.Task[Scale]) -> None:
        """Let the next request measure again what could not be measured."""
        if task.cancelled() or task.exception() is not None:
            self.measuring.pop(reward, None)
