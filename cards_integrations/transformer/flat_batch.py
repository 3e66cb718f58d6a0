"""From the inputs of a forward to one flat sequence of tokens, and the groups of rows that attend together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cards_integrations.transformer.attention import FULL, SLIDING, AttentionMetadata, GroupMetadata
from cards_integrations.transformer.kv_cache import Branch, Tree, TreeCache

SHORT = 32  # rows with at most so many tokens attend together, padded to the longest


@dataclass
class ForwardInput:
    """Tokens to append to a branch in the next forward, and how many of the last give an output.

    `owner` is for the caller.
    """

    branch: Branch
    ids: Sequence[int]
    owner: Any = None
    outputs: int = 1


class FlatBatch:
    """The tokens of all inputs one after another, ordered by attention groups.

    Making it appends the tokens to their branches.

    Args:
        inputs: What the forward is to read.
        cache: The cache of their branches.
    """

    def __init__(self, inputs: Sequence[ForwardInput], cache: TreeCache) -> None:
        self.cache = cache
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.rows: list[int] = []
        self.columns: list[int] = []
        self.mask_rows: list[int] = []
        self.runs: list[tuple[int, list[int]]] = []  # where inputs of several tokens begin, and their columns
        self.output_indices: list[range] = [range(0)] * len(inputs)
        self.groups = attention_groups(inputs)
        for group in self.groups:
            self._append_group(group)
        self.visible = self._visible()

    def _append_group(self, group: AttentionGroup) -> None:
        group.start = len(self.ids)
        for tree, row in group.inputs.items():
            at = group.index[tree] * group.length
            for i, item in row:
                group.restore += range(at, at + len(item.ids))
                at += len(item.ids)
                self._append(item)
                self.output_indices[i] = range(len(self.ids) - item.outputs, len(self.ids))
        group.end = len(self.ids)

    def _append(self, item: ForwardInput) -> None:
        branch, n = item.branch, len(item.ids)
        self.positions += range(branch.length, branch.length + n)
        columns = branch.extend(item.ids)
        if n > 1:
            self.runs.append((len(self.ids), columns))
        self.ids += item.ids
        self.columns += columns
        self.rows += [branch.tree.row] * n
        self.mask_rows += [branch.mask_row] * n

    def _visible(self) -> NDArray[np.bool_]:
        """The columns that each token attends to, those of its path up to itself: (tokens, columns)."""
        visible: NDArray[np.bool_] = self.cache.visible[self.mask_rows]
        for start, columns in self.runs:
            visible[start : start + len(columns), columns] = np.tri(len(columns), dtype=bool)
        return visible

    def tensors(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the model's inputs.

        Returns:
            `ids`, `positions` and `write_indices` (tokens,), the last as indices into rows * columns of
            the cache, and `output_indices` (outputs,) of the tokens with outputs.
        """
        width, n = self.cache.columns, len(self.ids)
        write_indices = [row * width + column for row, column in zip(self.rows, self.columns, strict=True)]
        numbers = torch.tensor([*self.ids, *self.positions, *write_indices, *chain(*self.output_indices)]).to(device)
        names = ("ids", "positions", "write_indices", "output_indices")
        return dict(zip(names, numbers.tensor_split((n, 2 * n, 3 * n)), strict=True))

    def metadata(self, patterns: list[str], window: int, dtype: torch.dtype, device: torch.device) -> AttentionMetadata:
        """Return who attends to what.

        Args:
            patterns: The attention pattern of each layer.
            window: Tokens of a sliding window.
            dtype: Of the additive masks.
            device: Where the forward runs.
        """
        return AttentionMetadata(
            [self._group(group, patterns, window, dtype, device) for group in self.groups], patterns
        )

    def _group(
        self, group: AttentionGroup, patterns: list[str], window: int, dtype: torch.dtype, device: torch.device
    ) -> GroupMetadata:
        own = slice(group.start, group.end)
        columns = np.flatnonzero(self.visible[own].any(0))
        if not group.alone:
            columns = np.arange(columns[-1] + 1)
        visible = {FULL: self.visible[own][:, columns]}
        if SLIDING in patterns:
            keys = self.cache.positions[self.rows[own]][:, columns]
            visible[SLIDING] = visible[FULL] & (np.array(self.positions[own])[:, None] - keys < window)
        tokens = np.zeros(group.rows * group.length, dtype=np.int64)
        tokens[group.restore] = range(group.start, group.end)
        return GroupMetadata(
            group.cache_rows(device),
            torch.from_numpy(columns).to(device) if group.alone else None,
            torch.from_numpy(tokens).view(group.rows, group.length).to(device),
            torch.tensor(group.restore, device=device),
            group.start if group.restore == list(range(len(tokens))) else None,
            {pattern: group.additive_mask(visible[pattern], dtype, device) for pattern in set(patterns)},
        )


