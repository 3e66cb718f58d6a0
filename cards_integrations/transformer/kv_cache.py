"""One KV cache for all live requests: a row per request, a tree of candidates in each row.

A row holds the *trunk* (prompt and kept text) once, and the *branches* (candidates) that grow from
it. Every token takes one column of its row; which columns a token attends to is a boolean vector, a
*lane*, so a candidate sees its own path and nothing else. Keeping a candidate makes its columns part
of the trunk, rejecting one frees them: no key or value is copied or computed again.
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

States = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of consecutive tokens, (tokens, heads, head size) for each layer."""


class Branch:
    """A path from the root of a tree: its first `base` tokens are its parent's, `ids` its own."""

    def __init__(self, tree: Tree, base: int, lane: int) -> None:
        self.tree = tree
        self.base = base
        self.lane = lane
        self.columns: list[int] = []
        self.ids: list[int] = []

    @property
    def length(self) -> int:
        """Tokens on the path, which is the position of the next one."""
        return self.base + len(self.columns)

    def extend(self, ids: Sequence[int]) -> list[int]:
        """Take a column for each token. The branch sees them from now on."""
        columns, position = self.tree.take(len(ids)), self.length
        cache = self.tree.cache
        cache.positions[self.tree.slot, columns] = range(position, position + len(ids))
        cache.sees[self.lane, columns] = True
        self.columns += columns
        self.ids += ids
        return columns

    def retract(self, tokens: int) -> None:
        """Free the columns of the last tokens again."""
        end = len(self.columns) - tokens
        last, self.columns, self.ids = self.columns[end:], self.columns[:end], self.ids[:end]
        self.tree.cache.sees[self.lane, last] = False
        self.tree.free(last)

    def branch(self, own: int | None = None) -> Branch:
        """A new branch that grows from this one after its first `own` own tokens (default: at its tip)."""
        beyond = self.columns[own:] if own is not None else []
        branch = self.tree.grow(self.length - len(beyond), self.lane)
        self.tree.cache.sees[branch.lane, beyond] = False
        return branch


class Tree:
    """One row: the trunk's tokens and columns in order, and which columns are free."""

    def __init__(self, cache: TreeCache, slot: int) -> None:
        self.cache = cache
        self.slot = slot
        self.lane = cache.lane()
        self.lanes = {self.lane}  # of the trunk and of all branches
        self.ids: list[int] = []
        self.columns: list[int] = []
        self.untouched = SCRATCH + 1
        self.freed: list[int] = []  # a heap
        self.left: list[int] = []  # no longer of the trunk, but branches that left it earlier see them

    def branch(self, base: int | None = None) -> Branch:
        """A new branch that leaves the trunk after `base` tokens (default: at its tip)."""
        branch = self.grow(len(self.columns) if base is None else base, self.lane)
        if base is not None:
            self.cache.sees[branch.lane, self.columns[base:]] = False
        return branch

    def grow(self, base: int, like: int) -> Branch:
        lane = self.cache.lane(like)
        self.lanes.add(lane)
        return Branch(self, base, lane)

    def keep(self, branch: Branch, tokens: int | None = None) -> None:
        """Make the branch (its first `tokens` own tokens) the trunk; it is then empty, at the new tip."""
        beyond = branch.columns[tokens:] if tokens is not None else []
        self.cache.sees[branch.lane, beyond] = False
        self.cache.sees[self.lane] = self.cache.sees[branch.lane]
        self.free(beyond)
        self.left += self.columns[branch.base :]
        self._free_left()
        self.columns[branch.base :] = branch.columns[:tokens]
        self.ids[branch.base :] = branch.ids[:tokens]
        branch.base, branch.columns, branch.ids = len(self.columns), [], []

    def drop(self, branch: Branch) -> None:
        """Free the branch's own columns, and its lane."""
        if branch.lane >= 0:
            self.free(branch.columns)
            self.lanes.remove(branch.lane)
            self.cache.lanes.append(branch.lane)
            branch.lane, branch.columns, branch.ids = -1, [], []
            self._free_left()

    def _free_left(self) -> None:
        """Free what no branch sees any more."""
        if self.left:
            seen = np.any(self.cache.sees[sorted(self.lanes)][:, self.left], axis=0).tolist()
            self.free([column for column, held in zip(self.left, seen, strict=True) if not held])
            self.left = [column for column, held in zip(self.left, seen, strict=True) if held]

    @property
    def taken(self) -> int:
        """Columns in use, with the scratch column."""
        return self.untouched - len(self.freed)

    def take(self, count: int) -> list[int]:
        """The `count` lowest free columns."""
        columns = [heappop(self.freed) for _ in range(min(count, len(self.freed)))]
        more = count - len(columns)
        columns += range(self.untouched, self.untouched + more)
        self.untouched += more
        self.cache.reserve(self.untouched)
        return columns

    def free(self, columns: list[int]) -> None:
        if columns:
            self.freed += columns
            heapify(self.freed)


