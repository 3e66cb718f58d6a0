"""Rewards made of several others, standardised so that they can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from annotated_types import Len

from cards_integrations.rewards.base import Loader, Response, Reward, RewardModel
from cards_integrations.rewards.registry import AnyReward
from cards_integrations.rewards.scorers.composite import Composite


class CompositeReward(Reward):
    """Settings with `rewards`, each of which is standardised: (r - mean) / std, over plain answers."""

    needs_part_scales: ClassVar[bool] = True

    rewards: Annotated[tuple[AnyReward, ...], Len(1)]
    """The parts, each standardised by its `scale`; a scale of None is measured at first use."""

    @property
    def name(self) -> str:
        return f"{self.kind} ({', '.join(reward.name for reward in self.rewards)})"

    @property
    def parts(self) -> tuple[Reward, ...]:
        return self.rewards

    def with_parts(self, parts: Sequence[Reward]) -> Reward:
        return self.model_copy(update={"rewards": tuple(parts)})

    def combine(self, values: Sequence[float]) -> float:
        """Return the score of an answer from the standardised scores of the parts."""
        raise NotImplementedError

    def build(self, loader: Loader) -> RewardModel:
        return Combined(self, [loader[reward] for reward in self.rewards])


class Combined(Composite):
    """Asks all parts and combines their standardised scores as the settings say."""

    def __init__(self, settings: CompositeReward, models: Sequence[RewardModel]) -> None:
        super().__init__(settings.name, models)
        self.settings = settings
        self.scales = [reward.scale or (0.0, 1.0) for reward in settings.rewards]

    async def score(self, responses: Sequence[Response]) -> list[float]:
        found = await self.score_parts(responses)
        standardised = [
            [(value - mean) / (std or 1.0) for value in values]
            for (mean, std), values in zip(self.scales, found, strict=True)
        ]
        return [self.settings.combine(each) for each in zip(*standardised, strict=True)]
