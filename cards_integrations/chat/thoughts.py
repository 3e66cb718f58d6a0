"""Thoughts between tags in the text of an answer: calls that are only considered there are no calls."""

from __future__ import annotations

from typing import NamedTuple

from cards_integrations.chat.thinking import KNOWN

TAGS = (*((known.opening, known.closing) for known in KNOWN), ("<thinking>", "</thinking>"))


class Thought(NamedTuple):
    """The range of a thought in a text, tags included; `end` is None while it is open."""

    begin: int
    end: int | None


def next_thought(text: str, start: int = 0) -> Thought | None:
    """Return the first thought that begins at `start` or later; None if there is none."""
    begun = [(text.find(opening, start), opening, closing) for opening, closing in TAGS]
    begin, opening, closing = min((each for each in begun if each[0] >= 0), default=(-1, "", ""))
    if begin < 0:
        return None
    end = text.find(closing, begin + len(opening))
    return Thought(begin, None if end < 0 else end + len(closing))


def after_thoughts(text: str) -> str:
    """Return the text after its last thought that ends: all of it if none does."""
    return text[max((text.rfind(closing) + len(closing) for _, closing in TAGS if closing in text), default=0) :]


def leading_thoughts(text: str) -> int:
    """Return the length of the thoughts that a text begins with, in characters: all of it if one is still open."""
    end = 0
    while (thought := next_thought(text, end)) is not None and not text[end : thought.begin].strip():
        if thought.end is None:
            return len(text)
        end = thought.end
    return end
