"""When a candidate is kept: the adaptive threshold on its reward, and the two acceptance rules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Threshold:
    """The reward that a candidate is measured against; it rises with the text (CARDS, section 3.3).

        tau(t) = min(r0 + t (r* - r0) / n, r*)

    Attributes:
        start: r0, the threshold of an empty text.
        target: r*, the threshold of a text of `max_tokens` tokens.
        max_tokens: n, the most tokens of an answer.
    """

    start: float
    target: float
    max_tokens: int

    @classmethod
    def adaptive(cls, prompt_reward: float, target: float, alpha: float, max_tokens: int) -> Threshold:
        """Make a threshold that starts at r0 = (1 - alpha) r(x) + alpha r*.

        Args:
            prompt_reward: r(x), the reward of the prompt with an empty answer.
            target: r*, the reward that a whole answer should have.
            alpha: Where the threshold starts: 0 is the prompt's own reward, 1 the target.
            max_tokens: n, the most tokens of an answer.
        """
        return cls((1 - alpha) * prompt_reward + alpha * target, target, max_tokens)

    def at(self, tokens: int) -> float:
        """Return tau(t) for a text of so many tokens."""
        return min(self.start + tokens * (self.target - self.start) / self.max_tokens, self.target)


@dataclass(frozen=True)
class Acceptance:
    """Quasi-rejection sampling: a candidate is accepted with probability min(1, exp((r - tau) / beta)).

    Attributes:
        rule: "soft" as above; "hard" accepts if r >= tau, and nothing else.
        beta: Temperature of the reward, in units of the reward.
    """

    rule: Literal["soft", "hard"]
    beta: float

    def probability(self, reward: float, threshold: float) -> float:
        """Return the probability that a candidate with this reward is accepted."""
        if reward >= threshold:
            return 1.0
        return 0.0 if self.rule == "hard" else math.exp((reward - threshold) / self.beta)

    def __call__(self, reward: float, threshold: float, uniform: float) -> bool:
        """Decide by a uniform random number in [0, 1)."""
        return uniform < self.probability(reward, threshold)
