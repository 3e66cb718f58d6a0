"""The token ids of a conversation with an answer, as its reward model's own recipe has them."""

from __future__ import annotations

from functools import cached_property

from cards_integrations.chat.answer_frame import AnswerFrame
from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.rewards.base import Response
from cards_integrations.rewards.scorers.turn_encoder import TurnEncoder
from cards_integrations.transformer.prefix_tree import common


class AnswerIds:
    """Encodes a conversation with its answer, which grows.

    The whole rendered text is what counts, for tokens may merge where a template ends and an answer begins.

    Args:
        chat: The reward model's tokenizer.
        frame: The text around the answer.
        plain: Whether the tokenizer adds what it adds to a plain text; a chat template brings its own.
        drafted: Whether ids of the language model's are ids of this model.
        ended: Whether what the tokenizer appends to a plain text is read; not where the model is to go on.
        encode: For texts that begin as this frame does; made here if there is none.
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

        A finished answer has the ids of its text. What is being written, or holds special tokens that its text does
        not show, has those that the language model wrote, if they are known and mean the same here.
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
        return self._something(whole, len(whole) - common(whole, ids))

    def _ended(self, ids: list[int]) -> tuple[list[int], int]:
        return self._something([*ids, *self._after_ids], len(self._after_ids))

    def _something(self, ids: list[int], after: int) -> tuple[list[int], int]:
        """Something must be read."""
        return (ids, after) if ids else ([self.chat.tokenizer.pad_token_id], 1)

    @cached_property
    def _after_stands_alone(self) -> bool:
        """True if what follows the answer begins with a token that merges with nothing, or is nothing."""
        after = self.frame.after
        tokens = self.chat.added_tokens.values()
        return not after or any(after.startswith(str(each)) and not each.lstrip for each in tokens)

    @property
    def _goes_on_from_before(self) -> bool:
        """True if an answer's tokens can follow those before it: none of them merges with the first of the answer."""
        before, known = self.frame.before, self.before_ids
        return not before[-1:].isspace() or self._encode(before + "a")[: len(known)] == known
