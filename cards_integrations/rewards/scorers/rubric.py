"""The text around an answer that a judge reads: the conversation before it, and each question after it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from cards_integrations.chat.answer_frame import AnswerFrame
from cards_integrations.chat.message import Message
from cards_integrations.chat.template import ChatTokenizer, as_text
from cards_integrations.errors import RewardError, SettingsError
from cards_integrations.rewards.base import Conversation, Response
from cards_integrations.rewards.criterion import Criterion, mean_by_criterion, weighted_mean
from cards_integrations.rewards.scorers.answer_ids import AnswerIds
from cards_integrations.rewards.scorers.input_format import InputFormat
from cards_integrations.transformer.prefix_tree import common

SLOTS = re.compile(r"\{prompt\}|\{criterion\}")


class Rubric(InputFormat):
    """A rubric up to where the judge answers, for each wording of each criterion.

    Args:
        chat: The judge's tokenizer.
        rubric: The user's message, a text with slots; or "chat" for the conversation itself.
        criteria: What is asked.
        role: The role of a criterion's message in the conversation.

    Raises:
        SettingsError: The rubric is "chat", and the judge has no chat template.
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
        """All questions, by criterion and wording."""
        return [wording for criterion in self.criteria for wording in criterion.wordings]

    def around(self, conversation: Conversation) -> AnswerFrame:
        return self._around(conversation, self.questions[0])

    def ids(self, conversation: Conversation, drafted: bool, replies: Sequence[Sequence[int]] = ((),)) -> RubricIds:
        """Return the encoder of answers to this conversation.

        Args:
            conversation: The conversation.
            drafted: Whether the judge has the token ids of the language model.
            replies: Tokens that are read after each question, each on its own.

        Raises:
            RewardError: The chat template writes something else before the answer for another question.
        """
        frames = [self._around(conversation, question) for question in self.questions]
        if len({frame.before for frame in frames}) > 1:
            raise RewardError("The judge's chat template tells the criterion before the answer: write a text rubric.")
        return RubricIds(self.chat, frames, replies, self.adds_special_tokens, drafted)

    def rate(self, response: Response, scores: Sequence[float], shows_parts: bool) -> float:
        """Return the score of an answer from those of all questions; on demand, set the parts of the response."""
        by_criterion = mean_by_criterion(self.criteria, scores)
        if shows_parts:
            response.parts |= by_criterion
        return weighted_mean(self.criteria, [*by_criterion.values()])

    def _around(self, conversation: Conversation, question: str) -> AnswerFrame:
        if self.rubric == "chat":
            return self.chat.around_last_but_one(conversation.prompt, Message(role=self.role, content=question))
        slots = {"{prompt}": as_text(conversation.prompt), "{criterion}": question}
        before, _, after = self.rubric.partition("{response}")
        around = (SLOTS.sub(lambda slot: slots[slot[0]], part) for part in (before, after))
        return AnswerFrame(*self.chat.around_part(*around))


class AskedText(NamedTuple):
    """A conversation with an answer and all questions about it, in tokens."""

    ids: list[int]
    """The tokens that all questions have in common, except for the last token of any."""
    answered: int
    """How many of these come before the question."""
    rests: list[list[int]]
    """The rest of each question, with each reply that is read after it."""

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return len(self.ids) + max(map(len, self.rests))

    @property
    def whole(self) -> list[int]:
        """All tokens, the rests one after the other."""
        return [*self.ids, *chain(*self.rests)]


class RubricIds(AnswerIds):
    """Encodes a conversation with an answer, and the questions about it.

    Args:
        chat: The judge's tokenizer.
        frames: For each question the text around the answer; the text before it is the same for all.
        replies: Tokens that are read after each question, each on its own.
        plain: As for `AnswerIds`.
        drafted: As for `AnswerIds`.
    """

    def __init__(
        self, chat: ChatTokenizer, frames: Sequence[AnswerFrame], replies: Sequence[Sequence[int]], plain: bool,
        drafted: bool,
    ) -> None:  # fmt: skip
        super().__init__(chat, frames[0], plain, drafted, ended=False)
        settings = {"plain": plain, "drafted": drafted, "ended": False}
        self._others = [AnswerIds(chat, frame, **settings, encode=self._encode) for frame in frames[1:]]
        self._replies = replies

    def check(self, name: str) -> None:
        """Check that each question has a token after the answer.

        Raises:
            RewardError: One has none.
        """
        if not all(self.chat.encode(each.frame.after) for each in (self, *self._others)):
            raise RewardError(f"reward {name!r}: the rubric has no tokens after {{response}}; ask something there.")

    def __call__(self, response: Response) -> tuple[list[int], int]:
        text = self.apart(response)
        whole = text.whole
        return whole, len(whole) - text.answered

    def apart(self, response: Response) -> AskedText:
        """Return the ids that all questions share, and the rest of each."""
        several = [super().__call__(response), *(ids(response) for ids in self._others)]
        texts = [ids for ids, _ in several]
        same = min([common(texts[0], other) for other in texts[1:]] + [len(ids) - 1 for ids in texts])
        answered = min([len(ids) - after for ids, after in several])
        rests = [[*ids[same:], *reply] for ids in texts for reply in self._replies]
        return AskedText(texts[0][:same], answered, rests)
