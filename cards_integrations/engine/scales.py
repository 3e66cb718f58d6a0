"""The scale on which a reward scores plain answers of a model: remembered, published, or measured at first use."""

from __future__ import annotations

import asyncio
import logging
import statistics
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from cards_integrations.decoding.base import Scale
from cards_integrations.engine.scale_store import ScaleStore, remember
from cards_integrations.models.sources import ModelSource
from cards_integrations.rewards.base import Reward
from cards_integrations.trace import ScaleOrigin

MAX_MEASURED = 128  # rewards whose measured scales an engine keeps
MAX_LOOKED_UP = 1024  # rewards of which an engine knows what was stored when it first asked
TRIAL = "Yes."  # the answer on which a reward is tried before answers are drafted for its scale
log = logging.getLogger("cards_integrations")


class KnownScale(NamedTuple):
    """A scale, and where it came from."""

    scale: Scale
    origin: ScaleOrigin


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
