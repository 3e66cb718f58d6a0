"""Where an answer that reaches its limit ends: after its last whole sentence."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from cards_integrations.rewards.scorers.sentences import SENTENCE_END

ITEM_NUMBER = re.compile(r"\s*\w{1,3}\.")  # of a list: a line that says no more is no sentence


def last_sentence_end(text: str) -> int:
    """Characters up to the end of the last whole sentence, without whitespace after it; 0 if there is none."""
    ends = [match.end() for match in SENTENCE_END.finditer(text) if not _is_item_number(text, match.end())]
    return len(text[: ends[-1]].rstrip()) if ends else 0


def certain_sentences(text: str) -> str:
    """The whole sentences of a text that may go on: a mark at its end may turn out to be a decimal point."""
    return text[: last_sentence_end(text[:-1])]


def cut_after_sentence(text: str, ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[str, int] | None:
    """The text up to the end of its last whole sentence, and how many of its ids say that; None if it is all of it.

    A last token that goes on with whitespace keeps it, so that the text is still that of its ids.
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
