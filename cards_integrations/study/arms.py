"""The answers of one method in a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from cards_integrations.study.metrics import Mean, distinct, mean, repeated_3grams, self_bleu
from cards_integrations.study.rows import Row


@dataclass(frozen=True)
class Arm:
    """All answers of one method."""

    name: str
    """The name of the method."""
    rows: tuple[Row, ...]
    """A row for each answer."""

    def mean(self, name: str) -> Mean | None:
        """Average a number of the answers over prompts.

        Args:
            name: The number's key in the rows.

        Returns:
            The mean with its interval; None if no answer has this number.
        """
        known = [(row[name], row["prompt"]) for row in self.rows if row.get(name) is not None]
        return mean([value for value, _ in known], [prompt for _, prompt in known]) if known else None

    @cached_property
    def diversity(self) -> dict[str, float | None]:
        """`distinct_1`, `distinct_2`, and `self_bleu`, which is None where every prompt has one answer."""
        texts = [row["text"] for row in self.rows]
        by_prompt: dict[int, list[str]] = {}
        for row in self.rows:
            by_prompt.setdefault(row["prompt"], []).append(row["text"])
        return {
            "distinct_1": distinct(texts, 1),
            "distinct_2": distinct(texts, 2),
            "self_bleu": self_bleu(list(by_prompt.values())),
        }


def by_name(rows: Sequence[Row]) -> dict[str, Arm]:
    """Group rows by method, in the order in which the methods first occur.

    Rows of earlier versions lack `repeated_3grams`, which is computed from their texts.
    """
    rows = [{"repeated_3grams": repeated_3grams(row["text"])} | row for row in rows]
    names = dict.fromkeys(row["arm"] for row in rows)
    return {name: Arm(name, tuple(row for row in rows if row["arm"] == name)) for name in names}
