"""A language model as judge: the margin between two words that it could answer with."""

from __future__ import annotations

from typing import Any

import torch

from cards_integrations.chat.answer_frame import AnswerFrame
from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.errors import SettingsError
from cards_integrations.rewards.base import Conversation
from cards_integrations.rewards.scorers.incremental import Incremental
from cards_integrations.rewards.scorers.input_format import InputFormat, around_response
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.kv_memory import KVMemory


class Rubric(InputFormat):
    """The rubric as a user's message, up to where the judge answers."""

    def __init__(self, chat: ChatTokenizer, rubric: str) -> None:
        super().__init__(chat)
        self.rubric = rubric

    def around(self, conversation: Conversation) -> AnswerFrame:
        return AnswerFrame(*self.chat.around_part(*around_response(self.rubric, conversation.prompt)))


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


def first_tokens(words: tuple[str, str], chat: ChatTokenizer) -> tuple[int, int]:
    """Return the tokens that the two words begin with where the judge answers; without a template, after a space.

    Raises:
        SettingsError: They begin with the same token, or with none.
    """
    yes, no = (chat.encode(word if chat.has_template else " " + word)[:1] for word in words)
    if not yes or not no or yes == no:
        raise SettingsError(f"reward.words={words!r} do not begin with two different tokens of a model.")
    return yes[0], no[0]
