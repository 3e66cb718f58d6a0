"""A language model as judge that first writes a critique of a finished answer, and then grades the answer."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cards_integrations.rewards.base import Loader, RewardModel
from cards_integrations.rewards.graded_judge import FIVE, Grades, with_grades
from cards_integrations.rewards.judge import RubricReward
from cards_integrations.rewards.registry import register_reward

RUBRIC = """Here is a message, and an answer to it.

Message: {prompt}

Answer: {response}

{criterion} Write a short critique: what is right, what is wrong, and what is missing."""
VERDICT = "\n\nGrade, from the worst to the best of {grades}: "


@register_reward
class CritiqueJudgeReward(RubricReward):
    """sum_g p(g) value(g) over the judge's grades, after a critique of the answer that it writes.

    Each answer costs a generation of its own, so this is for choosing among finished answers: `BestOfN` and
    `llm.score`. A method that asks for the score of an unfinished answer gets a `RewardError`.
    """

    default_question: ClassVar[str] = "How helpful, honest and harmless is this answer?"

    kind: Literal["critique_judge"] = "critique_judge"
    """Names this class in settings files."""
    rubric: str = RUBRIC
    """As for `JudgeReward`; the critique is the reply to it."""
    verdict: Annotated[str, Field(min_length=1)] = VERDICT
    """A text that is appended to the critique as if the judge had written it, so that its grade follows; `{grades}` are
    the grades."""
    grades: Grades = FIVE
    """As for `GradedJudgeReward`."""
    max_critique_tokens: Annotated[int, Field(ge=1)] = 128
    """Most tokens of a critique; a longer one is cut there before the grade."""
    critiques: Annotated[int, Field(ge=1)] = 1
    """How many critiques are written of each answer; the score is the mean. More than 1 needs a `temperature`."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Temperature of sampling critiques; 0 takes the most probable tokens."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the most probable tokens that together have this probability may be drawn."""
    seed: int = 0
    """Seed of the sampling. The score of an answer does not depend on others that are judged beside it."""

    @model_validator(mode="after")
    def _different_critiques(self) -> Self:
        if self.critiques > 1 and not self.temperature:
            raise ValueError("critiques > 1 needs a temperature above 0: they would all be the same")
        return self

    def build(self, loader: Loader) -> RewardModel:
        from cards_integrations.models.sampling import Sampler
        from cards_integrations.rewards.scorers.critique import Critic, CritiqueJudge
        from cards_integrations.rewards.scorers.rubric import Rubric
        from cards_integrations.rewards.scorers.verdict import Expectation

        judge = loader.causal(self.model, self.name)
        rubric = Rubric(judge.chat, self.rubric, self.asked, self.criterion_role)
        lead, verdict = Expectation.after(with_grades(self.verdict, self.grades), self.grades, judge.chat)
        sampler = Sampler(temperature=self.temperature, top_k=0, top_p=self.top_p)
        critic = Critic(sampler, self.max_critique_tokens, self.critiques, self.seed)
        return CritiqueJudge(self.name, judge, rubric, critic, lead, verdict, bool(self.criteria))