class TreeLayer(CacheLayerMixin):
    """Keys and values of one layer, (rows, columns, heads, head size); grows when the cache does."""

    def __init__(self, cache: TreeCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = (states.new_empty(0, 0, *states.shape[1:]) for states in (key_states, value_states))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (1, heads, tokens, size) at the cache's current place; return what all rows hold."""
        keys, values = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
        self.fit(keys, values)
        self.keys.flatten(0, 1).index_copy_(0, self.cache.place, keys)
        self.values.flatten(0, 1).index_copy_(0, self.cache.place, values)
        return self.keys, self.values

    def fit(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Grow to the cache's rows and columns; (tokens, heads, size) are like what will be written."""
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
        return query_length, 0  # the mask is made by the layout

    def get_max_length(self) -> int:
        return -1


class TreeCache(Cache):
    """The rows of all live requests, kept dense: closing one moves the last row into its place."""

    def __init__(self, layers: int, bytes_per_token: int = 0, size: tuple[int, int] = (1, 64)) -> None:
        super().__init__(layers=[TreeLayer(self) for _ in range(layers)])
        self.size = size  # rows and columns to begin with
        self.bytes_per_token = bytes_per_token  # keys and values, of all layers
        self.trees: list[Tree] = []
        self.place: torch.Tensor  # where the next forward writes: (tokens,) of rows * columns
        self._begin()

    def _begin(self) -> None:
        self.rows, self.columns = self.size
        self.sees: NDArray[np.bool_] = np.zeros((16, self.columns), dtype=bool)
        self.positions: NDArray[np.int64] = np.zeros((self.rows, self.columns), dtype=np.int64)
        self.lanes = list(range(len(self.sees)))  # free ones
        for layer in self.layers:
            layer.is_initialized = False
            layer.keys = layer.values = None

    @property
    def bytes(self) -> int:
        return self.bytes_with(0, 0)

    def bytes_with(self, rows: int, columns: int) -> int:
        """What it takes with so many more rows, each of at least so many columns."""
        return self._rows_for(len(self.trees) + rows) * self._columns_for(columns) * self.bytes_per_token

    def _rows_for(self, rows: int) -> int:
        """A quarter more than is needed, so that the cache grows seldom."""
        return self.rows if rows <= self.rows else rows + rows // 4

    def _columns_for(self, columns: int) -> int:
        """The same, in whole blocks of 64."""
        return self.columns if columns <= self.columns else -(-columns * 5 // 4 // 64) * 64

    def columns_within(self, more: int) -> int:
        """How many may be in use before it grows by over `more`."""
        return max(self.columns, (self.columns + more) // 64 * 64 * 4 // 5)

    def open(self) -> Tree:
        if len(self.trees) == self.rows:
            self.rows = self._rows_for(self.rows + 1)
            self.positions = _padded(self.positions, (self.rows, self.columns))
        tree = Tree(self, len(self.trees))
        self.trees.append(tree)
        return tree

    @torch.inference_mode()
    def close(self, tree: Tree) -> None:
        """Free the row, with all its branches."""
        self.lanes += tree.lanes
        last = self.trees.pop()
        if last is not tree:
            self.positions[tree.slot] = self.positions[last.slot]
            for layer in self._read_layers():
                if last.slot < len(layer.keys):  # else nothing was read there yet
                    for states in (layer.keys, layer.values):
                        states[tree.slot, : last.untouched] = states[last.slot, : last.untouched]
            last.slot = tree.slot
            self.trees[last.slot] = last
        if not self.trees and (self.rows, self.columns) != self.size:  # what a large request took is given back
            self._begin()

    def lane(self, like: int | None = None) -> int:
        """A free lane, which sees what the lane `like` sees, or nothing."""
        if not self.lanes:
            lanes = len(self.sees)
            self.sees = _padded(self.sees, (2 * lanes, self.columns))
            self.lanes = list(range(lanes, 2 * lanes))
        lane = self.lanes.pop()
        self.sees[lane] = False if like is None else self.sees[like]
        return lane

    def reserve(self, columns: int) -> None:
        """Have so many columns from now on."""
        if columns > self.columns:
            self.columns = self._columns_for(columns)
            self.sees = _padded(self.sees, (len(self.sees), self.columns))
            self.positions = _padded(self.positions, (self.rows, self.columns))

    @torch.inference_mode()
    def read(self, tree: Tree, tokens: int) -> States:
        """A copy of the first `tokens` tokens of the trunk."""
        columns = tree.columns[:tokens]
        return [(layer.keys[tree.slot, columns], layer.values[tree.slot, columns]) for layer in self._read_layers()]

    @torch.inference_mode()
    def write(self, tree: Tree, ids: Sequence[int], states: States) -> None:
        """Make the trunk of an empty tree from tokens that were read before."""
        branch = tree.branch()
        columns = branch.extend(ids)
        for layer, (keys, values) in zip(self.layers, states, strict=False):
            layer.fit(keys, values)
            layer.keys[tree.slot, columns], layer.values[tree.slot, columns] = keys, values
        tree.keep(branch)
        tree.drop(branch)

    def copy(self, source: Tree, target: Tree) -> None:
        """Make the trunk of an empty tree from another one's."""
        self.write(target, source.ids, self.read(source, len(source.ids)))

    def _read_layers(self) -> list[TreeLayer]:
        return [layer for layer in self.layers if layer.is_initialized]


def _padded(array: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    padded = np.zeros(shape, dtype=array.dtype)
    padded[: array.shape[0], : array.shape[1]] = array
    return padded
