"""The token ids of a conversation whose answer has tags behind its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cards_integrations.chat.answer_frame import AnswerFrame
from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.rewards.scorers.turn_encoder import TurnEncoder
from cards_integrations.rewards.steps import Steps
from cards_integrations.transformer.prefix_tree import common


class TaggedIds(NamedTuple):
    """All ids up to the last tag, and where the tags' last tokens are."""

    ids: list[int]
    tags: list[int]
    suffix: int
    """Tokens of the last tag, which do not stay where its step goes on."""


class StepIds:
    """Encodes a conversation whose answer has tags.

    What is tagged is encoded as a whole, and the tags are found in it; or each step is encoded by itself, as TRL does
    it for tags that are no tokens of their own.

    Args:
        chat: The model's tokenizer.
        frame: What is read around the answer.
        plain: Whether the tokenizer adds what it adds to a plain text.
        steps: How steps are marked.
        one_by_one: Whether each step is encoded by itself.
    """

    def __init__(
        self, chat: ChatTokenizer, frame: AnswerFrame, plain: bool, steps: Steps, one_by_one: bool = False
    ) -> None:
        self.frame = frame
        self.steps = steps
        self.chat = chat
        self._encode = TurnEncoder(chat, frame.before, plain)
        self.before_ids = self._encode.before_ids
        self._tag_ids = chat.encode(steps.tag)
        self._each = one_by_one

    def __call__(self, steps: Sequence[str]) -> TaggedIds:
        """Encode the conversation with these steps."""
        if self._each:
            return self._one_by_one(steps)
        text = self.frame.upto(self.steps.tagged(steps))
        ids = self._encode(text)
        begin = common(ids, self.before_ids)
        tags = [place for place, token in enumerate(ids) if token == self._tag_ids[-1] and place >= begin]
        if len(tags) != len(steps) or tags[-1] != len(ids) - 1:  # an answer may have a tag of its own
            return self._one_by_one(steps)
        without = self._encode(text.removesuffix(self.steps.tag))
        return TaggedIds(ids, tags, len(ids) - common(ids, without))

    def _one_by_one(self, steps: Sequence[str]) -> TaggedIds:
        ids, tags, between = [*self.before_ids], list[int](), self.chat.encode(self.steps.after_tag)
        for step in steps:
            ids += [*(between if tags else ()), *self.chat.encode(step), *self._tag_ids]
            tags.append(len(ids) - 1)
        return TaggedIds(ids, tags, len(self._tag_ids))
