"""A reward with a guard against being gamed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from cards_integrations.rewards.base import Loader, Response, Reward, RewardModel
from cards_integrations.rewards.fluency import FluencyReward
from cards_integrations.rewards.registry import AnyReward, register_reward
from cards_integrations.rewards.scorers.composite import Composite


@register_reward
class GuardedReward(Reward):
    """r + weight * std * min(0, guard), where std is the standard deviation of the reward r over plain answers.

    A guard is a reward that is 0 for an answer without objections, and negative otherwise: `FluencyReward`, or
    `PatternReward(forbidden=[...])`. An answer without objections has the reward itself, whose scale, target and beta
    stay valid. Unlike `GateReward` it weighs: a better answer may repeat itself a little.
    """

    kind: Literal["guarded"] = "guarded"
    """Names this class in settings files."""
    reward: AnyReward
    """The reward that guides."""
    guard: AnyReward = FluencyReward()
    """The reward that lowers the score where it is negative."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 20.0
    """Standard deviations of the reward for each unit of the guard. At 20, an answer that is 5% repetition loses one
    standard deviation."""

    @property
    def name(self) -> str:
        return f"{self.reward.name}, guarded by {self.guard.name}"

    @property
    def parts(self) -> tuple[Reward, ...]:
        return (self.reward, self.guard)

    def needs_scale_of(self, part: int) -> bool:
        return part == 0

    @property
    def scale_source(self) -> Reward:
        return self.reward.scale_source

    @property
    def prompts(self) -> Sequence[tuple[str, tuple[str, ...]]]:
        return self.reward.prompts

    def with_parts(self, parts: Sequence[Reward]) -> Reward:
        reward, guard = parts
        return self.model_copy(update={"reward": reward, "guard": guard})

    def build(self, loader: Loader) -> RewardModel:
        return Guarded(self, [loader[self.reward], loader[self.guard]])


class Guarded(Composite):
    """Asks both parts about all answers."""

    def __init__(self, settings: GuardedReward, models: Sequence[RewardModel]) -> None:
        super().__init__(settings.name, models)
        _, std = settings.reward.scale or (0.0, 1.0)
        self.weight = settings.weight * (std or 1.0)

    async def score(self, responses: Sequence[Response]) -> list[float]:
        rewards, guards = await self.score_parts(responses)
        return [reward + self.weight * min(0.0, guard) for reward, guard in zip(rewards, guards, strict=True)]
