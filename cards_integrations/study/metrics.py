"""Metrics of answers: means with intervals, correlations, wins, and repetition within and between answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cards_integrations.rewards.scorers.repetition import repeated_share

BOOTSTRAP_SAMPLES = 2000


class Mean(NamedTuple):
    """A mean and its 95% bootstrap interval."""

    value: float
    low: float
    """The lower end of the interval."""
    high: float
    """The upper end of the interval."""

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def mean(values: Sequence[float], groups: Sequence[object] | None = None, seed: int = 0) -> Mean:
    """Average values, with a bootstrap interval.

    Args:
        values: The values, at least one.
        groups: The group of each value, such as its prompt. The mean is that of the means of the groups, and the
            bootstrap resamples groups.
        seed: The seed of the bootstrap.
    """
    data = np.asarray(values, dtype=float)
    if groups is not None:
        sums: dict[object, list[float]] = {}
        for value, group in zip(data, groups, strict=True):
            sums.setdefault(group, []).append(float(value))
        data = np.array([np.mean(each) for each in sums.values()])
    rng = np.random.default_rng(seed)
    drawn = data[rng.integers(len(data), size=(BOOTSTRAP_SAMPLES, len(data)))].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Mean(float(data.mean()), float(low), float(high))


def pearson(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the linear correlation of two series; 0 if one of them is constant."""
    a, b = (np.asarray(values, dtype=float) for values in (one, other))
    return 0.0 if a.std() == 0 or b.std() == 0 else float(np.corrcoef(a, b)[0, 1])


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the correlation of the ranks of two series; equal values have their mean rank."""
    return pearson(*(_ranks(np.asarray(values, dtype=float)) for values in (one, other)))


def _ranks(values: np.ndarray) -> list[float]:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return list((np.cumsum(counts) - (counts - 1) / 2)[which])


def points(one: float, other: float) -> float:
    """Return 1.0 if the first number is higher, 0.5 if both are equal, and 0.0 otherwise."""
    return 0.5 if one == other else float(one > other)


def repeated_3grams(text: str) -> float:
    """Return, in percent, the share of a text's 3-grams of words that have occurred in it before."""
    return 100 * repeated_share(text, 3)


def distinct(texts: Sequence[str], n: int) -> float:
    """Return distinct-n, the number of distinct n-grams of words over that of all (Li et al., arXiv 1510.03055)."""
    grams = [tuple(words[i : i + n]) for text in texts for words in [text.split()] for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(groups: Sequence[Sequence[str]]) -> float | None:
    """Return the mean BLEU-4 of an answer against the others to the same prompt (arXiv 1802.01886).

    Args:
        groups: The answers to each prompt.

    Returns:
        The mean; None if no prompt has several answers.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smooth = SmoothingFunction().method1
    scores = []
    for texts in groups:
        words = [text.split() for text in texts]
        for i, answer in enumerate(words):
            others = words[:i] + words[i + 1 :]
            if others and answer:
                scores.append(sentence_bleu(others, answer, smoothing_function=smooth))
    return float(np.mean(scores)) if scores else None
