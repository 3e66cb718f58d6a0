"""The steps of an answer, the tags after them, and how the scores of steps become one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Aggregate = Literal["last", "min", "product", "mean"]


def aggregated(scores: Sequence[float], how: Aggregate) -> float:
    """Return one score from those of all steps."""
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
    """How an answer is split into steps, and how these are marked.

    Attributes:
        separator: The text that ends a step; None if the steps are given.
        tag: The text after each step.
        after_tag: The text between a tag and the next step.
    """

    separator: str | None
    tag: str
    after_tag: str = ""

    def split(self, answer: str, ends: Sequence[int] = ()) -> list[str]:
        """Return the steps of an answer, at least one; `ends` are the characters where they end, if that is given."""
        if self.separator is None:
            begins = [0, *ends]
            steps = [answer[begin:end] for begin, end in zip(begins, [*ends, len(answer)], strict=True)]
        else:
            steps = answer.split(self.separator)
        return [step for step in steps if step.strip()] or [answer]

    def tagged(self, steps: Sequence[str]) -> str:
        """Return an answer with a tag after each step."""
        return self.after_tag.join(step + self.tag for step in steps)
