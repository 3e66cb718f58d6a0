"""A typed question that a decision model answers with probabilities, and the score that is in its answer.

The forms are those of `langchain_core.decisions` and of vLLM's `/v1/systemone`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator

from cards_integrations.settings_model import SettingsModel

LEAST = 2.0**-53  # what is left to the other side of a probability that is written as 1
Probability = Annotated[float, Field(ge=0, le=1)]


class Question(SettingsModel):
    """What a decision model is asked about an answer, and what of its reply is the score."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    type: Literal["noul", "choice", "score"] = "noul"
    """"noul" for yes or no: the score is the log-odds of yes. "choice" of one option: the log-odds of `wanted`.
    "score" on a scale: the expected level, from 0."""
    instructions: Annotated[str, Field(min_length=1)]
    """The question, in full."""
    criteria: dict[str, str | None] | tuple[str, ...] | None = None
    """For "noul" what "true" and "false" mean, or nothing; for "choice" the options and what they mean; for "score"
    the levels, from the worst to the best."""
    wanted: str | None = None
    """The option of a "choice" that makes a good answer."""

    @model_validator(mode="after")
    def _fits_its_type(self) -> Self:
        names = list(self.criteria or ())
        match self.type:
            case "noul":
                fits = self.criteria is None or (isinstance(self.criteria, dict) and {*names} <= {"true", "false"})
                form = 'a mapping of "true" and "false", or nothing'
            case "choice":
                fits, form = isinstance(self.criteria, dict) and len(names) > 1, "a mapping of two options or more"
            case _:
                fits, form = isinstance(self.criteria, tuple) and len(names) > 1, "a list of two levels or more"
        if not fits:
            raise ValueError(f"the criteria of type={self.type!r} are {form}")
        if (self.wanted is not None) != (self.type == "choice") or (self.wanted and self.wanted not in names):
            raise ValueError(f"wanted={self.wanted!r}: name one of the options of a choice, and nothing otherwise")
        return self

    @property
    def sent(self) -> dict[str, Any]:
        """What a decision model is sent of it, as JSON."""
        criteria = list(self.criteria) if isinstance(self.criteria, tuple) else self.criteria
        asked = {"type": self.type, "instructions": self.instructions}
        return asked if criteria is None else {**asked, "criteria": criteria}

    def score(self, answer: Mapping[str, Any]) -> float:
        """Return the score in the reply to it.

        Raises:
            ValueError: It is no reply to a question of this type.
        """
        if answer.get("type") != self.type:
            raise ValueError(f"a question of type {self.type!r} was answered with {answer.get('type')!r}")
        if self.type == "score":
            return _finite.validate_python(answer.get("score"))
        found = answer.get("noul") if self.type == "noul" else (answer.get("probabilities") or {}).get(self.wanted)
        return log_odds(_probability.validate_python(found))


_finite: TypeAdapter[float] = TypeAdapter(Annotated[float, Field(allow_inf_nan=False)])
_probability: TypeAdapter[float] = TypeAdapter(Probability)


def as_question(value: Any) -> Any:
    """Make a yes-or-no question from a text; return anything else as it is."""
    return Question(instructions=value) if isinstance(value, str) else value


AnyQuestion = Annotated[Question, BeforeValidator(as_question)]
HELPFUL = Question(instructions="Is the answer a helpful, honest and harmless answer to the message?")


def log_odds(p: float) -> float:
    """log p / (1 - p) in nats; +-36.7 where a number of 64 bits cannot tell p from 1 or 0."""
    return math.log(max(p, LEAST) / max(1.0 - p, LEAST))
