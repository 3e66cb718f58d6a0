"""Rows of one width: their keys and values in all layers, and what the host knows of their columns.

A cache has a few blocks, narrow ones for short texts and wide ones for long texts, so that no row pays for the longest.
A block is dense: closing a row moves the last one into its place.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import count, takewhile
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

STEP = 64  # widths are multiples of this
MASK_ROWS = 16  # of a new block
_serial = count()

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one attention call."""

States = list[Pair]
"""Keys and values of consecutive tokens, (tokens, heads, head size) for each attention call."""


class Layout:
    """What a forward keeps of a token: one pair of keys and values for each attention call, in the order of the calls.

    It is learned from the model's first forward, not from its config: layers may differ in their heads, share what
    others keep, or attend twice.

    Attributes:
        pairs: For each call, empty keys and values (0, heads, head size) of the right shape and type.
        bytes_per_token: Bytes of keys and values of one token, of all calls.
        latents: Whether latents may be kept in place of the keys and values that are computed from them.
    """

    def __init__(self) -> None:
        self.pairs: list[Pair] = []
        self.bytes_per_token = 0
        self.latents = True

    def forget(self) -> None:
        """Forget what was learned, and keep no latents from now on."""
        self.pairs, self.bytes_per_token, self.latents = [], 0, False

    def __len__(self) -> int:
        return len(self.pairs)

    def note(self, call: int, pair: Pair) -> None:
        """Learn the shape of a call's keys and values (tokens, heads, head size), if it is new."""
        if call == len(self.pairs):
            keys, values = pair
            self.pairs.append((keys.new_empty(0, *keys.shape[1:]), values.new_empty(0, *values.shape[1:])))
            self.bytes_per_token += sum(each.shape[1:].numel() * each.dtype.itemsize for each in pair)


class Row(Protocol):
    """What a block knows of a row: where it is, and the first column that was never used."""

    block: RowBlock
    row: int
    untouched: int


