"""The steps of an answer, the tags behind them, and what the scores of steps are together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Aggregate = Literal["last", "min", "product", "mean"]


def aggregated(scores: Sequence[float], how: Aggregate) -> float:
    """Return one score for those of all steps."""
    match how:
        case "last":
            return scores[-1]
        case "min":
            return min(scores)
        case "product":
            return math.prod(scores)
        case "mean":
            return sum(scores) / len(scores)


@dataclass(frozen=True)
class Steps:
    """How an answer is taken apart, and how its steps are marked.

    Attributes:
        separator: What ends a step; None where the steps are given.
        tag: What stands behind each step.
        after_tag: What stands between a tag and the next step.
    """

    separator: str | None
    tag: str
    after_tag: str = ""

    def split(self, answer: str, ends: Sequence[int] = ()) -> list[str]:
        """Return the steps of an answer, one at least; `ends` are where they end, in characters, if they are given."""
        if self.separator is None:
            begins = [0, *ends]
            steps = [answer[begin:end] for begin, end in zip(begins, [*ends, len(answer)], strict=True)]
        else:
            steps = answer.split(self.separator)
        return [step for step in steps if step.strip()] or [answer]

    def tagged(self, steps: Sequence[str]) -> str:
        """Return an answer with a tag behind each step."""
        return self.after_tag.join(step + self.tag for step in steps)
