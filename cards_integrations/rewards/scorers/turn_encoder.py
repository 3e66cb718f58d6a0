"""Encodes texts that begin with one conversation; the part before its last turn is encoded only once."""

from __future__ import annotations

from collections.abc import Callable

from cards_integrations.chat.template import ChatTokenizer


class TurnEncoder:
    """Encodes texts, with the ids that each has as a whole.

    Args:
        chat: The tokenizer.
        before: The usual beginning of the texts: all that comes before an answer.
        plain: Whether the tokenizer adds its special tokens; a chat template brings its own.
    """

    def __init__(self, chat: ChatTokenizer, before: str, plain: bool) -> None:
        self.chat = chat
        self.before = before
        self._encode: Callable[[str], list[int]] = chat.encode_beginning if plain else chat.encode
        self.before_ids = self._encode(before)
        self._head, self._turn = self._last_turn()

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text; what is known of its beginning is not encoded again."""
        if self._turn and text.startswith(self.before):
            return [*self._head, *self.chat.encode(self._turn + text[len(self.before) :])]
        return self._encode(text)

    def _last_turn(self) -> tuple[list[int], str]:
        """Return the ids before the last added token of `before`, and the text from there on.

        No token reaches across an added token. Without an added token both are empty.
        """
        added = self.chat.added_tokens
        at = next((i for i in reversed(range(len(self.before_ids))) if self.before_ids[i] in added), None)
        if at is None:
            return [], ""
        start = self.before.rfind(str(added[self.before_ids[at]]))
        turn = self.before[start:] if start >= 0 else ""
        alike = bool(turn) and self.chat.encode(turn) == self.before_ids[at:]
        return (self.before_ids[:at], turn) if alike else ([], "")
