"""The token ids of a conversation with an answer, by the reward model's own recipe."""

from __future__ import annotations

from functools import cached_property

from cards_integrations.chat.answer_frame import AnswerFrame
from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.rewards.base import Response
from cards_integrations.rewards.scorers.turn_encoder import TurnEncoder
from cards_integrations.transformer.prefix_tree import common


class AnswerIds:
    """Encodes a conversation with a growing answer.

    The rendered text is encoded as a whole, because tokens may merge where the template ends and the answer begins.

    Args:
        chat: The reward model's tokenizer.
        frame: The text around the answer.
        plain: Whether the tokenizer adds its special tokens; a chat template brings its own.
        drafted: Whether this model has the token ids of the language model.
        ended: Whether what the tokenizer appends to a plain text is read. It is not where the model is to go on.
        encode: Encodes texts that begin like this frame; by default made here.
    """

    def __init__(
        self, chat: ChatTokenizer, frame: AnswerFrame, plain: bool = False, drafted: bool = False, ended: bool = True,
        encode: TurnEncoder | None = None,
    ) -> None:  # fmt: skip
        self.chat = chat
        self.frame = frame
        self._encode = encode or TurnEncoder(chat, frame.before, plain)
        self.before_ids = self._encode.before_ids
        self._appended = chat.appended if plain and ended else []
        self._after_ids = [*chat.encode(frame.after), *self._appended]
        self._special = frozenset(chat.tokenizer.all_special_ids)
        self._takes_drafted = drafted and self._goes_on_from_before

    def __call__(self, response: Response) -> tuple[list[int], int]:
        """Return all ids, and how many of them come after the answer.

        A finished answer has the ids of its text. An unfinished one, or one with special tokens that its text does not
        show, has the ids that the language model wrote, if they are known and mean the same here.
        """
        if (drafted := response.ids) is not None and self._takes_drafted:
            as_written = not response.finished or any(token in self._special for token in drafted)
            if as_written and self.frame.shown(response.text) == response.text:
                return self._ended([*self.before_ids, *drafted])
        text = self.frame.upto(response.text)
        ids = self._encode(text)
        if self._after_stands_alone:
            return self._ended(ids)
        whole = [*self._encode(text + self.frame.after), *self._appended]
        return self._not_empty(whole, len(whole) - common(whole, ids))

    def _ended(self, ids: list[int]) -> tuple[list[int], int]:
        return self._not_empty([*ids, *self._after_ids], len(self._after_ids))

    def _not_empty(self, ids: list[int], after: int) -> tuple[list[int], int]:
        """Replace no ids at all by a padding token, as the model must read something."""
        return (ids, after) if ids else ([self.chat.tokenizer.pad_token_id], 1)

    @cached_property
    def _after_stands_alone(self) -> bool:
        """True if what follows the answer begins with a token that merges with no other, or is empty."""
        after = self.frame.after
        tokens = self.chat.added_tokens.values()
        return not after or any(after.startswith(str(each)) and not each.lstrip for each in tokens)

    @property
    def _goes_on_from_before(self) -> bool:
        """True if the tokens of an answer can follow those before it, because the text before it merges with none."""
        before, known = self.frame.before, self.before_ids
        return not before[-1:].isspace() or self._encode(before + "a")[: len(known)] == known
