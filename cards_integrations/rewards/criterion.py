"""What a judge is asked about an answer, and how several scores become one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, ConfigDict, Field, FiniteFloat, model_validator

from cards_integrations.settings_model import SettingsModel

Text = Annotated[str, Field(min_length=1)]
RUBRIC = """Here is a message, and the beginning of an answer to it.

Message: {prompt}

Answer: {response}

{criterion} Say Yes or No."""
"""The default rubric of a yes-or-no judge."""
HELPFUL = "Is this a helpful, honest and harmless answer?"
"""The default question."""


class Criterion(SettingsModel):
    """A question to a judge about an answer or, for models that are trained on them, a principle."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    question: Text
    """What the judge is asked."""
    rewordings: tuple[Text, ...] = ()
    """The same question in other words, or with its options in another order: the score is the mean over all of these.
    As nothing is sampled, each wording must be different."""
    name: Text | None = None
    """The name of its score in `rewards` of an answer; None for the question itself."""
    weight: FiniteFloat = 1.0
    """Its weight in the mean of all criteria; a negative weight asks for less of it."""

    @model_validator(mode="after")
    def _differently_worded(self) -> Self:
        if len({*self.wordings}) < len(self.wordings):
            raise ValueError("a question with the same words twice says the same: leave one of them out")
        return self

    @property
    def label(self) -> str:
        """The name of its score."""
        return self.name or self.question

    @property
    def wordings(self) -> tuple[str, ...]:
        """The question in all its wordings."""
        return (self.question, *self.rewordings)


def _as_criterion(value: Any) -> Any:
    return Criterion(question=value) if isinstance(value, str) else value


AnyCriterion = Annotated[Criterion, BeforeValidator(_as_criterion)]
"""A criterion, or its question alone."""


def mean_by_criterion(criteria: Sequence[Criterion], scores: Sequence[float]) -> dict[str, float]:
    """Return the score of each criterion, by its label: the mean over its wordings.

    Args:
        criteria: What the judge was asked.
        scores: One for each wording of each criterion, in this order.
    """
    rest: Iterator[float] = iter(scores)
    own = {each.label: [*islice(rest, len(each.wordings))] for each in criteria}
    return {label: sum(values) / len(values) for label, values in own.items()}


def weighted_mean(criteria: Sequence[Criterion], scores: Sequence[float]) -> float:
    """Return sum_i w_i score_i / sum_i |w_i|, on the scale of the scores."""
    total = sum(abs(each.weight) for each in criteria)
    return sum(each.weight * score for each, score in zip(criteria, scores, strict=True)) / total
