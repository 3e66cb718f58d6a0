"""One KV cache for all live requests: a row per request, a tree of candidates in each row.

A row holds the *trunk* (prompt and kept text) once, and the *branches* (candidates) that grow from
it. Every token takes one column of its row; which columns a token attends to is a boolean vector,
so a candidate sees the trunk and itself and nothing else. Keeping a candidate makes its columns
part of the trunk, rejecting one frees them: no key or value is ever copied or computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache, CacheLayerMixin

SCRATCH = 0  # column 0 of every row takes the padding of a batch; no token sees it


class Branch:
    """A path from the root of a tree: tokens cached so far, and the columns that the next one sees."""

    def __init__(self, tree: Tree, base: int) -> None:
        self.tree = tree
        self.base = base
        self.columns: list[int] = []
        self.ids: list[int] = []
        self.visible: NDArray[np.bool_] = np.zeros(len(tree.used), dtype=bool)
        self.visible[tree.columns[:base]] = True

    @property
    def length(self) -> int:
        """Tokens on the path, which is the position of the next one."""
        return self.base + len(self.columns)

    def extend(self, ids: Sequence[int]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Take a column for each token; returns the columns (n,) and what each token sees (n, columns)."""
        columns = self.tree.take(len(ids), self.length)
        self.visible = _padded(self.visible, len(self.tree.used))
        sees = np.repeat(self.visible[None], len(ids), axis=0)
        sees[:, columns] = np.tri(len(ids), dtype=bool)
        self.visible[columns] = True
        self.columns += columns.tolist()
        self.ids += ids
        return columns, sees


class Tree:
    """One row: the trunk's tokens and columns in order, and which columns are taken."""

    def __init__(self, slot: int, capacity: int) -> None:
        self.slot = slot
        self.ids: list[int] = []
        self.columns: list[int] = []
        self.used: NDArray[np.bool_] = np.zeros(capacity, dtype=bool)
        self.used[SCRATCH] = True
        self.positions: NDArray[np.int64] = np.zeros(capacity, dtype=np.int64)

    @property
    def width(self) -> int:
        """Columns from the first to the last that is taken."""
        return len(self.used) - int(np.argmax(self.used[::-1]))

    def branch(self, base: int | None = None) -> Branch:
        """A new branch that leaves the trunk after `base` tokens (default: at its tip)."""
        return Branch(self, len(self.columns) if base is None else base)

    def keep(self, branch: Branch, tokens: int | None = None) -> None:
        """Make the branch (its first `tokens` own tokens) the trunk; what lay beyond it is freed."""
        self.used[self.columns[branch.base :]] = False
        self.used[branch.columns[tokens:] if tokens is not None else []] = False
        self.columns[branch.base :] = branch.columns[:tokens]
        self.ids[branch.base :] = branch.ids[:tokens]

    def drop(self, branch: Branch) -> None:
        """Free the branch's own columns."""
        self.used[branch.columns] = False
        branch.columns, branch.ids = [], []

    def take(self, count: int, position: int) -> NDArray[np.intp]:
        """The `count` lowest free columns, marked as taken by positions `position`, `position + 1`, ..."""
        free = np.flatnonzero(~self.used)
        if len(free) < count:
            capacity = _rounded(len(self.used) + count - len(free))
            self.used = _padded(self.used, capacity)
            self.positions = _padded(self.positions, capacity)
            free = np.flatnonzero(~self.used)
        columns = free[:count]
        self.used[columns] = True
        self.positions[columns] = np.arange(position, position + count)
        return columns


class TreeLayer(CacheLayerMixin):
    """Keys and values of one layer, (rows, heads, columns, head size); grows when the cache does."""

    def __init__(self, cache: TreeCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = self._grown(None, key_states), self._grown(None, value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (batch, heads, n, size) at the cache's current place; return all columns in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.keys.shape[0] < self.cache.rows or self.keys.shape[2] < self.cache.columns:
            self.keys, self.values = self._grown(self.keys, key_states), self._grown(self.values, value_states)
        rows, columns, width = self.cache.place
        self.keys[rows[:, None], :, columns] = key_states.transpose(1, 2)
        self.values[rows[:, None], :, columns] = value_states.transpose(1, 2)
        return self._view(self.keys, rows, width), self._view(self.values, rows, width)

    def _view(self, states: torch.Tensor, rows: torch.Tensor, width: int) -> torch.Tensor:
        if self.cache.dense:
            return states[: len(rows), :, :width]
        return states[:, :, :width].index_select(0, rows)

    def _grown(self, old: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        # Zeros, not empty: a masked column still takes part in 0 * value, and 0 * NaN is NaN.
        new = like.new_zeros(self.cache.rows, like.shape[1], self.cache.columns, like.shape[3])
        if old is not None:
            new[: old.shape[0], :, : old.shape[2]] = old
        return new

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        if self.is_initialized and source < len(self.keys):  # else nothing was read there yet
            self.keys[target], self.values[target] = self.keys[source], self.values[source]

    def get_seq_length(self) -> int:
        return 0  # positions are always passed in

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.place[2], 0

    def get_max_length(self) -> int:
        return -1


class TreeCache(Cache):
    """The rows of all live requests, kept dense: closing one moves the last row into its place."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[TreeLayer(self) for _ in range(layers)])
        self.trees: list[Tree] = []
        self.rows, self.columns = 1, _rounded(1)
        self.place: tuple[torch.Tensor, torch.Tensor, int]
        self.dense = True

    def open(self) -> Tree:
        tree = Tree(len(self.trees), self.columns)
        self.trees.append(tree)
        return tree

    def close(self, tree: Tree) -> None:
        last = self.trees.pop()
        if last is not tree:
            for layer in self.layers:
                layer.move(last.slot, tree.slot)
            last.slot = tree.slot
            self.trees[last.slot] = last

    def at(self, trees: Sequence[Tree], columns: torch.Tensor, width: int) -> None:
        """Where the next forward writes: rows (batch,), columns (batch, n), and how many it reads."""
        while self.rows < len(self.trees):
            self.rows *= 2
        self.columns = max(self.columns, *(len(tree.used) for tree in trees))
        slots = [tree.slot for tree in trees]
        self.dense = slots == list(range(len(slots)))
        self.place = (torch.tensor(slots, device=columns.device), columns, width)


def _rounded(columns: int) -> int:
    """Half as much again, in whole blocks of 64, so that rows grow seldom."""
    return -(-columns * 3 // 2 // 64) * 64 + 64


def _padded(array: NDArray[Any], length: int) -> NDArray[Any]:
    return np.pad(array, (0, max(0, length - len(array))))
