"""One flat sequence of the tokens of a forward, and the groups of rows that attend together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cards_integrations.transformer.attention import (
    CHUNKED,
    FULL,
    SLIDING,
    AttentionMetadata,
    GroupMetadata,
    SharedMetadata,
)
from cards_integrations.transformer.kv_block import RowBlock
from cards_integrations.transformer.kv_cache import Branch, Tree, TreeCache
from cards_integrations.transformer.shared_prefix import SharedPrefix

SHORT = 32  # rows with at most this many tokens attend together, padded to the longest
COLUMNS = 256  # a rounded step reads a multiple of this many columns
LARGEST = 512  # tokens of a step above which it is not rounded


@dataclass
class ForwardInput:
    """Tokens that the next forward reads.

    Attributes:
        branch: The branch that they are appended to.
        ids: The tokens.
        owner: Anything that the caller wants to find again.
        outputs: How many of the last tokens have an output.
    """

    branch: Branch
    ids: Sequence[int]
    owner: Any = None
    outputs: int = 1


class Reach(NamedTuple):
    """How far back layers see that do not see everything: tokens of a sliding window, and of a chunk; 0 for none."""

    window: int
    chunk: int

    def masks(
        self, visible: NDArray[np.bool_], positions: NDArray[np.int64], keys: NDArray[np.int64]
    ) -> dict[str, NDArray[np.bool_]]:
        """Return the masks of the patterns that do not see everything.

        Args:
            visible: What each token sees with full attention, (tokens, columns).
            positions: The positions of the tokens, (tokens, 1).
            keys: The positions of the columns, (tokens, columns).

        Returns:
            By pattern a mask (tokens, columns).
        """
        found = {}
        if self.window:
            found[SLIDING] = visible & (positions - keys < self.window)
        if self.chunk:
            found[CHUNKED] = visible & (positions // self.chunk == keys // self.chunk)
        return found


class FlatBatch:
    """The tokens of all inputs one after another, ordered by blocks of the cache and attention groups.

    Making it appends the tokens to their branches.

    Args:
        inputs: What the forward is to read.
        cache: The cache of their branches.
        rounded: Whether the numbers of tokens, rows and columns are rounded up to a few sizes if the step is small.
            Padding is written to the scratch column of a block's first row, which no token sees.

    Attributes:
        rounded: Whether they have been rounded.
        read: Number of tokens, without padding.
        sharing: By shared prefix the indices of the tokens of its rows.
        ends: For each input the index after its last token.
        output_indices: The indices of the tokens with outputs, input by input.
        sections: The blocks, each with the range of its tokens.
    """

    def __init__(self, inputs: Sequence[ForwardInput], cache: TreeCache, rounded: bool = False) -> None:
        more = _tokens_of_rows(inputs)
        self.cache = cache
        cache.make_room({tree: n for tree, n in more.items() if not tree.has_room(n)})
        self.groups = attention_groups(inputs, more)
        self.rounded = rounded and _can_be_rounded(self.groups) and not any(tree.shared for tree in more)
        self.sharing: dict[SharedPrefix, list[int]] = {}
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.rows: list[int] = []
        self.columns: list[int] = []
        self.mask_rows: list[int] = []
        self.runs: list[tuple[int, list[int]]] = []  # of inputs with several tokens: the first index, and the columns
        self.ends = [0] * len(inputs)
        self.sections: list[tuple[RowBlock, slice]] = []
        for block, groups in groupby(self.groups, key=lambda group: group.block):
            self._append_section(block, [*groups])
        self.arrays = _Arrays(*(np.array(each) for each in (self.positions, self.rows, self.columns, self.mask_rows)))
        for block, tokens in self.sections:
            self.arrays.note(block, tokens)
        self.read = sum(more.values())
        self._inputs = inputs
        pairs = zip(self.ends, inputs, strict=True)
        self.output_indices = [index for end, item in pairs for index in range(end - item.outputs, end)]

    @property
    def inputs(self) -> list[ForwardInput]:
        """The inputs in the order of their tokens."""
        return [self._inputs[i] for i in sorted(range(len(self.ends)), key=self.ends.__getitem__)]

    def _append_section(self, block: RowBlock, groups: list[AttentionGroup]) -> None:
        start = len(self.ids)
        for group in groups:
            self._append_group(group)
        if self.rounded:
            self._pad(next_power(len(self.ids) - start) - (len(self.ids) - start))
            groups[0].round_up(len(self.ids) - start)
        self.sections.append((block, slice(start, len(self.ids))))

    def _append_group(self, group: AttentionGroup) -> None:
        group.start = end = len(self.ids)
        if group.singles:
            self._append_singles(group.inputs)
        else:
            for item in group.inputs:
                self._append_run(item, item.branch.tree)
        for i, item in zip(group.indices, group.inputs):  # noqa: B905 (as long as each other, and this is a hot loop)
            end += len(item.ids)
            self.ends[i] = end
            if (shared := item.branch.tree.shared) is not None:
                self.sharing.setdefault(shared, []).extend(range(end - len(item.ids), end))
        group.end = end

    def _append_singles(self, inputs: Sequence[ForwardInput]) -> None:
        """Do what `_append_run` does for inputs of one token each, as in most steps, in a fraction of the time."""
        branches = [item.branch for item in inputs]
        ids, columns = [item.ids[0] for item in inputs], [branch.tree.allocate_one() for branch in branches]
        for branch, token, column in zip(branches, ids, columns):  # noqa: B905
            self.positions.append(branch.base + len(branch.columns))
            branch.columns.append(column)
            branch.ids.append(token)
        self.ids += ids
        self.columns += columns
        self.rows += [branch.tree.row for branch in branches]
        self.mask_rows += [branch.mask_row for branch in branches]

    def _append_run(self, item: ForwardInput, tree: Tree) -> None:
        branch, n = item.branch, len(item.ids)
        position, columns = branch.length, branch.append(item.ids)
        self.runs.append((len(self.ids), columns))
        self.ids += item.ids
        self.positions += range(position, position + n)
        self.columns += columns
        self.rows += [tree.row] * n
        self.mask_rows += [branch.mask_row] * n

    def _pad(self, more: int) -> None:
        for values, padding in ((self.ids, 0), (self.positions, 0), (self.rows, 0), (self.columns, 0)):
            values += [padding] * more
        self.mask_rows += [-1] * more

    def tensors(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the model's inputs.

        Returns:
            `ids`, `positions` and `write_indices` (tokens,), the last as indices into rows * columns of the token's
            block, and `output_indices` (outputs,) of the tokens with outputs.
        """
        n, outputs = len(self.ids), self.output_indices
        if self.rounded:
            outputs = outputs + [0] * (next_power(len(outputs)) - len(outputs))
        write_indices = self.arrays.columns.copy()
        for block, tokens in self.sections:
            write_indices[tokens] += self.arrays.rows[tokens] * block.columns
        numbers = np.concatenate([self.ids, self.arrays.positions, write_indices, outputs])
        names = ("ids", "positions", "write_indices", "output_indices")
        parts = torch.from_numpy(numbers).to(device).tensor_split((n, 2 * n, 3 * n))
        return dict(zip(names, parts, strict=True))

    def long(self, inputs: Sequence[ForwardInput], switch: int) -> torch.Tensor:
        """Return which tokens are read with the rotary frequencies of long texts, (tokens,).

        Args:
            inputs: The inputs of the batch.
            switch: The position from which on all tokens are read so, whatever their text.
        """
        flags = self.arrays.positions >= switch
        for end, item in zip(self.ends, inputs, strict=True):
            flags[end - len(item.ids) : end] |= item.branch.long
        return torch.from_numpy(flags)

    def metadata(
        self, patterns: list[str], reach: Reach, dtype: torch.dtype, device: torch.device
    ) -> AttentionMetadata:
        """Return what attends to what.

        Args:
            patterns: The attention pattern of each layer.
            reach: How far back layers see that do not see everything.
            dtype: The data type of the additive masks.
            device: Where the forward runs.
        """
        groups = [self._group(group, patterns, reach, dtype, device) for group in self.groups]
        shared = [SharedMetadata(each.states, _compact(tokens, device)) for each, tokens in self.sharing.items()]
        return AttentionMetadata(groups, patterns, self.cache, self.rounded, shared)

    def _group(
        self, group: AttentionGroup, patterns: list[str], reach: Reach, dtype: torch.dtype, device: torch.device
    ) -> GroupMetadata:
        own = slice(group.start, group.end)
        columns, visible = self._visible(group)
        masks = {FULL: visible}
        if not {*patterns} <= {FULL}:
            keys = group.block.positions[self.arrays.rows[own]][:, columns]
            masks |= reach.masks(visible, self.arrays.positions[own, None], keys)
        tokens = np.zeros(group.rows * group.length, dtype=np.int64)
        tokens[group.restore] = np.arange(group.start, group.end)
        in_order = not self.rounded and np.array_equal(group.restore, np.arange(len(tokens)))
        restore = np.pad(group.restore, (0, group.padded - len(group.restore))) if self.rounded else group.restore
        return GroupMetadata(
            group.block,
            group.cache_rows(device),
            columns if isinstance(columns, slice) else torch.from_numpy(columns).to(device),
            torch.from_numpy(tokens).view(group.rows, group.length).to(device),
            torch.from_numpy(restore).to(device),
            group.start if in_order else None,
            {pattern: group.additive_mask(masks[pattern], in_order, dtype, device) for pattern in set(patterns)},
        )

    def _visible(self, group: AttentionGroup) -> tuple[slice | NDArray[np.int64], NDArray[np.bool_]]:
        """Return the columns that a group reads, and which of them each token attends to, (tokens, columns)."""
        mask_rows, used = self.arrays.mask_rows[group.start : group.end], group.used_columns
        visible: NDArray[np.bool_] = group.block.visible[mask_rows, :used]
        for start, columns in self.runs:
            if group.start <= start < group.end:
                at = start - group.start
                visible[at : at + len(columns), columns] = np.tri(len(columns), dtype=bool)
        seen = np.flatnonzero(visible.any(0))
        first, end = (int(seen[0]), int(seen[-1]) + 1) if group.alone else (0, int(seen[-1]) + 1)
        if group.alone and len(seen) < end - first:
            return seen, visible[:, seen]
        if self.rounded:
            end = min(-(-end // COLUMNS) * COLUMNS, group.block.columns)
            visible = np.pad(visible, ((0, 0), (0, max(0, end - used))))
        return slice(first, end), visible[:, first:end]


@dataclass
class _Arrays:
    """For each token its position, its row and column in its block, and the mask row of its branch, (tokens,) each."""

    positions: NDArray[np.int64]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    mask_rows: NDArray[np.int64]

    def note(self, block: RowBlock, tokens: slice) -> None:
        """Note the positions of a block's tokens, and let their branches see them."""
        block.positions[self.rows[tokens], self.columns[tokens]] = self.positions[tokens]
        seen = self.columns[tokens] > 0  # not the padding
        block.visible[self.mask_rows[tokens][seen], self.columns[tokens][seen]] = True


class AttentionGroup:
    """Inputs that attend together: consecutive or scattered rows of a block, or one long input alone.

    Args:
        inputs: All inputs of the forward.
        indices: Which of them are in the group.
        alone: Whether it is one input, which reads only the columns of its own path.

    Attributes:
        indices: The indices, in order of the rows.
        inputs: The inputs, in the same order.
        block: The block of their rows.
        singles: True if each input has one token.
        distinct: The rows that have inputs.
        dense: True if all rows from the first to the last take part, idle ones included.
        first: The first row.
        rows: How many rows take part.
        length: The tokens that each of them is padded to.
        start: The index of the group's first token in the flat sequence.
        end: The index after its last token.
        restore: The places of the group's tokens in rows * length.
        padded: The least number of outputs that it returns.
    """

    def __init__(self, inputs: Sequence[ForwardInput], indices: Sequence[int], alone: bool = False) -> None:
        by_row = sorted([(inputs[i].branch.tree.row, i) for i in indices])
        self.indices = [i for _, i in by_row]
        self.inputs = [inputs[i] for i in self.indices]
        self.block = self.inputs[0].branch.tree.block
        self.alone = alone
        tokens: dict[int, int] = {}
        for row, i in by_row:
            tokens[row] = tokens.get(row, 0) + len(inputs[i].ids)
        self.singles = sum(tokens.values()) == len(indices)
        self.distinct = [*tokens]
        self.length = max(tokens.values())
        self.first, span = self.distinct[0], self.distinct[-1] + 1 - self.distinct[0]
        self.dense = span <= 2 * len(tokens)  # idle rows in between then cost less than a copy of the others
        self.rows = span if self.dense else len(tokens)
        self.start = self.end = self.padded = 0
        places = [row - self.first for row in tokens] if self.dense else range(len(tokens))
        starts = zip([place * self.length for place in places], tokens.values(), strict=True)
        self.restore = np.array([at for start, n in starts for at in range(start, start + n)])

    @property
    def used_columns(self) -> int:
        """An upper bound on the columns that its tokens see."""
        return max([item.branch.tree.untouched for item in self.inputs])

    def round_up(self, tokens: int) -> None:
        """Begin at the block's first row, and round rows, and tokens of each, up to powers of two."""
        long, total = next_power(self.length), min(next_power(self.first + self.rows), self.block.rows)
        self.restore = (self.first + self.restore // self.length) * long + self.restore % self.length
        self.first, self.rows, self.length, self.padded = 0, total, long, tokens

    def cache_rows(self, device: torch.device) -> slice | torch.Tensor:
        """Return the group's rows in the block."""
        if self.dense:
            return slice(self.first, self.first + self.rows)
        return torch.tensor(self.distinct, device=device)

    def additive_mask(
        self, visible: NDArray[np.bool_], in_order: bool, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Return a mask of 0 where a token attends, and of the lowest number elsewhere.

        Args:
            visible: Which columns each token of the group attends to, (tokens, columns).
            in_order: True if the tokens fill rows * length, in order.
            dtype: The data type of the mask.
            device: The device of the mask.

        Returns:
            (rows, 1, length, columns).
        """
        hidden = ~visible
        if not in_order:
            hidden = np.ones((self.rows * self.length, visible.shape[1]), dtype=bool)
            hidden[:, 0] = False  # padding must see something, or its softmax is NaN
            hidden[self.restore] = ~visible
        lowest = torch.finfo(dtype).min
        if dtype == torch.float32 and device.type == "cpu":  # the same as below, but faster
            mask = torch.from_numpy(hidden * np.float32(lowest))
        else:
            mask = torch.from_numpy(hidden).to(device).to(dtype).mul_(lowest)
        return mask.view(self.rows, 1, self.length, -1)


def attention_groups(inputs: Sequence[ForwardInput], tokens: Mapping[Tree, int]) -> list[AttentionGroup]:
    """Return the groups of these inputs, those of a block one after another.

    All short rows of a block are one group; a row of many short inputs, and a long input, are groups of their own.

    Args:
        inputs: What the forward is to read.
        tokens: How many tokens each row gets.
    """
    together: dict[RowBlock | Tree, list[int]] = {}
    alone: list[int] = []
    for i, item in enumerate(inputs):
        tree = item.branch.tree
        if len(item.ids) > SHORT:
            alone.append(i)
        else:
            together.setdefault(tree if tokens[tree] > SHORT else tree.block, []).append(i)
    groups = [AttentionGroup(inputs, [i], alone=True) for i in alone]
    groups += [AttentionGroup(inputs, indices) for indices in together.values()]
    return sorted(groups, key=lambda group: group.block.columns)


def _tokens_of_rows(inputs: Sequence[ForwardInput]) -> dict[Tree, int]:
    """Return how many tokens each row of the cache gets."""
    tokens: dict[Tree, int] = {}
    for item in inputs:
        tree = item.branch.tree
        tokens[tree] = tokens.get(tree, 0) + len(item.ids)
    return tokens


def _compact(indices: list[int], device: torch.device) -> slice | torch.Tensor:
    """Return ascending indices, as a slice if they are consecutive."""
    first, end = indices[0], indices[-1] + 1
    return slice(first, end) if end - first == len(indices) else torch.tensor(indices, device=device)


def next_power(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _can_be_rounded(groups: Sequence[AttentionGroup]) -> bool:
    """True for a small step with one group of neighbouring rows in each block."""
    blocks = {group.block for group in groups}
    tokens = sum(group.rows * group.length for group in groups)
    return tokens <= LARGEST and len(blocks) == len(groups) and all(g.dense and not g.alone for g in groups)
