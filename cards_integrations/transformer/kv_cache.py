"""One KV cache for all live requests: a row per request, a tree of candidates in each row.

A row holds the *trunk* (prompt and kept text) once, and the *branches* (candidates) that grow from
it. Every token takes one column of its row. Which columns a path attends to is a boolean vector, a
*mask row*, so a candidate sees its own path and nothing else. Keeping a candidate makes its columns
part of the trunk, and rejecting one frees them: no key or value is copied or computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache, CacheLayerMixin

SCRATCH = 0  # column 0 of every row takes the padding of a batch; no token sees it
BLOCK = 64  # columns are allocated in multiples of it

States = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of consecutive tokens, (tokens, heads, head size) for each layer."""


class Branch:
    """A path from the root of a tree: its first `base` tokens are its parent's, `ids` its own.

    `columns` are those of its own tokens, in order, and `mask_row` is the index of its mask row.
    """

    def __init__(self, tree: Tree, base: int, mask_row: int) -> None:
        self.tree = tree
        self.base = base
        self.mask_row = mask_row
        self.columns: list[int] = []
        self.ids: list[int] = []

    @property
    def length(self) -> int:
        """Tokens on the path, which is also the position of the next one."""
        return self.base + len(self.columns)

    def extend(self, ids: Sequence[int]) -> list[int]:
        """Append tokens, which the branch sees from now on; returns their columns."""
        columns, position = self.tree.allocate(len(ids)), self.length
        cache = self.tree.cache
        cache.positions[self.tree.row, columns] = range(position, position + len(ids))
        cache.visible[self.mask_row, columns] = True
        self.columns += columns
        self.ids += ids
        return columns

    def retract(self, tokens: int) -> None:
        """Remove the last tokens, and free their columns."""
        end = len(self.columns) - tokens
        last, self.columns, self.ids = self.columns[end:], self.columns[:end], self.ids[:end]
        self.tree.cache.visible[self.mask_row, last] = False
        self.tree.free(last)

    def branch(self, own: int | None = None) -> Branch:
        """Return a new branch that grows from this one, after its first `own` own tokens (default: all)."""
        beyond = self.columns[own:] if own is not None else []
        branch = self.tree.add_branch(self.length - len(beyond), self.mask_row)
        self.tree.cache.visible[branch.mask_row, beyond] = False
        return branch


class Tree:
    """One row of the cache: the trunk's tokens and columns in order, and which columns are free.

    `mask_row` is the trunk's, `mask_rows` are those of the trunk and of all branches. `orphaned` are
    columns that are no longer the trunk's, but that branches which left it earlier still see.
    """

    def __init__(self, cache: TreeCache, row: int) -> None:
        self.cache = cache
        self.row = row
        self.mask_row = cache.allocate_mask_row()
        self.mask_rows = {self.mask_row}
        self.ids: list[int] = []
        self.columns: list[int] = []
        self.untouched = SCRATCH + 1  # the first column that was never used
        self.freed: list[int] = []  # a heap
        self.orphaned: list[int] = []

    def branch(self, base: int | None = None) -> Branch:
        """Return a new branch that leaves the trunk after `base` tokens (default: at its tip)."""
        branch = self.add_branch(len(self.columns) if base is None else base, self.mask_row)
        if base is not None:
            self.cache.visible[branch.mask_row, self.columns[base:]] = False
        return branch

    def add_branch(self, base: int, like: int) -> Branch:
        """Return a new branch that sees what the mask row `like` sees."""
        mask_row = self.cache.allocate_mask_row(like)
        self.mask_rows.add(mask_row)
        return Branch(self, base, mask_row)

    def keep(self, branch: Branch, tokens: int | None = None) -> None:
        """Make a branch, or its first `tokens` own tokens, the trunk; the branch is then empty, at the new tip."""
        beyond = branch.columns[tokens:] if tokens is not None else []
        self.cache.visible[branch.mask_row, beyond] = False
        self.cache.visible[self.mask_row] = self.cache.visible[branch.mask_row]
        self.free(beyond)
        self.orphaned += self.columns[branch.base :]
        self._free_orphaned()
        self.columns[branch.base :] = branch.columns[:tokens]
        self.ids[branch.base :] = branch.ids[:tokens]
        branch.base, branch.columns, branch.ids = len(self.columns), [], []

    def drop(self, branch: Branch) -> None:
        """Free the branch's own columns and its mask row; a dropped branch may be dropped again."""
        if branch.mask_row >= 0:
            self.free(branch.columns)
            self.mask_rows.remove(branch.mask_row)
            self.cache.free_mask_rows.append(branch.mask_row)
            branch.mask_row, branch.columns, branch.ids = -1, [], []
            self._free_orphaned()

    def _free_orphaned(self) -> None:
        """Free orphaned columns that no branch sees any more."""
        if self.orphaned:
            seen = np.any(self.cache.visible[sorted(self.mask_rows)][:, self.orphaned], axis=0).tolist()
            self.free([column for column, held in zip(self.orphaned, seen, strict=True) if not held])
            self.orphaned = [column for column, held in zip(self.orphaned, seen, strict=True) if held]

    @property
    def taken(self) -> int:
        """Columns in use, including the scratch column."""
        return self.untouched - len(self.freed)

    def allocate(self, count: int) -> list[int]:
        """Take the `count` lowest free columns."""
        columns = [heappop(self.freed) for _ in range(min(count, len(self.freed)))]
        more = count - len(columns)
        columns += range(self.untouched, self.untouched + more)
        self.untouched += more
        self.cache.reserve(self.untouched)
        return columns

    def free(self, columns: list[int]) -> None:
        """Let columns be allocated again."""
        if columns:
            self.freed += columns
            heapify(self.freed)


