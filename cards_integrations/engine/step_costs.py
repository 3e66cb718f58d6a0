"""The cost of steps, for methods that plan by it."""

from __future__ import annotations

from dataclasses import dataclass

from cards_integrations.transformer.step_times import StepTimes


@dataclass(frozen=True)
class SharedStepCosts:
    """Implements `decoding.base.StepCosts` with step times, for equal requests that run side by side.

    Attributes:
        drafting: Times of a step, by its number of candidates.
        scoring: Times of a call of the reward model, by its number of tokens; in the same unit.
        requests: How many requests run.
    """

    drafting: StepTimes
    scoring: StepTimes
    requests: int

    def draft(self, width: int) -> float:
        return self.drafting.at(width * self.requests)

    def score(self, tokens: int) -> float:
        return self.scoring.at(tokens * self.requests)
