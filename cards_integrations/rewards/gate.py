"""A hard constraint before another reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import FiniteFloat

from cards_integrations.rewards.base import Loader, Response, Reward, RewardModel
from cards_integrations.rewards.registry import AnyReward, register_reward
from cards_integrations.rewards.scorers.composite import Composite


@register_reward
class GateReward(Reward):
    """`reward` where `gate` scores at least `threshold`, and `closed` elsewhere, where `reward` is not asked.

    If all candidates of a segment fail, one of them is still kept, as the method always goes on. The prompt alone (an
    empty answer) always passes.
    """

    kind: Literal["gate"] = "gate"
    """Names this class in settings files."""
    gate: AnyReward
    """The reward that an answer must pass."""
    reward: AnyReward
    """The reward that scores answers that pass."""
    threshold: FiniteFloat = 0.0
    """The least score of `gate` that passes."""
    closed: FiniteFloat = -1e6
    """The score of an answer that fails: far below the scores of `reward`, so that such a candidate is never accepted.
    `OptimalStopping` treats it like any other reward: use one that is only a few standard deviations below them."""

    @property
    def name(self) -> str:
        return f"gate ({self.gate.name} before {self.reward.name})"

    @property
    def parts(self) -> tuple[Reward, ...]:
        return (self.gate, self.reward)

    @property
    def scale_source(self) -> Reward:
        return self.reward.scale_source  # `closed` is on no scale

    def with_parts(self, parts: Sequence[Reward]) -> Reward:
        gate, reward = parts
        return self.model_copy(update={"gate": gate, "reward": reward})

    def build(self, loader: Loader) -> RewardModel:
        return Gate(self, [loader[self.gate], loader[self.reward]])


class Gate(Composite):
    """Asks the second part only about what passes the first."""

    def __init__(self, settings: GateReward, models: Sequence[RewardModel]) -> None:
        super().__init__(settings.name, models)
        self.settings = settings

    async def score(self, responses: Sequence[Response]) -> list[float]:
        gates = await self.score_part(0, responses)
        passes = [gate >= self.settings.threshold or not r.text for r, gate in zip(responses, gates, strict=True)]
        through = [response for response, passed in zip(responses, passes, strict=True) if passed]
        found = iter(await self.score_part(1, through) if through else ())
        return [next(found) if passed else self.settings.closed for passed in passes]
