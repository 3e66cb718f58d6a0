"""How much an answer repeats itself."""

from __future__ import annotations

import re
from collections.abc import Sequence

BETWEEN_WORDS = re.compile(
    r"""[\s.,;:!?"()\[\]{}<>*_`~|/\\=+\u2013\u2014\u2026\u201c\u201d\u3001\u3002\uff01\uff1f-]+"""
)
APOSTROPHES = "'\u2018\u2019"  # within a word they are a part of it
FULL_LENGTH = 32  # n-grams, or tokens


def words(text: str) -> list[str]:
    """Return the words of a text: what is between whitespace and punctuation, in lower case."""
    return [word for each in BETWEEN_WORDS.split(text.lower()) if (word := each.strip(APOSTROPHES))]


def n_repeated(words: Sequence[str], n: int) -> int:
    """Count the n-grams that have occurred before, each in its own order."""
    grams = _ngrams(words, n)
    return len(grams) - len(set(grams))


def n_rearranged(words: Sequence[str], n: int) -> int:
    """Count the n-grams that have occurred before, or whose words have in another order and another place.

    "luxurious and elegant ... elegant and luxurious" is one; "the end of the" is none, for its two n-grams of three
    words share the words between.
    """
    before: set[tuple[str, ...]] = set()
    elsewhere: set[tuple[str, ...]] = set()
    grams, found = _ngrams(words, n), 0
    for i, gram in enumerate(grams):
        if i >= n:
            elsewhere.add(tuple(sorted(grams[i - n])))
        found += gram in before or tuple(sorted(gram)) in elsewhere
        before.add(gram)
    return found


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def repeated_share(text: str, n: int = 3) -> float:
    """Return the share of a text's n-grams of words that have occurred in it before; 0.0 where there are none.

    Words are what stands between whitespace, in lower case; n-grams in another order are others.
    """
    found = text.lower().split()
    return n_repeated(found, n) / max(1, len(found) - n + 1)


def per_length(amount: float, length: int) -> float:
    """Return an amount per n-gram or token of an answer, of at least `FULL_LENGTH` of them.

    A beginning is scored by what is wrong with it already, as a part of the answer that it becomes.
    """
    return amount / max(length, FULL_LENGTH)