class TreeLayer(CacheLayerMixin):
    """Keys and values of one layer, (rows, columns, heads, head size); grows when the cache does."""

    def __init__(self, cache: TreeCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = (
            states.new_empty(0, 0, *states.shape[1:], dtype=self.cache.dtype) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (1, heads, tokens, head size) at the cache's `write_indices`; return keys and values of all rows."""
        keys, values = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
        self.fit(keys, values)
        self.keys.flatten(0, 1).index_copy_(0, self.cache.write_indices, keys.to(self.keys.dtype))
        self.values.flatten(0, 1).index_copy_(0, self.cache.write_indices, values.to(self.values.dtype))
        return self.keys, self.values

    def fit(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Grow to the cache's rows and columns, for states (tokens, heads, head size) like these."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        if self.keys.shape[:2] != (self.cache.rows, self.cache.columns):
            self.keys, self.values = self._grown(self.keys), self._grown(self.values)

    def _grown(self, old: torch.Tensor) -> torch.Tensor:
        # Zeros, not empty: a masked column still takes part in 0 * value, and 0 * NaN is NaN.
        new = old.new_zeros(self.cache.rows, self.cache.columns, *old.shape[2:])
        new[: old.shape[0], : old.shape[1]] = old
        return new

    def get_seq_length(self) -> int:
        return 0  # positions are always passed in

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # the masks come with the attention metadata

    def get_max_length(self) -> int:
        return -1


class TreeCache(Cache):
    """The rows of all live requests, kept dense: closing one moves the last row into its place.

    Args:
        layers: Number of layers of the model.
        bytes_per_token: Bytes of keys and values of one token, of all layers.
        size: Rows and columns to begin with.
        dtype: Of keys and values; None for what the model computes.

    `visible` (mask rows, columns) says which columns each path attends to, `positions` (rows, columns)
    at which position the token of a column is, and `write_indices` (tokens,) where the next forward
    writes, as indices into rows * columns.
    """

    def __init__(
        self,
        layers: int,
        bytes_per_token: int = 0,
        size: tuple[int, int] = (1, BLOCK),
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(layers=[TreeLayer(self) for _ in range(layers)])
        self.size = size
        self.dtype = dtype
        self.bytes_per_token = bytes_per_token
        self.trees: list[Tree] = []
        self.write_indices: torch.Tensor
        self._allocate()

    def _allocate(self) -> None:
        self.rows, self.columns = self.size
        self.visible: NDArray[np.bool_] = np.zeros((16, self.columns), dtype=bool)
        self.positions: NDArray[np.int64] = np.zeros((self.rows, self.columns), dtype=np.int64)
        self.free_mask_rows = list(range(len(self.visible)))
        for layer in self.layers:
            layer.is_initialized = False
            layer.keys = layer.values = None

    @property
    def bytes(self) -> int:
        """Bytes of the cache as it is."""
        return self.bytes_with(0, 0)

    def bytes_with(self, rows: int, columns: int) -> int:
        """Return its bytes with `rows` more rows, and at least `columns` columns in each row."""
        return self._rows_for(len(self.trees) + rows) * self._columns_for(columns) * self.bytes_per_token

    def _rows_for(self, rows: int) -> int:
        """A quarter more than is needed, so that the cache seldom grows."""
        return self.rows if rows <= self.rows else rows + rows // 4

    def _columns_for(self, columns: int) -> int:
        """A quarter more than is needed, rounded up to whole blocks."""
        return self.columns if columns <= self.columns else -(-columns * 5 // 4 // BLOCK) * BLOCK

    def columns_within(self, more: int) -> int:
        """Return how many columns may be in use before the cache grows by over `more` columns."""
        return max(self.columns, (self.columns + more) // BLOCK * BLOCK * 4 // 5)

    def open(self) -> Tree:
        """Return a new, empty row."""
        if len(self.trees) == self.rows:
            self.rows = self._rows_for(self.rows + 1)
            self.positions = _padded(self.positions, (self.rows, self.columns))
        tree = Tree(self, len(self.trees))
        self.trees.append(tree)
        return tree

    @torch.inference_mode()
    def close(self, tree: Tree) -> None:
        """Free a row, with all its branches."""
        self.free_mask_rows += tree.mask_rows
        last = self.trees.pop()
        if last is not tree:
            self.positions[tree.row] = self.positions[last.row]
            for layer in self._initialized_layers():
                if last.row < len(layer.keys):  # else nothing has been written there yet
                    for states in (layer.keys, layer.values):
                        states[tree.row, : last.untouched] = states[last.row, : last.untouched]
            last.row = tree.row
            self.trees[last.row] = last
        if not self.trees and (self.rows, self.columns) != self.size:  # release what a large request took
            self._allocate()

    def allocate_mask_row(self, like: int | None = None) -> int:
        """Return a free mask row that sees what the mask row `like` sees, or nothing."""
        if not self.free_mask_rows:
            count = len(self.visible)
            self.visible = _padded(self.visible, (2 * count, self.columns))
            self.free_mask_rows = list(range(count, 2 * count))
        mask_row = self.free_mask_rows.pop()
        self.visible[mask_row] = False if like is None else self.visible[like]
        return mask_row

    def reserve(self, columns: int) -> None:
        """Have at least so many columns from now on."""
        if columns > self.columns:
            self.columns = self._columns_for(columns)
            self.visible = _padded(self.visible, (len(self.visible), self.columns))
            self.positions = _padded(self.positions, (self.rows, self.columns))

    @torch.inference_mode()
    def read(self, tree: Tree, tokens: int) -> States:
        """Return a copy of the keys and values of the first `tokens` tokens of the trunk."""
        columns = tree.columns[:tokens]
        return [
            (layer.keys[tree.row, columns], layer.values[tree.row, columns]) for layer in self._initialized_layers()
        ]

    @torch.inference_mode()
    def write(self, tree: Tree, ids: Sequence[int], states: States) -> None:
        """Make tokens, with keys and values that were read before, the trunk of an empty tree."""
        branch = tree.branch()
        columns = branch.extend(ids)
        for layer, (keys, values) in zip(self.layers, states, strict=False):
            layer.fit(keys, values)
            layer.keys[tree.row, columns], layer.values[tree.row, columns] = keys, values
        tree.keep(branch)
        tree.drop(branch)

    def copy(self, source: Tree, target: Tree) -> None:
        """Copy the trunk of a tree to an empty one."""
        self.write(target, source.ids, self.read(source, len(source.ids)))

    def _initialized_layers(self) -> list[TreeLayer]:
        return [layer for layer in self.layers if layer.is_initialized]


def _padded(array: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    padded = np.zeros(shape, dtype=array.dtype)
    padded[: array.shape[0], : array.shape[1]] = array
    return padded
