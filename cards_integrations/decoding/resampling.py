"""Choices among weighted drafts: one of them, or as many as there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

T = TypeVar("T")


def weighted_choice(items: Sequence[T], weights: Sequence[float], uniform: float) -> T:
    """Choose one item with a probability that is proportional to its weight.

    Args:
        items: At least one.
        weights: One for each item, not negative; they need not sum to 1.
        uniform: A uniform random number in [0, 1).
    """
    remaining = uniform * sum(weights)
    for item, weight in zip(items, weights, strict=True):
        remaining -= weight
        if remaining < 0:
            return item
    return items[-1]


def normalized(log_weights: Sequence[float]) -> list[float]:
    """Turn the logarithms of weights into weights that sum to 1."""
    weights = [math.exp(each - max(log_weights)) for each in log_weights]
    return [weight / sum(weights) for weight in weights]


def effective_sample_size(weights: Sequence[float]) -> float:
    """Return 1 / sum w^2, for weights that sum to 1: this many equal weights would estimate equally well."""
    return 1 / sum(weight * weight for weight in weights)


def systematic_resampling(weights: Sequence[float], uniform: float) -> list[int]:
    """Draw as many indices as there are weights, n; index i is drawn floor(n w_i) times, or once more.

    Args:
        weights: They sum to 1.
        uniform: A uniform random number in [0, 1), the only one.

    Returns:
        The indices in ascending order.
    """
    n, upto, chosen, i = len(weights), list(accumulate(weights)), [], 0
    for k in range(n):
        while i < n - 1 and upto[i] <= (k + uniform) / n:
            i += 1
        chosen.append(i)
    return chosen
