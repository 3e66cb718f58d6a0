"""Which of the live rows begin like a new text, found in the time of reading the text once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from cards_integrations.transformer.prefix_tree import common

CHUNK = 64  # tokens


class Trunk(Protocol):
    """A live text; `chunks` are the hashes of its beginnings that are known. Only with equal `long` are two alike."""

    ids: list[int]
    chunks: list[int]
    long: bool


T = TypeVar("T", bound=Trunk)


class LiveTexts(Generic[T]):
    """The trunks of live rows by hashes of their beginnings, of one chunk, of two chunks, and so on."""

    def __init__(self) -> None:
        self._beginning: dict[int, dict[T, None]] = {}

    def longest(self, trees: Iterable[T], ids: Sequence[int], long: bool = False) -> tuple[T | None, int]:
        """Return the tree that begins most like a text, and how many tokens they have in common.

        Args:
            trees: All live ones.
            ids: The text; beginnings shorter than a chunk are not found.
            long: That of the text.
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
        """Take in what a trunk has grown by."""
        before, start = (tree.chunks[-1] if tree.chunks else tree.long), len(tree.chunks) * CHUNK
        if len(tree.ids) - start >= CHUNK:
            for beginning in _beginnings(tree.ids[start:], before):
                tree.chunks.append(beginning)
                self._beginning.setdefault(beginning, {})[tree] = None

    def forget(self, tree: T, tokens: int = 0) -> None:
        """Leave out what comes after so many tokens of a trunk."""
        after = tokens // CHUNK
        for beginning in tree.chunks[after:]:
            alike = self._beginning[beginning]
            del alike[tree]
            if not alike:
                del self._beginning[beginning]
        del tree.chunks[after:]


def _beginnings(ids: Sequence[int], before: int) -> Iterator[int]:
    """The hashes of ever longer beginnings of a text, which goes on from one with the hash `before`."""
    for start in range(0, len(ids) - CHUNK + 1, CHUNK):
        before = hash((before, *ids[start : start + CHUNK]))
        yield before
