"""A language model as judge: how much rather it would say yes than no; nothing is sampled."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cards_integrations.models.local.settings import AnyLocalModel
from cards_integrations.rewards.base import Loader, Reward, RewardModel
from cards_integrations.rewards.criterion import HELPFUL, RUBRIC, AnyCriterion, Criterion
from cards_integrations.rewards.registry import register_reward


class RubricReward(Reward):
    """Settings of a language model that reads an answer in a rubric, and is asked about it."""

    default_question: ClassVar[str] = HELPFUL
    """What is asked if there are no criteria."""

    model: AnyLocalModel | None = None
    """The judge; None is the language model that drafts (self-evaluation, on the same weights)."""
    rubric: str = RUBRIC
    """A text with `{response}`, usually `{prompt}` and, after `{response}`, `{criterion}`. It goes through the judge's
    chat template as a message of the user. "chat" is the conversation itself in that template, then the answer and, as
    the next message, the criterion: the form that judges trained on principles expect."""
    criteria: tuple[AnyCriterion, ...] = ()
    """What is asked, one by one; each gives a part of the score. A text is a question of weight 1. What comes before
    `{criterion}` is read once for all of them. By default: whether the answer is helpful, honest and harmless."""
    criterion_role: Annotated[str, Field(min_length=1)] = "user"
    """The role of the criterion's message in the rubric "chat": the user, or a role that the template has
    ("principle")."""

    @model_validator(mode="after")
    def _usable(self) -> Self:
        before, _, after = self.rubric.partition("{response}")
        if self.rubric == "chat":
            pass
        elif "{response}" not in self.rubric:
            raise ValueError("the rubric must contain {response}, or be 'chat'")
        elif "{criterion}" in before or (self.criteria and "{criterion}" not in after):
            raise ValueError("the rubric must contain {criterion} after {response}: what is before it is read once")
        elif self.criterion_role != "user":
            raise ValueError("criterion_role is for rubric='chat'; in a text the user says all of it")
        return self

    @model_validator(mode="after")
    def _distinct_criteria(self) -> Self:
        labels = [each.label for each in self.criteria]
        if len({*labels}) < len(labels):
            raise ValueError(f"two criteria have the same name: {', '.join(map(repr, labels))}")
        if self.criteria and not any(each.weight for each in self.criteria):
            raise ValueError("all weights are zero")
        return self

    @property
    def name(self) -> str:
        return f"{self.kind} {self.model.model if self.model else 'self'}"

    @property
    def asked(self) -> tuple[Criterion, ...]:
        """The criteria, or the default question."""
        return self.criteria or (Criterion(question=self.default_question),)


@register_reward
class JudgeReward(RubricReward):
    """logit("Yes") - logit("No") of the judge's first token after the `rubric`.

    With `criteria`, it is the weighted mean of such margins, each of which is a part of the score.
    """

    kind: Literal["judge"] = "judge"
    """Names this class in settings files."""
    words: tuple[Annotated[str, Field(min_length=1)], Annotated[str, Field(min_length=1)]] = ("Yes", "No")
    """The score is the logit of the first word minus that of the second; their first tokens are compared."""

    @model_validator(mode="after")
    def _two_words(self) -> Self:
        if self.words[0] == self.words[1]:
            raise ValueError("the two words are the same")
        return self

    def build(self, loader: Loader) -> RewardModel:
        from cards_integrations.rewards.scorers.judge import IncrementalJudge
        from cards_integrations.rewards.scorers.rubric import Rubric
        from cards_integrations.rewards.scorers.verdict import Margin

        judge = loader.causal(self.model, self.name)
        rubric = Rubric(judge.chat, self.rubric, self.asked, self.criterion_role)
        return IncrementalJudge(self.name, judge, rubric, Margin.of(self.words, judge.chat), bool(self.criteria))
