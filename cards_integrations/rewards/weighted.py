"""A weighted sum of rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import FiniteFloat, model_validator

from cards_integrations.rewards.composite import CompositeReward
from cards_integrations.rewards.registry import register_reward


@register_reward
class WeightedReward(CompositeReward):
    """sum_i w_i (r_i - mean_i) / std_i, with mean and standard deviation of part i over plain answers."""

    kind: Literal["weighted"] = "weighted"
    """Names this class in settings files."""
    weights: tuple[FiniteFloat, ...] = ()
    """One for each part; a negative weight asks for less of it. By default equal weights that sum to 1."""

    @model_validator(mode="after")
    def _one_weight_each(self) -> Self:
        if self.weights and len(self.weights) != len(self.rewards):
            raise ValueError(f"{len(self.weights)} weights for {len(self.rewards)} rewards")
        if self.weights and not any(self.weights):
            raise ValueError("all weights are zero")
        return self

    def combine(self, values: Sequence[float]) -> float:
        weights = self.weights or (1 / len(values),) * len(values)
        return sum(weight * value for weight, value in zip(weights, values, strict=True))
