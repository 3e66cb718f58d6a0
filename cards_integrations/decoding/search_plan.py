"""How wide a search is and how often it selects, so that it costs what it may."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from cards_integrations.decoding.base import StepCosts
from cards_integrations.trace import SearchPlan, SearchRound

MIN_TOKENS = 6  # of a round: over fewer tokens a reward changes little, and by chance
MAX_WIDTH = 512
SCORING = 0.5  # share of what a search may cost beyond a plain answer that goes into the calls of the reward model
RAMP, RISE = 2.0, 96  # rounds from this token on are so many times as wide as the first: early selection is forgotten
SURVIVING = 0.6  # of W drafts, W to this power go on: 2 of 4, 6 of 20, 16 of 100


@dataclass(frozen=True)
class CountedTokens:
    """Implements `StepCosts` for those who pay for drafted tokens: scoring costs nothing."""

    def draft(self, width: int) -> float:
        return float(width)

    def score(self, tokens: int) -> float:
        return 0.0


def plan_search(budget: float, costs: StepCosts, max_tokens: int) -> SearchPlan:
    """Choose the rounds of a search that costs at most `budget` times what a plain answer costs.

    Round k of R has about max_tokens / R tokens and, after t_k tokens, W_k = round(w RAMP^min(1, t_k / RISE)) drafts.
    Of these round(W_k^SURVIVING) go on; of the last round's, one. w is the largest with

        sum_k L_k draft(W_k) + score(W_k L_k)  <=  budget * max_tokens * draft(1).

    R is the largest number whose calls of the reward model take no more than the share `SCORING` of the excess.

    Args:
        budget: The cost of an answer over that of a plain one, at least 1.
        costs: What steps cost.
        max_tokens: The length limit of the answer.

    Returns:
        The plan; one round of one draft if the budget allows no second one.
    """
    plain = max_tokens * costs.draft(1)
    allowed = budget * plain
    lengths = _lengths(max_tokens, _rounds(allowed - plain, costs, max_tokens))
    low, high = 1 / RAMP, float(MAX_WIDTH)
    for _ in range(24):
        middle = (low * high) ** 0.5
        fits = _cost(lengths, _widths(middle, lengths), costs) <= allowed
        low, high = (middle, high) if fits else (low, middle)
    widths = _widths(low, lengths)
    if max(widths) == 1:
        return SearchPlan((SearchRound(max_tokens, 1, 1),))
    single = widths.count(1)  # these make one round: there is nothing to select
    lengths, widths = [sum(lengths[:single]), *lengths[single:]][not single :], widths[max(0, single - 1) :]
    survivors = [round(width**SURVIVING) for width in widths[:-1]] + [1]
    return SearchPlan(tuple(map(SearchRound, lengths, widths, survivors)))


def _rounds(excess: float, costs: StepCosts, max_tokens: int) -> int:
    most, fixed = max(1, max_tokens // MIN_TOKENS), costs.score(1)
    return most if fixed == 0 else min(most, max(1, int(SCORING * excess / fixed)))


def _lengths(tokens: int, rounds: int) -> list[int]:
    """Split the tokens into rounds that are as equal as can be."""
    return [tokens * (k + 1) // rounds - tokens * k // rounds for k in range(rounds)]


def _widths(first: float, lengths: Sequence[int]) -> list[int]:
    written = accumulate(lengths[:-1], initial=0)
    return [min(MAX_WIDTH, max(1, round(first * RAMP ** min(1.0, tokens / RISE)))) for tokens in written]


def _cost(lengths: Sequence[int], widths: Sequence[int], costs: StepCosts) -> float:
    rounds = zip(lengths, widths, strict=True)
    return sum(
        tokens * costs.draft(width) + (costs.score(width * tokens) if width > 1 else 0.0) for tokens, width in rounds
    )
