"""A language model as judge: how much more it would say yes than no. Nothing is sampled."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.errors import SettingsError
from cards_integrations.models.local.settings import AnyLocalModel
from cards_integrations.rewards.base import Conversation, Loader, Reward, RewardModel
from cards_integrations.rewards.registry import register_reward
from cards_integrations.rewards.scorers.incremental import Incremental
from cards_integrations.rewards.scorers.input_format import InputFormat, around_response
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.kv_memory import KVMemory

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
        judge = loader.causal(self.model, self.name)
        rubric, words = Rubric(judge.chat, self.rubric), _first_tokens(self, judge.chat)
        return IncrementalJudge(self.name, judge.model, rubric, words, judge.same_vocabulary, judge.memory)


class Rubric(InputFormat):
    """The rubric as a user's message, up to where the judge answers."""

    def __init__(self, chat: ChatTokenizer, rubric: str) -> None:
        super().__init__(chat)
        self.rubric = rubric

    def around(self, conversation: Conversation) -> tuple[str, str]:
        return self.chat.around_part(*around_response(self.rubric, conversation.prompt))


class IncrementalJudge(Incremental):
    """The margin between the logits of two tokens, read at the last token of the rubric."""

    def __init__(
        self, name: str, model: Any, rubric: Rubric, words: tuple[int, int], same_vocabulary: bool,
        memory: KVMemory | None = None,
    ) -> None:  # fmt: skip
        super().__init__(name, model, rubric, same_vocabulary, memory)
        self.words = words

    def _score_batch(self, batch: list[ForwardInput]) -> list[float]:
        yes, no = self.words
        rows = self._counted(batch, self.transformer.logits(batch))
        with torch.inference_mode():
            logits = torch.stack([row.value[[yes, no]] for row in rows]).float()
            found: list[float] = (logits[:, 0] - logits[:, 1]).tolist()
        return found


def _first_tokens(settings: JudgeReward, chat: ChatTokenizer) -> tuple[int, int]:
    """How the two words begin where the judge answers; without a template, after a space."""
    yes, no = (chat.encode(word if chat.has_template else " " + word)[:1] for word in settings.words)
    if not yes or not no or yes == no:
        raise SettingsError(f"reward.words={settings.words!r} do not begin with two different tokens of a model.")
    return yes[0], no[0]
