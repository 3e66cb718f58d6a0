"""When a candidate is kept: the rising threshold on its reward, and the two acceptance rules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Threshold:
    """tau(t) = min(r0 + t (r* - r0) / n, r*), with t tokens of n written (section 3.3).

    `start` is r0 = (1 - alpha) r(x) + alpha r*, between the prompt's own reward and the target.
    """

    start: float
    target: float
    length: int

    @classmethod
    def rising(cls, prompt_reward: float, target: float, alpha: float, length: int) -> Threshold:
        return cls((1 - alpha) * prompt_reward + alpha * target, target, length)

    def at(self, tokens: int) -> float:
        return min(self.start + tokens * (self.target - self.start) / self.length, self.target)


@dataclass(frozen=True)
class Acceptance:
    """Quasi-rejection: accept with probability min(1, exp((r - tau) / beta)); `hard`: when r >= tau."""

    rule: Literal["soft", "hard"]
    beta: float

    def probability(self, reward: float, threshold: float) -> float:
        if reward >= threshold:
            return 1.0
        return 0.0 if self.rule == "hard" else math.exp((reward - threshold) / self.beta)

    def __call__(self, reward: float, threshold: float, uniform: float) -> bool:
        return uniform < self.probability(reward, threshold)
