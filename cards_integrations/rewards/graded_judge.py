"""A language model as judge: the mean of the grades that it could give, by their probabilities; nothing is sampled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Len
from pydantic import AfterValidator, BeforeValidator, Field, FiniteFloat, PlainSerializer

from cards_integrations.rewards.base import Loader, RewardModel
from cards_integrations.rewards.judge import RubricReward
from cards_integrations.rewards.registry import register_reward

RUBRIC = """Here is a message, and the beginning of an answer to it.

Message: {prompt}

Answer: {response}

{criterion} Reply with a single grade, from the worst to the best: {grades}."""


def _as_pairs(value: Any) -> Any:
    """Return a mapping of words to values as pairs; words alone get the values 1, 2, ... in their order."""
    if isinstance(value, Mapping):
        return tuple((str(word), number) for word, number in value.items())
    if isinstance(value, (list, tuple)) and value and all(isinstance(word, (str, int)) for word in value):
        return tuple((str(word), number) for number, word in enumerate(value, 1))
    return value


def _different(grades: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
    words, values = zip(*grades, strict=True)
    if len({*words}) < len(words):
        raise ValueError("two grades are the same word")
    if len({*values}) == 1:
        raise ValueError("all grades have the same value: they cannot tell answers apart")
    return grades


Grades = Annotated[
    tuple[tuple[Annotated[str, Field(min_length=1)], FiniteFloat], ...],
    Len(2),
    BeforeValidator(_as_pairs, json_schema_input_type=dict[str, float]),
    AfterValidator(_different),
    PlainSerializer(dict, return_type=dict[str, float]),
]
"""The grades that a judge may give, with their values: given as a mapping or as words alone, held as pairs."""
FIVE = tuple((str(grade), float(grade)) for grade in range(1, 6))


def with_grades(text: str, grades: Grades) -> str:
    """Return a text with `{grades}` replaced by the grades, from the worst to the best."""
    words = [word for word, _ in sorted(grades, key=lambda grade: grade[1])]
    return text.replace("{grades}", ", ".join(words))


@register_reward
class GradedJudgeReward(RubricReward):
    """sum_g p(g) value(g): the expectation over the grades that the judge could reply with after the `rubric`.

    p is the judge's probability of each grade, normalised over the grades. With `criteria`, it is the weighted mean of
    such expectations, each of which is a part of the score.
    """

    default_question: ClassVar[str] = "How helpful, honest and harmless is this answer?"

    kind: Literal["graded_judge"] = "graded_judge"
    """Names this class in settings files."""
    rubric: str = RUBRIC
    """As for `JudgeReward`; `{grades}` are the grades."""
    grades: Grades = FIVE
    """The grades that the judge may give: words with values, or words alone from the worst (1) to the best. A grade of
    several tokens counts with all of them, so that "10" does not count as "1"."""

    def build(self, loader: Loader) -> RewardModel:
        from cards_integrations.rewards.scorers.judge import IncrementalJudge
        from cards_integrations.rewards.scorers.rubric import Rubric
        from cards_integrations.rewards.scorers.verdict import Expectation

        judge = loader.causal(self.model, self.name)
        rubric = Rubric(judge.chat, with_grades(self.rubric, self.grades), self.asked, self.criterion_role)
        verdict = Expectation.of(self.grades, judge.chat)
        return IncrementalJudge(self.name, judge, rubric, verdict, bool(self.criteria))
