"""The result of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cards_integrations.study import comparison_report
from cards_integrations.study.arms import Arm, by_name
from cards_integrations.study.metrics import Mean, mean, points
from cards_integrations.study.rows import Row, read_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

REQUIRED_FIELDS = {"arm", "prompt", "asked", "text"}
REWARDS = ("judged", "reward")  # the one that does not guide first
COSTS = ("drafted_tokens", "looked_at_tokens", "drafts", "lm_forwards", "lm_tokens", "rm_forwards", "rm_tokens")


@dataclass(frozen=True)
class Comparison:
    """The answers of several methods to the same prompts."""

    rows: tuple[Row, ...]
    """A row for each answer."""

    @cached_property
    def arms(self) -> dict[str, Arm]:
        """The answers of each method by its name, in the order in which the methods ran."""
        return by_name(self.rows)

    @classmethod
    def load(cls, *files: str | Path) -> Comparison:
        """Read files that `compare` wrote.

        Raises:
            SettingsError: A file cannot be read, or is not one of answers.
        """
        return cls(tuple(row for file in files for row in read_rows(file, REQUIRED_FIELDS)))

    def difference(self, one: str, other: str, name: str) -> Mean:
        """Average the paired difference between two arms over the prompts that both have answered.

        Args:
            one: The name of an arm.
            other: The name of the arm that is subtracted.
            name: The key of a number in the rows, such as "reward", "judged" or "seconds".
        """
        one_means, other_means = self._prompt_means(one, name), self._prompt_means(other, name)
        shared = sorted(one_means.keys() & other_means.keys())
        return mean([one_means[prompt] - other_means[prompt] for prompt in shared])

    @property
    def baseline(self) -> str:
        """The name of the arm that the others are compared with: that of plain answers, else the first one."""
        plain = [name for name, arm in self.arms.items() if _is_plain(arm.rows[0])]
        return next(iter([*plain, *self.arms]))

    def win_rate(self, one: str, other: str, name: str) -> Mean | None:
        """Average over prompts how often one arm's answer has the higher number; a tie counts half.

        Args:
            one: The name of an arm.
            other: The name of the arm whose answers, to the same prompts with the same seeds, are compared with.
            name: The key of a number in the rows, such as "reward" or "judged".

        Returns:
            The share with its interval; None if no answers can be compared.
        """
        theirs = {_asked(row): row[name] for row in self.arms[other].rows if row.get(name) is not None}
        ours = [row for row in self.arms[one].rows if row.get(name) is not None and _asked(row) in theirs]
        if not ours:
            return None
        return mean([points(row[name], theirs[_asked(row)]) for row in ours], [row["prompt"] for row in ours])

    @cached_property
    def wins(self) -> dict[str, dict[str, Mean | None]]:
        """For each arm, its win rates over the baseline by the name of the reward; None for the baseline itself."""
        others = {name: self.baseline for name in self.arms if name != self.baseline}
        return {
            arm: {name: self.win_rate(arm, others[arm], name) if arm in others else None for name in REWARDS}
            for arm in self.arms
        }

    def _prompt_means(self, arm: str, name: str) -> dict[int, float]:
        by_prompt: dict[int, list[float]] = {}
        for row in self.arms[arm].rows:
            by_prompt.setdefault(row["prompt"], []).append(row[name])
        return {prompt: sum(values) / len(values) for prompt, values in by_prompt.items()}

    def cost_at(self, level: float, cost: str, family: Sequence[str], reward: str = "judged") -> float | None:
        """Interpolate what a family of arms (best-of-4, -8, -16, ...) pays for a mean reward.

        The interpolation is linear in the reward and in the logarithm of the cost.

        Args:
            level: The mean reward.
            cost: The key of the cost in the rows, such as "drafted_tokens" or "seconds".
            family: The names of the arms.
            reward: The key of the reward in the rows: "reward" or "judged".

        Returns:
            The cost; None if the level is outside the range of the family.
        """
        import numpy as np

        points = []
        for name in family:
            reached, paid = self.arms[name].mean(reward), self.arms[name].mean(cost)
            if reached is not None and paid is not None:
                points.append((reached.value, float(np.log(paid.value))))
        points.sort()
        if not points or not points[0][0] <= level <= points[-1][0]:
            return None
        rewards, costs = zip(*points, strict=True)
        return float(np.exp(np.interp(level, rewards, costs)))

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return, for each arm, its means with their intervals by name, its win rates, and its diversity."""
        names = ("reward", "judged", "repeated_3grams", "log_p_per_token", "tokens", "seconds", *COSTS)
        return {
            name: {
                **{number: arm.mean(number) for number in names},
                **{f"{reward}_win_rate": rate for reward, rate in self.wins[name].items()},
                **arm.diversity,
            }
            for name, arm in self.arms.items()
        }

    def table(self) -> Table:
        """Return the means as a table for a terminal."""
        return comparison_report.table(list(self.arms.values()), self.wins, self.baseline)

    def plot(self, cost: str = "drafted_tokens") -> Figure:
        """Draw mean rewards over their cost, with 95% intervals.

        Args:
            cost: The key of the cost in the rows.
        """
        return comparison_report.frontier(list(self.arms.values()), cost)

    def to_html(self, path: str | Path) -> Path:
        """Write a page that opens offline, with the table, the charts and example answers.

        Args:
            path: The file to write.

        Returns:
            Its path.
        """
        path = Path(path)
        path.write_text(
            comparison_report.page(list(self.arms.values()), self.wins, self.baseline, self.rows), encoding="utf-8"
        )
        return path


def _is_plain(row: Row) -> bool:
    settings = row.get("settings")
    decoding = settings.get("decoding") if isinstance(settings, dict) else None
    return isinstance(decoding, dict) and decoding.get("method") == "sampling"


def _asked(row: Row) -> tuple[Any, Any]:
    return row["prompt"], row.get("seed")