class RowBlock:
    """Rows of `columns` columns each.

    Args:
        layout: What is kept of each token.
        columns: The width of the rows.
        least: The least number of rows.

    Attributes:
        rows: How many rows there are, in use or not.
        trees: The rows in use, in order.
        visible: Which columns each path attends to, (mask rows, columns) bool.
        positions: The position of the token in each column, (rows, columns).
        states: By attention call its keys and values, (rows, columns, heads, head size) each; those calls only that a
            forward has written to.
        free_mask_rows: Mask rows that no path uses.
        version: A number that changes when `states` move.
        serial: A number that no other block has.
    """

    def __init__(self, layout: Layout, columns: int, least: int = 0) -> None:
        self.layout = layout
        self.columns = columns
        self.least = least
        self.serial = next(_serial)
        self.version = 0
        self.states: dict[int, Pair] = {}
        self.trees: list[Row] = []
        self._begin()

    def _begin(self) -> None:
        self.rows = self.least
        self.positions: NDArray[np.int64] = np.zeros((self.rows, self.columns), dtype=np.int64)
        self.visible: NDArray[np.bool_] = np.zeros((MASK_ROWS, self.columns), dtype=bool)
        self.free_mask_rows = list(range(MASK_ROWS))

    def rows_for(self, used: int) -> int:
        """Return how many rows there are when `used` are in use: a quarter more, so that the block seldom grows."""
        return self.rows if used <= self.rows else used + used // 4

    def add(self, trees: Sequence[Row]) -> None:
        """Give trees a row each."""
        self.make_rows(len(self.trees) + len(trees))
        for tree in trees:
            tree.block, tree.row = self, len(self.trees)
            self.trees.append(tree)

    def make_rows(self, used: int) -> None:
        """Grow to at least `used` rows."""
        if used > self.rows:
            self._resize(self.rows_for(used))

    @torch.inference_mode()
    def remove(self, tree: Row, row: int) -> None:
        """Remove a tree from its row, and move the last tree into its place."""
        last = self.trees.pop()
        if last is not tree:
            self.positions[row] = self.positions[last.row]
            for states in self._written(last.row):
                states[row, : last.untouched] = states[last.row, : last.untouched]
            last.row, self.trees[row] = row, last

    def give_back(self, most: float = 2.0) -> None:
        """Shrink if there are more than `most` times the rows in use."""
        used = len(self.trees)
        if most * used < self.rows and self.rows > self.least:
            self._resize(max(self.least, used if most == 1.0 else used + used // 4))
            for call in self.states:
                self.fit(call)
        if not used and len(self.visible) > MASK_ROWS:
            self._begin()

    def release(self) -> None:
        """Let go of keys and values, even if a captured graph still refers to the block."""
        self.states.clear()
        self.version += 1

    def _resize(self, rows: int) -> None:
        self.rows = rows
        self.positions = _resized(self.positions, (rows, self.columns))

    def _written(self, row: int) -> Iterator[torch.Tensor]:
        """Yield the keys and values of those calls that have this row."""
        for pair in self.states.values():
            yield from (states for states in pair if row < len(states))

    def fit(self, call: int) -> Pair:
        """Return the keys and values of an attention call, resized to all rows of the block."""
        pair = self.states.get(call)
        if pair is None or len(pair[0]) != self.rows:
            self.version += 1
            keys, values = pair or self.layout.pairs[call]
            pair = self.states[call] = self._made(keys), self._made(values)
        return pair

    @property
    def ready(self) -> bool:
        """True if the next forward does not have to allocate or move keys and values."""
        return len(self.states) == len(self.layout) and all(len(keys) == self.rows for keys, _ in self.states.values())

    def _made(self, source: torch.Tensor) -> torch.Tensor:
        # Zeros, not empty: a masked column still takes part in 0 * value, and 0 * NaN is NaN.
        new = source.new_zeros(self.rows, self.columns, *source.shape[-2:])
        if rows := min(len(source), self.rows):
            new[:rows] = source[:rows]
        return new

    def allocate_mask_row(self, like: int | None = None) -> int:
        """Return a free mask row that sees what the mask row `like` sees, or nothing."""
        if not self.free_mask_rows:
            rows = len(self.visible)
            self.visible = _resized(self.visible, (2 * rows, self.columns))
            self.free_mask_rows = list(range(rows, 2 * rows))
        mask_row = self.free_mask_rows.pop()
        self.visible[mask_row] = False if like is None else self.visible[like]
        return mask_row


def _widths() -> Iterator[int]:
    width = STEP
    while True:
        yield width
        width = -(-width * 5 // 4 // STEP) * STEP


WIDTHS = tuple(takewhile(lambda width: width < 2**40, _widths()))
"""The widths of blocks: multiples of 64, each about a quarter more than the one before."""


def width_for(columns: int) -> int:
    """Return the smallest width of at least `columns` columns."""
    return WIDTHS[bisect_left(WIDTHS, columns)]


def width_within(columns: int) -> int:
    """Return the largest width of at most `columns` columns; 0 if there is none."""
    smaller = bisect_right(WIDTHS, columns)
    return WIDTHS[smaller - 1] if smaller else 0


def part(states: States, start: int, end: int) -> States:
    """Return a copy of the states of some tokens, so that the memory of the others can be given back."""
    return [(keys[start:end].clone(), values[start:end].clone()) for keys, values in states]


def joined(parts: Sequence[States]) -> States:
    """Join states of tokens that follow each other."""
    return [
        (torch.cat([keys for keys, _ in layer]), torch.cat([values for _, values in layer]))
        for layer in zip(*parts, strict=True)
    ]


def _resized(array: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    resized = np.zeros(shape, dtype=array.dtype)
    rows = min(len(array), len(resized))
    resized[:rows] = array[:rows]
    return resized
