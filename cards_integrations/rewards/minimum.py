"""The worst of several rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from cards_integrations.rewards.composite import CompositeReward
from cards_integrations.rewards.registry import register_reward


@register_reward
class MinReward(CompositeReward):
    """min_i (r_i - mean_i) / std_i: an answer is as good as its weakest side.

    Mean and standard deviation of part i are taken over plain answers, as in `WeightedReward`.
    """

    kind: Literal["min"] = "min"
    """Names this class in settings files."""

    def combine(self, values: Sequence[float]) -> float:
        return min(values)
