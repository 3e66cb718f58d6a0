"""Rows of one width: their keys and values in all layers, and what the host knows of their columns.

A cache has a few blocks, narrow ones for short texts and wide ones for long texts, so that no row pays
for the longest. A block is dense: closing a row moves the last one into its place.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import count, takewhile
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

STEP = 64  # widths are multiples of it
MASK_ROWS = 16  # of a new block
_serial = count()

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one attention call."""

States = list[Pair]
"""Keys and values of consecutive tokens, (tokens, heads, head size) for each attention call."""


class Layout:
    """What a forward keeps of a token: one pair of keys and values for each attention call, in the order of the calls.

    It is read off the model's first forward, not off its config: layers may differ in their heads, share what
    others keep, or attend twice.

    Attributes:
        pairs: Empty tensors (0, heads, head size) of the shapes and types.
        bytes_per_token: Bytes of keys and values of one token.
        latents: Whether latents may be kept in the place of the keys and values that are made of them.
    """

    def __init__(self) -> None:
        self.pairs: list[Pair] = []
        self.bytes_per_token = 0
        self.latents = True

    def forget(self) -> None:
        """Know nothing of the model, but that latents are not enough of it."""
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
        layout: What they hold of each token.
        columns: Width of the rows.
        least: Rows that it has in any case.

    `visible` (mask rows, columns) says which columns each path attends to, and `positions` (rows, columns)
    at which position the token of a column is. `states` are the keys and values of each attention call,
    (rows, columns, heads, head size), as far as a forward has written some. `version` changes when they move.
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
        """Return the rows that it has when so many are in use: a quarter more, so that it seldom grows."""
        return self.rows if used <= self.rows else used + used // 4

    def add(self, trees: Sequence[Row]) -> None:
        """Give trees a row each."""
        self.make_rows(len(self.trees) + len(trees))
        for tree in trees:
            tree.block, tree.row = self, len(self.trees)
            self.trees.append(tree)

    def make_rows(self, used: int) -> None:
        """Have at least so many rows from now on."""
        if used > self.rows:
            self._resize(self.rows_for(used))

    @torch.inference_mode()
    def remove(self, tree: Row, row: int) -> None:
        """Take a tree's row away, which the last one fills."""
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
        """Let go of the keys and values; a graph that was captured with them may still know the block."""
        self.states.clear()
        self.version += 1

    def _resize(self, rows: int) -> None:
        self.rows = rows
        self.positions = _resized(self.positions, (rows, self.columns))

    def _written(self, row: int) -> Iterator[torch.Tensor]:
        """Keys and values in which a row can have been written."""
        for pair in self.states.values():
            yield from (states for states in pair if row < len(states))

    def fit(self, call: int) -> Pair:
        """Return the keys and values of an attention call, which have all rows from now on."""
        pair = self.states.get(call)
        if pair is None or len(pair[0]) != self.rows:
            self.version += 1
            keys, values = pair or self.layout.pairs[call]
            pair = self.states[call] = self._made(keys), self._made(values)
        return pair

    @property
    def ready(self) -> bool:
        """True if no forward has to make or move its keys and values."""
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
"""Those that blocks have: multiples of 64, each about a quarter more than the one before."""


def width_for(columns: int) -> int:
    """Return the smallest width of at least so many columns."""
    return WIDTHS[bisect_left(WIDTHS, columns)]


def width_within(columns: int) -> int:
    """Return the largest width of at most so many columns, or 0."""
    smaller = bisect_right(WIDTHS, columns)
    return WIDTHS[smaller - 1] if smaller else 0


def part(states: States, start: int, end: int) -> States:
    """Return a copy of some tokens' states: the memory of the others can be given back."""
    return [(keys[start:end].clone(), values[start:end].clone()) for keys, values in states]


def joined(parts: Sequence[States]) -> States:
    """Return the states of consecutive tokens as one."""
    return [
        (torch.cat([keys for keys, _ in layer]), torch.cat([values for _, values in layer]))
        for layer in zip(*parts, strict=True)
    ]


def _resized(array: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    resized = np.zeros(shape, dtype=array.dtype)
    rows = min(len(array), len(resized))
    resized[:rows] = array[:rows]
    return resized
