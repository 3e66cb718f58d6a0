"""Incremental detokenising: the text of a growing answer, at the cost of its last tokens.

`tokenizers.decoders.DecodeStream` is not used: it holds back the text of a token that ends in the middle of a
character, and with byte fallback its text differs from that of decoding all ids.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from random import Random
from weakref import WeakKeyDictionary

from cards_integrations.chat.answer_start import NOTHING_BEFORE, AnswerStart
from cards_integrations.chat.message import PARTIAL_CHARACTER
from cards_integrations.chat.template import ChatTokenizer

log = logging.getLogger("cards_integrations")
OVERLAP = 6  # tokens that a window has before the new ones
LONGEST = 16  # tokens; a longer window moves
TRIED = 2, 40  # texts on which a tokenizer is tested, and tokens of each


class Detokenizer:
    """The text of token ids that arrive one after another: exactly what `ChatTokenizer.decode` returns for all of them.

    Only a window of the last ids is decoded. It begins with ids whose text is known, and the new text is what follows
    theirs. They are several, because the first token of a text is decoded differently (without its space, for one), and
    their text ends with a whole character. If the text of the window does not begin with theirs, all ids are decoded;
    they are decoded each time for a tokenizer that fails `decodes_locally`.

    Args:
        chat: The tokenizer.
        ids: Token ids so far.
        text: Their text; None to decode them.
        start: The end of the prompt, which they are decoded after.
    """

    def __init__(
        self, chat: ChatTokenizer, ids: Sequence[int] = (), text: str | None = None, start: AnswerStart = NOTHING_BEFORE
    ) -> None:
        self.chat = chat
        self.ids = list(ids)
        self.text = chat.decode(ids, start) if text is None else text
        self._local = decodes_locally(chat)
        self._prompt_end, self._nowhere = start, AnswerStart(visible=start.visible)
        self._start: int | None = None  # index of the window's first id; None if it begins with the end of the prompt
        self._known = ""  # the text of the window's first ids, which are not new
        self._before = ""  # the text of all ids that are not new, before the window included
        if not self.text.endswith(PARTIAL_CHARACTER):
            self._move()

    def push(self, ids: Sequence[int]) -> str:
        """Append token ids.

        Returns:
            The text of all ids; an incomplete character at its end is U+FFFD.
        """
        self.ids += ids
        window = self._window()
        if not window.startswith(self._known):
            self._start, self._known, self._before = None, "", ""
            window = self._window()
        self.text = self._before + window[len(self._known) :]
        if self._local and not window.endswith(PARTIAL_CHARACTER):
            self._before, self._known = self.text, window
            if len(self.ids) - (self._start or 0) > LONGEST:
                self._move()
        return self.text

    def _window(self) -> str:
        """Decode the window."""
        if self._start is None:
            return self.chat.decode(self.ids, self._prompt_end)
        return self.chat.decode(self.ids[self._start :], self._nowhere)

    def fork(self) -> Detokenizer:
        """Return an independent copy, for another continuation of the same ids."""
        fork = Detokenizer.__new__(Detokenizer)
        fork.__dict__.update(self.__dict__)
        fork.ids = self.ids.copy()
        return fork

    def _move(self) -> None:
        """Move the window to the last few ids, if the text of these is the end of the whole text."""
        start = max(0, len(self.ids) - OVERLAP)
        known = self.chat.decode(self.ids[start:], self._nowhere)
        end = known.lstrip(PARTIAL_CHARACTER)  # it may begin in the middle of a character
        if self._local and end and not end.endswith(PARTIAL_CHARACTER) and self.text.endswith(end):
            self._start, self._known, self._before = start, known, self.text


_LOCAL: WeakKeyDictionary[ChatTokenizer, bool] = WeakKeyDictionary()


def decodes_locally(chat: ChatTokenizer) -> bool:
    """Return True if the text of a token depends on the tokens next to it only, tested once on random texts."""
    if chat not in _LOCAL:
        _LOCAL[chat] = True  # for the detokenizers of the test
        _LOCAL[chat] = _passes(chat)
    return _LOCAL[chat]


def _passes(chat: ChatTokenizer) -> bool:
    """True if decoding random ids one by one gives the text of all of them at every step."""
    texts, length = TRIED
    dice, vocabulary = Random(0), range(len(chat.tokenizer))
    for _ in range(texts):
        ids = dice.choices(vocabulary, k=length)
        growing = Detokenizer(chat)
        for n in range(1, length + 1):
            if growing.push(ids[n - 1 : n]) != chat.decode(ids[:n]):
                log.warning("the tokenizer does not decode token by token: texts are decoded as a whole")
                return False
    return True
