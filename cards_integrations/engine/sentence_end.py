"""Where an answer that reaches its limit ends: after its last whole sentence."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from cards_integrations.rewards.scorers.sentences import SENTENCE_END

ITEM_NUMBER = re.compile(r"\s*\w{1,3}\.")  # of a list: a line with nothing else is no sentence


def last_sentence_end(text: str) -> int:
    """Return how many characters the text has up to the end of its last whole sentence; 0 if there is none."""
    ends = [match.end() for match in SENTENCE_END.finditer(text) if not _is_item_number(text, match.end())]
    return len(text[: ends[-1]].rstrip()) if ends else 0


def certain_sentences(text: str) -> str:
    """Return the whole sentences of a text that may go on; a dot at its very end may yet become a decimal point."""
    return text[: last_sentence_end(text[:-1])]


def cut_after_sentence(text: str, ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[str, int] | None:
    """Cut a text after its last whole sentence.

    Whitespace that belongs to the last token that is left stays, so that the text is that of its ids.

    Args:
        text: The text.
        ids: Its token ids.
        decode: Returns the text of some of the first ids.

    Returns:
        The text that is left, and how many of its ids; None if nothing is cut.
    """
    end = last_sentence_end(text)
    if not 0 < end < len(text.rstrip()):
        return None
    length = len(ids)
    while length > 1 and len(decode(ids[: length - 1])) >= end:
        length -= 1
    rest = text[end : len(decode(ids[:length]))]
    return text[: end + (0 if rest.strip() else len(rest))], length


def _is_item_number(text: str, end: int) -> bool:
    line = text[text.rfind("\n", 0, end - 1) + 1 : end]
    return ITEM_NUMBER.fullmatch(line) is not None
