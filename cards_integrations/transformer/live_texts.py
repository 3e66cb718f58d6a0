"""Which live row has the longest common prefix with a new text, found in one pass over the text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from cards_integrations.transformer.prefix_tree import common

CHUNK = 64  # tokens


class Trunk(Protocol):
    """A live text. `chunks` are the hashes of its prefixes so far; only texts of equal `long` are alike."""

    ids: list[int]
    chunks: list[int]
    long: bool


T = TypeVar("T", bound=Trunk)


class LiveTexts(Generic[T]):
    """The trunks of live rows by the hashes of their prefixes of one chunk, two chunks, and so on."""

    def __init__(self) -> None:
        self._beginning: dict[int, dict[T, None]] = {}

    def longest(self, trees: Iterable[T], ids: Sequence[int], long: bool = False) -> tuple[T | None, int]:
        """Return the tree with the longest common prefix with a text, and the length of that prefix in tokens.

        Args:
            trees: All live trees.
            ids: The text; common prefixes shorter than a chunk are not found.
            long: Whether the text is read with the rotary frequencies of long texts.
        """
        for tree in trees:
            self._note(tree)
        alike: dict[T, None] = {}
        known = 0
        for beginning in _beginnings(ids, long):
            if beginning not in self._beginning:
                break
            alike, known = self._beginning[beginning], known + CHUNK
        rest = ids[known : known + CHUNK]
        best = max(alike, key=lambda tree: common(tree.ids[known : known + CHUNK], rest), default=None)
        return best, 0 if best is None else common(best.ids, ids)

    def _note(self, tree: T) -> None:
        """Add the hashes of what a trunk has grown by."""
        before, start = (tree.chunks[-1] if tree.chunks else tree.long), len(tree.chunks) * CHUNK
        if len(tree.ids) - start >= CHUNK:
            for beginning in _beginnings(tree.ids[start:], before):
                tree.chunks.append(beginning)
                self._beginning.setdefault(beginning, {})[tree] = None

    def forget(self, tree: T, tokens: int = 0) -> None:
        """Remove the hashes of what comes after the first `tokens` tokens of a trunk."""
        after = tokens // CHUNK
        for beginning in tree.chunks[after:]:
            alike = self._beginning[beginning]
            del alike[tree]
            if not alike:
                del self._beginning[beginning]
        del tree.chunks[after:]


def _beginnings(ids: Sequence[int], before: int) -> Iterator[int]:
    """Yield the hashes of ever longer prefixes of a text that goes on from one with the hash `before`."""
    for start in range(0, len(ids) - CHUNK + 1, CHUNK):
        before = hash((before, *ids[start : start + CHUNK]))
        yield before
