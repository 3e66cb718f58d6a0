"""What an answer must, and must not, contain."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, model_validator

from cards_integrations.rewards.base import Instant, Loader, Response, Reward, RewardModel
from cards_integrations.rewards.registry import register_reward


def regular_expressions(value: Any) -> Any:
    """Check regular expressions as settings give them.

    Args:
        value: One pattern or several; anything else is left for pydantic to refuse.

    Returns:
        The patterns as a sequence.

    Raises:
        ValueError: One of them does not compile.
    """
    value = (value,) if isinstance(value, str) else value
    for pattern in value if isinstance(value, (list, tuple)) else ():
        try:
            re.compile(pattern)
        except (re.error, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{str(pattern)[:80]!r} is not a regular expression: {error}") from None
    return value


Patterns = Annotated[tuple[str, ...], BeforeValidator(regular_expressions)]


@register_reward
class PatternReward(Reward):
    """The share of `wanted` regular expressions found, minus the number of `forbidden` ones found.

    An answer that can still grow is not penalised for what it does not contain yet; what is forbidden
    counts at once.
    """

    kind: Literal["pattern"] = "pattern"
    """Names this class in settings files."""
    wanted: Patterns = ()
    """Regular expressions to be found in the answer."""
    forbidden: Patterns = ()
    """Regular expressions that must not be found in it; at least one pattern is needed in the two lists."""
    case_sensitive: bool = False
    """Whether upper and lower case are told apart."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.wanted and not self.forbidden:
            raise ValueError("give wanted=[...] or forbidden=[...]")
        return self

    def build(self, loader: Loader) -> RewardModel:
        return Instant(self.name, self._score)

    def _score(self, response: Response) -> float:
        flags = re.NOFLAG if self.case_sensitive else re.IGNORECASE
        wanted, forbidden = (
            sum(bool(re.search(pattern, response.text, flags)) for pattern in patterns)  # compiled once, by re
            for patterns in (self.wanted, self.forbidden)
        )
        return wanted / max(1, len(self.wanted)) - forbidden
