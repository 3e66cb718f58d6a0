"""What a judge reads around an answer: the conversation before it, and each question after it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from cards_integrations.chat.message import Message
from cards_integrations.chat.template import ChatTokenizer, as_text
from cards_integrations.errors import RewardError, SettingsError
from cards_integrations.rewards.base import Conversation
from cards_integrations.rewards.criterion import Criterion
from cards_integrations.rewards.scorers.input_format import InputFormat
from cards_integrations.transformer.prefix_tree import common

SLOTS = re.compile(r"\{prompt\}|\{criterion\}")


class Suffixes(NamedTuple):
    """The tokens that follow an answer: those that all questions begin with, and the rest of each."""

    shared: list[int]
    rests: list[list[int]]

    @classmethod
    def of(cls, suffixes: Sequence[list[int]]) -> Suffixes:
        """Split what follows an answer; at least the last token of each is left to its own rest."""
        first, *others = suffixes
        same = min([common(first, other) for other in others] + [max(0, len(each) - 1) for each in suffixes])
        return cls(first[:same], [each[same:] for each in suffixes])

    def check(self, name: str) -> None:
        """Check that something is asked: what is read with a question has to follow some token of it.

        Raises:
            RewardError: It names the reward.
        """
        if not all(self.rests):
            raise RewardError(f"reward {name!r}: the rubric has no tokens after {{response}}; ask something there.")


class Rubric(InputFormat):
    """A rubric up to where the judge answers, for each wording of each criterion.

    Args:
        chat: The judge's tokenizer.
        rubric: A text with slots that a user says, or "chat" for the conversation itself.
        criteria: What is asked.
        role: Whose message a criterion is in the conversation.

    Raises:
        SettingsError: The judge has no chat template, but the rubric is to be a conversation in it.
    """

    def __init__(self, chat: ChatTokenizer, rubric: str, criteria: Sequence[Criterion], role: str = "user") -> None:
        super().__init__(chat)
        if rubric == "chat" and not chat.has_template:
            raise SettingsError("rubric='chat' needs a judge with a chat template: write the rubric as a text.")
        self.rubric = rubric
        self.criteria = criteria
        self.role = role

    @property
    def questions(self) -> list[str]:
        """All that is asked."""
        return [wording for criterion in self.criteria for wording in criterion.wordings]

    def around(self, conversation: Conversation) -> tuple[str, str]:
        return self._around(conversation, self.questions[0])

    def asked(self, conversation: Conversation) -> tuple[str, Suffixes]:
        """Return the text before the answer, and the tokens of all questions after it.

        Raises:
            RewardError: The chat template writes something else before the answer for another question.
        """
        befores, afters = zip(*(self._around(conversation, question) for question in self.questions), strict=True)
        if len({*befores}) > 1:
            raise RewardError("The judge's chat template tells the criterion before the answer: write a text rubric.")
        return befores[0], Suffixes.of([self.chat.encode(after) for after in afters])

    def _around(self, conversation: Conversation, question: str) -> tuple[str, str]:
        if self.rubric == "chat":
            return self.chat.around_last_but_one(conversation.prompt, Message(role=self.role, content=question))
        slots = {"{prompt}": as_text(conversation.prompt), "{criterion}": question}
        before, _, after = self.rubric.partition("{response}")
        return self.chat.around_part(*(SLOTS.sub(lambda slot: slots[slot[0]], part) for part in (before, after)))
