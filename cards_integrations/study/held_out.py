"""A held-out reward, which does not guide, over the target of the reward that does: how high a target still helps.

Beyond some target, answers get worse by every other measure while the guiding reward still rises (inference-time
overoptimisation: arXiv 2210.10760, 2506.19248).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cards_integrations.rewards.base import Reward
from cards_integrations.study.metrics import Mean, distinct, mean, points, repeated_3grams
from cards_integrations.trace import Alignment

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Level:
    """Measurements of the answers to the prompts of a calibration with one target."""

    target: float | None
    """The target reward; None for plain answers."""
    beta: float | None
    """The beta; None for plain answers."""
    reward: Mean
    """The mean of the guiding reward."""
    held_out: Mean
    """The mean of the held-out reward."""
    win_rate: Mean | None
    """How often an answer has a higher held-out reward than the plain one, a tie counting half; None for plain
    answers."""
    repeated_3grams: float
    """The share of 3-grams of words that have occurred before in the same answer, in percent."""
    distinct_2: float
    """The number of distinct 2-grams of words over that of all."""
    log_p_per_token: float
    """The mean log p of a token under the language model itself, in nats."""
    tokens: float
    """The mean number of tokens of an answer."""
    looked_at_tokens: float
    """The mean number of tokens of the candidates that were examined for an answer."""
    out_of_reach: float
    """The share of answers without any accepted segment: each of these is the best of the rejected candidates."""
    by_prompt: tuple[float, ...] = field(repr=False, default=())
    """The held-out reward of each answer, in the order of the prompts."""

    def row(self) -> dict[str, Any]:
        """Return the numbers by name; a mean x is three of them: `x`, `x_low` and `x_high`."""
        row: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if name in MEANS:
                low, high = (name + end for end in ("_low", "_high"))
                row |= dict(zip((name, low, high), value or (None,) * 3, strict=True))
            elif name != "by_prompt":
                row[name] = value
        return row


MEANS = ("reward", "held_out", "win_rate")


def measured(
    answers: Sequence[Alignment],
    rewards: Sequence[float],
    held_out: Sequence[float],
    plain: Level | None = None,
    target: float | None = None,
    beta: float | None = None,
) -> Level:
    """Measure answers, one to each prompt.

    Args:
        answers: The answers.
        rewards: Their guiding rewards.
        held_out: Their held-out rewards.
        plain: The measurements of the plain answers to the same prompts; None if these are the plain answers.
        target: The target of the answers; None for plain answers.
        beta: The beta of the answers; None for plain answers.
    """
    n, texts = len(answers), [answer.text for answer in answers]
    examined = [len(draft.token_ids) for a in answers for segment in a.segments for draft in segment.drafts]
    wins = [points(*pair) for pair in zip(held_out, plain.by_prompt, strict=True)] if plain else None
    return Level(
        target=target,
        beta=beta,
        reward=mean(rewards),
        held_out=mean(held_out),
        win_rate=mean(wins) if wins else None,
        repeated_3grams=sum(map(repeated_3grams, texts)) / n,
        distinct_2=distinct(texts, 2),
        log_p_per_token=sum(a.log_likelihood / max(1, len(a.token_ids)) for a in answers) / n,
        tokens=sum(len(a.token_ids) for a in answers) / n,
        looked_at_tokens=sum(examined) / n if plain else sum(len(a.token_ids) for a in answers) / n,
        out_of_reach=sum(a.out_of_reach for a in answers) / n,
        by_prompt=tuple(held_out),
    )


@dataclass(frozen=True)
class HeldOutCurve:
    """The held-out reward over the target, and the target that is chosen by it.

    `peak` is the peak of the best fit that rises up to one level and falls after it. `chosen` is the lowest target
    whose fitted held-out reward is within one standard error (of the paired difference over prompts) of the peak's:
    higher targets cost more tokens, and are not known to help.
    """

    reward: Reward
    """The held-out reward."""
    levels: tuple[Level, ...]
    """Plain answers first, then a level for each target, from the lowest on."""

    @property
    def targets(self) -> tuple[float, ...]:
        """The targets, from the lowest on."""
        return tuple(level.target for level in self.levels if level.target is not None)

    @cached_property
    def fitted(self) -> tuple[float, ...]:
        """The held-out reward of each level, smoothed: up to one peak, and down from it."""
        return tuple(unimodal([level.held_out.value for level in self.levels]).tolist())

    @property
    def peak(self) -> Level:
        """The level with the highest fitted held-out reward, the lowest of them in a tie."""
        return self.levels[self._peak]

    @property
    def chosen(self) -> float:
        """The lowest target that is as good as the peak, within one standard error."""
        peak, fitted = self._peak, self.fitted
        near = (i for i in range(1, peak) if fitted[peak] - fitted[i] <= self._error(i, peak))
        return self.targets[next(near, max(1, peak)) - 1]

    @property
    def parting(self) -> Level | None:
        """The level beyond the peak with the lowest held-out reward, where this and the guiding reward have parted.

        None if they have not: if the guiding reward is not higher there than at the peak, or the held-out reward is not
        lower by more than a standard error.
        """
        worst = min(self.levels[self._peak :], key=lambda level: level.held_out.value)
        rises = worst.reward.value > self.peak.reward.value
        return worst if rises and worst.target is not None and self.is_beyond(worst.target) else None

    def is_beyond(self, target: float) -> bool:
        """Return True if a target that was tried is above the peak, and worse by more than a standard error."""
        index = [level.target for level in self.levels].index(target)
        fall = self.peak.held_out.value - self.levels[index].held_out.value
        return index > self._peak and fall > self._error(index, self._peak)

    @property
    def _peak(self) -> int:
        return int(np.argmax(self.fitted))

    def _error(self, one: int, other: int) -> float:
        """Return the standard error of the difference between two levels, by their indices, paired by prompts."""
        difference = np.subtract(self.levels[one].by_prompt, self.levels[other].by_prompt)
        return float(difference.std(ddof=1) / np.sqrt(len(difference)))

    def rows(self) -> list[dict[str, Any]]:
        """Return the levels as rows of a table, by the names of the fields of `Level`; a mean has `_low` and `_high`.

        Two columns more say which level is the `peak`, and which one was `chosen`.
        """
        return [
            {**level.row(), "peak": level is self.peak, "chosen": level.target == self.chosen} for level in self.levels
        ]

    def __str__(self) -> str:
        lines = [f"Held out, {self.reward.name}, which does not guide:"]
        lines += [_line(level) + self._mark(level) for level in self.levels]
        lines.append(self.conclusion)
        return "\n".join(lines)

    @property
    def conclusion(self) -> str:
        """A sentence on what both rewards do beyond the peak."""
        parting, peak = self.parting, self.peak
        if parting is not None:
            guide, held_out = (
                f"{getattr(parting, name).value - getattr(peak, name).value:+.2g}" for name in ("reward", "held_out")
            )
            return (
                f"Guide and held-out reward part at {_name(peak)}: from there to {_name(parting)} the guide changes "
                f"by {guide}, and the held-out reward by {held_out}."
            )
        if self._peak == len(self.levels) - 1:
            return "The held-out reward still rises at the highest target that was tried."
        return f"Beyond {_name(peak)} the held-out reward does not rise; a clear fall was not seen."

    def _mark(self, level: Level) -> str:
        marks = {"peak": level is self.peak, "chosen": level.target == self.chosen}
        return f"  <- {', '.join(name for name, is_so in marks.items() if is_so)}" if any(marks.values()) else ""


def unimodal(values: Sequence[float]) -> Floats:
    """Return the sequence nearest to the values, by least squares, that rises to one of them and falls after it."""
    found = [np.concatenate([_rising(values[:k]), _rising(values[k:][::-1])[::-1]]) for k in range(1, len(values) + 1)]
    return min(found, key=lambda fit: float(np.square(fit - values).sum()))


def _rising(values: Sequence[float]) -> Floats:
    """Return the nearest sequence that never falls, by pooling adjacent violators."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        total, n = value, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / n:
            before, m = blocks.pop()
            total, n = total + before, n + m
        blocks.append((total, n))
    return np.repeat([total / n for total, n in blocks], [n for _, n in blocks]) if blocks else np.zeros(0)


def _name(level: Level) -> str:
    return "plain answers" if level.target is None else f"target {level.target:.3g}"


def _line(level: Level) -> str:
    won = "" if level.win_rate is None else f", wins {100 * level.win_rate.value:.0f}%"
    return (
        f"{_name(level)}: held-out {level.held_out.value:.3g} [{level.held_out.low:.3g}, {level.held_out.high:.3g}]"
        f"{won}, guide {level.reward.value:.3g}, repeated 3-grams {level.repeated_3grams:.1f}%, "
        f"distinct-2 {level.distinct_2:.2f}, log p {level.log_p_per_token:.2f} a token, "
        f"{level.looked_at_tokens:.0f} tokens looked at"
    )
