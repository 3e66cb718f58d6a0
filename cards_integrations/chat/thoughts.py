"""Thoughts that stand in the text of an answer, between tags: what is considered there is not done."""

from __future__ import annotations

from typing import NamedTuple

from cards_integrations.chat.thinking import KNOWN

TAGS = (*((known.opening, known.closing) for known in KNOWN), ("<thinking>", "</thinking>"))


class Thought(NamedTuple):
    """Where a thought begins and ends, tags included; `end` is None while it is open."""

    begin: int
    end: int | None


def next_thought(text: str, start: int = 0) -> Thought | None:
    """The first thought that begins at `start` or later."""
    begun = [(text.find(opening, start), opening, closing) for opening, closing in TAGS]
    begin, opening, closing = min((each for each in begun if each[0] >= 0), default=(-1, "", ""))
    if begin < 0:
        return None
    end = text.find(closing, begin + len(opening))
    return Thought(begin, None if end < 0 else end + len(closing))


def after_thoughts(text: str) -> str:
    """What follows the last thought that ends in a text: all of it if none does."""
    return text[max((text.rfind(closing) + len(closing) for _, closing in TAGS if closing in text), default=0) :]


def leading_thoughts(text: str) -> int:
    """The length of the thoughts that a text begins with, in characters; an open one takes all of it."""
    end = 0
    while (thought := next_thought(text, end)) is not None and not text[end : thought.begin].strip():
        if thought.end is None:
            return len(text)
        end = thought.end
    return end