class AttentionGroup:
    """Inputs that attend together: consecutive rows of the cache, or scattered ones, or one long input `alone`.

    `index` is the place of each tree among the group's `rows`, each of which is padded to `length`
    tokens; `start` and `end` bound the group's tokens in the flat sequence, and `restore` are their
    places in rows * length.
    """

    def __init__(self, inputs: dict[Tree, list[tuple[int, ForwardInput]]], alone: bool = False) -> None:
        rows = [tree.row for tree in inputs]
        self.inputs = inputs
        self.alone = alone  # reads the columns of its own path only
        self.length = max(sum(len(item.ids) for _, item in row) for row in inputs.values())
        self.first, span = min(rows), max(rows) - min(rows) + 1
        self.dense = span <= 2 * len(inputs)  # then idle rows between them cost less than a copy of the others
        self.rows = span if self.dense else len(inputs)
        self.index = {tree: tree.row - self.first if self.dense else i for i, tree in enumerate(inputs)}
        self.start = self.end = 0
        self.restore: list[int] = []

    def cache_rows(self, device: torch.device) -> slice | torch.Tensor:
        """Return the group's rows in the cache."""
        if self.dense:
            return slice(self.first, self.first + self.rows)
        return torch.tensor([tree.row for tree in self.inputs], device=device)

    def additive_mask(self, visible: NDArray[np.bool_], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return 0 where a token attends and -inf elsewhere.

        Args:
            visible: (tokens, columns) of the group's tokens.
            dtype: Of the mask.
            device: Where it is made.

        Returns:
            (rows, 1, length, columns).
        """
        hidden = np.ones((self.rows * self.length, visible.shape[1]), dtype=bool)
        hidden[:, 0] = False  # padding must see something, or its softmax is NaN
        hidden[self.restore] = ~visible
        masked = torch.from_numpy(hidden).to(device)
        mask = torch.zeros(masked.shape, dtype=dtype, device=device).masked_fill_(masked, -torch.inf)
        return mask.view(self.rows, 1, self.length, -1)


def attention_groups(inputs: Sequence[ForwardInput]) -> list[AttentionGroup]:
    """Return all short rows as one group; a row of many short inputs, and a long input, are groups of their own."""
    long: list[AttentionGroup] = []
    by_tree: dict[Tree, list[tuple[int, ForwardInput]]] = {}
    for i, item in enumerate(inputs):
        if len(item.ids) > SHORT:
            long.append(AttentionGroup({item.branch.tree: [(i, item)]}, alone=True))
        else:
            by_tree.setdefault(item.branch.tree, []).append((i, item))
    short = {tree: row for tree, row in by_tree.items() if sum(len(item.ids) for _, item in row) <= SHORT}
    short = dict(sorted(short.items(), key=lambda row: row[0].row))
    many = [AttentionGroup({tree: row}) for tree, row in by_tree.items() if tree not in short]
    return ([AttentionGroup(short)] if short else []) + many + long
