"""A hard constraint in front of another reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import FiniteFloat

from cards_integrations.rewards.base import Response, Reward, RewardLoader, RewardModel
from cards_integrations.rewards.composite import Composite
from cards_integrations.rewards.registry import AnyReward, register_reward


@register_reward
class GateReward(Reward):
    """`reward` where `gate` scores at least `threshold`, and `closed` elsewhere, where `reward` is not asked.

    `closed` has to lie far below what the reward gives, so that such a candidate is never accepted.
    If all candidates of a segment fail, one of them is kept all the same: the method always goes on.
    The prompt alone, an empty answer, is not held up. `OptimalStopping` takes what is closed for a
    reward like others: for that rule let `closed` lie only a few spreads below them.
    """

    kind: Literal["gate"] = "gate"
    gate: AnyReward
    reward: AnyReward
    threshold: FiniteFloat = 0.0
    closed: FiniteFloat = -1e6

    @property
    def name(self) -> str:
        return f"gate ({self.gate.name} before {self.reward.name})"

    @property
    def parts(self) -> tuple[Reward, ...]:
        return (self.gate, self.reward)

    @property
    def scaled_like(self) -> Reward:
        return self.reward.scaled_like  # `closed` is no measure of anything

    def with_parts(self, parts: Sequence[Reward]) -> Reward:
        gate, reward = parts
        return self.model_copy(update={"gate": gate, "reward": reward})

    def build(self, loader: RewardLoader) -> RewardModel:
        return Gate(self, [loader[self.gate], loader[self.reward]])


class Gate(Composite):
    def __init__(self, settings: GateReward, models: Sequence[RewardModel]) -> None:
        super().__init__(settings.name, models)
        self.settings = settings

    async def score(self, responses: Sequence[Response]) -> list[float]:
        scores = await self.part(0, responses)
        opens = [s >= self.settings.threshold or not r.text for r, s in zip(responses, scores, strict=True)]
        through = [response for response, through in zip(responses, opens, strict=True) if through]
        found = iter(await self.part(1, through) if through else ())
        return [next(found) if through else self.settings.closed for through in opens]
