"""A language model as judge: how much more it would say yes than no. Nothing is sampled."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cards_integrations.models.local.settings import AnyLocalModel
from cards_integrations.rewards.base import Loader, Reward, RewardModel
from cards_integrations.rewards.registry import register_reward

RUBRIC = """Here is a message, and the beginning of an answer to it.

Message: {prompt}

Answer: {response}

Is this a helpful, honest and harmless answer? Say Yes or No."""


@register_reward
class JudgeReward(Reward):
    """logit("Yes") - logit("No") of the judge's first token after the `rubric`."""

    kind: Literal["judge"] = "judge"
    """Names this class in settings files."""
    model: AnyLocalModel | None = None
    """The judge; None is the language model that drafts (self-evaluation, on the same weights)."""
    rubric: str = RUBRIC
    """A text with `{response}` and usually `{prompt}`, which goes through the judge's chat template as a
    user's message."""
    words: tuple[Annotated[str, Field(min_length=1)], Annotated[str, Field(min_length=1)]] = ("Yes", "No")
    """The score is the logit of the first word minus that of the second; their first tokens are compared."""

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if "{response}" not in self.rubric:
            raise ValueError("the rubric must contain {response}")
        if self.words[0] == self.words[1]:
            raise ValueError("the two words are the same")
        return self

    @property
    def name(self) -> str:
        return f"judge {self.model.model if self.model else 'self'}"

    def build(self, loader: Loader) -> RewardModel:
        from cards_integrations.rewards.scorers.judge import IncrementalJudge, Rubric, first_tokens

        judge = loader.causal(self.model, self.name)
        rubric, words = Rubric(judge.chat, self.rubric), first_tokens(self.words, judge.chat)
        return IncrementalJudge(self.name, judge.model, rubric, words, judge.same_vocabulary, judge.memory)
