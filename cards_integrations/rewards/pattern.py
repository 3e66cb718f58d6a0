"""What an answer must, and must not, contain."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, model_validator

from cards_integrations.rewards.base import Instant, Response, Reward, RewardLoader, RewardModel
from cards_integrations.rewards.registry import register_reward


def expressions(value: Any) -> Any:
    """Regular expressions as settings give them: one or several, each of which compiles."""
    value = (value,) if isinstance(value, str) else value
    for pattern in value if isinstance(value, (list, tuple)) else ():
        try:
            re.compile(pattern)
        except (re.error, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{str(pattern)[:80]!r} is not a regular expression: {error}") from None
    return value


Patterns = Annotated[tuple[str, ...], BeforeValidator(expressions)]


@register_reward
class PatternReward(Reward):
    """The share of `wanted` regular expressions found, minus the number of `forbidden` ones found.

    Searched in the answer so far, ignoring case unless `case_sensitive`. An answer that can still grow
    is not blamed for what it does not contain yet; what is forbidden counts at once.
    """

    kind: Literal["pattern"] = "pattern"
    wanted: Patterns = ()
    forbidden: Patterns = ()
    case_sensitive: bool = False

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.wanted and not self.forbidden:
            raise ValueError("give wanted=[...] or forbidden=[...]")
        return self

    def build(self, loader: RewardLoader) -> RewardModel:
        return Instant(self.name, self._score)

    def _score(self, response: Response) -> float:
        flags = re.NOFLAG if self.case_sensitive else re.IGNORECASE
        wanted, forbidden = (
            sum(bool(re.search(pattern, response.text, flags)) for pattern in patterns)  # compiled once, by re
            for patterns in (self.wanted, self.forbidden)
        )
        return wanted / max(1, len(self.wanted)) - forbidden
