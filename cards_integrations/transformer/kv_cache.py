"""One KV cache for all live requests: a row per request, a tree of candidates in each row.

A row holds the *trunk* (prompt and kept text) once, and the *branches* (candidates) that grow from it. Every token
takes one column of its row. Which columns a path attends to is a boolean vector, a *mask row*, so that a candidate sees
its own path and nothing else. Keeping a candidate makes its columns part of the trunk, and rejecting one frees them: no
key or value is computed again. A row that outgrows its block of rows moves to a wider block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from heapq import heapify, heappop
from typing import NamedTuple
from weakref import ReferenceType, ref

import numpy as np
import torch
from transformers.cache_utils import Cache

from cards_integrations.errors import ModelError
from cards_integrations.transformer.cache_layers import RecurrentLayer, TreeLayer
from cards_integrations.transformer.kv_block import (
    STEP,
    Layout,
    Pair,
    RowBlock,
    States,
    joined,
    part,
    width_for,
    width_within,
)
from cards_integrations.transformer.live_texts import LiveTexts
from cards_integrations.transformer.recurrent import State, StateLayout, StatePool
from cards_integrations.transformer.shared_prefix import SharedPrefix

SCRATCH = 0  # the column of every row that takes the padding of a batch; no token sees it
STATES = 3  # recurrent states that a trunk keeps: the one after its prompt, and the last ones
SPARSE = 4  # a row that uses less than this fraction of its columns moves to a narrower block


class Branch:
    """A path from the root of a tree. Its first `base` tokens are its parent's, the others its own.

    Attributes:
        tree: The tree.
        base: How many tokens of the path are the parent's.
        mask_row: The index of its mask row in the block; -1 once it has been dropped.
        long: True if all of the path is read with the rotary frequencies of long texts.
        columns: The columns of its own tokens, in order.
        ids: Its own tokens.
        states: The states of recurrent layers at the base or after the last forward, by the length of the text.
    """

    def __init__(self, tree: Tree, base: int, mask_row: int, long: bool) -> None:
        self.tree = tree
        self.base = base
        self.mask_row = mask_row
        self.long = long
        self.columns: list[int] = []
        self.ids: list[int] = []
        self.states: dict[int, State] = {}

    @property
    def length(self) -> int:
        """Tokens on the path, which is also the position of the next one."""
        return self.base + len(self.columns)

    def extend(self, ids: Sequence[int]) -> list[int]:
        """Append tokens, which the branch sees from now on, and return their columns."""
        columns, position = self.append(ids), self.length - len(ids)
        block = self.tree.block
        block.positions[self.tree.row, columns] = range(position, position + len(ids))
        block.visible[self.mask_row, columns] = True
        return columns

    def append(self, ids: Sequence[int]) -> list[int]:
        """Like `extend`, but leave it to the caller to set the positions and the mask row."""
        columns = self.tree.allocate(len(ids))
        self.columns += columns
        self.ids += ids
        return columns

    def retract(self, tokens: int) -> None:
        """Remove the last tokens, and free their columns."""
        end = len(self.columns) - tokens
        last, self.columns, self.ids = self.columns[end:], self.columns[:end], self.ids[:end]
        release(self.states, self.length)
        self.tree.block.visible[self.mask_row, last] = False
        self.tree.free(last)

    def branch(self, own: int | None = None) -> Branch:
        """Return a new branch that grows from this one, after its first `own` own tokens (default: all)."""
        beyond = self.columns[own:] if own is not None else []
        branch = self.tree.add_branch(self.length - len(beyond), self.mask_row, self.long)
        if beyond:
            self.tree.block.visible[branch.mask_row, beyond] = False
        branch.begin_with(self.states)
        return branch

    def known(self, tokens: int) -> int:
        """Return the largest length, at most `tokens`, after which another branch can leave this one."""
        return tokens if self.tree.cache.pool is None else known_length(self.states, tokens)

    def begin_with(self, states: Mapping[int, State]) -> None:
        """Share the recurrent state at the base, if there is one."""
        if (state := states.get(self.base)) is not None:
            self.states[self.base] = state.shared()


class Tree:
    """One row of the cache: the trunk and its branches, and which columns are free.

    The first tokens of the trunk may be a prefix that the row shares with others; they have no columns here.

    Attributes:
        cache: The cache.
        block: The block that the row is in.
        row: The index of the row in the block.
        long: True if the trunk is read with the rotary frequencies of long texts.
        mask_row: The index of the trunk's mask row in the block.
        branches: All that have not been dropped.
        ids: The tokens of the trunk, those of a shared prefix included.
        columns: The columns of the trunk's tokens after the shared prefix, in order.
        untouched: The first column that was never used.
        freed: The free columns before that, as a heap.
        orphaned: Columns that are no longer the trunk's, but that branches which left it earlier still see.
        expected: How many columns the prompt takes, read or not.
        chunks: See `LiveTexts`.
        shared: The prefix that the row shares with others; None if there is none.
        states: The states of recurrent layers, by the number of tokens of the trunk after which they are.
    """

    block: RowBlock
    row: int

    def __init__(self, cache: TreeCache, long: bool = False) -> None:
        self.cache = cache
        self.long = long
        self.mask_row = -1
        self.branches: dict[Branch, None] = {}
        self.ids: list[int] = []
        self.columns: list[int] = []
        self.untouched = SCRATCH + 1
        self.freed: list[int] = []
        self.orphaned: list[int] = []
        self.expected = 0
        self.chunks: list[int] = []
        self.shared: SharedPrefix | None = None
        self.states: dict[int, State] = {}

    @property
    def prefix(self) -> int:
        """Number of tokens of the shared prefix; 0 if there is none."""
        return len(self.shared) if self.shared is not None else 0

    @property
    def paths(self) -> list[Tree | Branch]:
        """The trunk and all branches."""
        return [self, *self.branches]

    @property
    def mask_rows(self) -> list[int]:
        """The mask rows of the trunk and of all branches."""
        return [path.mask_row for path in self.paths]

    def branch(self, base: int | None = None, long: bool | None = None) -> Branch:
        """Return a new branch that leaves the trunk after `base` tokens (default: at its tip).

        Only a branch that leaves after 0 tokens may differ from the trunk in `long`.
        """
        if base is not None and base < self.prefix:
            self.cache.unshare(self)
        start = len(self.ids) if base is None else base
        branch = self.add_branch(start, self.mask_row, self.long if long is None else long)
        if base is not None:
            self.block.visible[branch.mask_row, self.columns[base - self.prefix :]] = False
        branch.begin_with(self.states)
        return branch

    def known(self, tokens: int) -> int:
        """Return the largest length, at most `tokens`, after which a branch can leave the trunk."""
        return tokens if self.cache.pool is None else known_length(self.states, tokens)

    def add_branch(self, base: int, like: int, long: bool) -> Branch:
        """Return a new branch that sees what the mask row `like` sees."""
        branch = Branch(self, base, self.block.allocate_mask_row(like), long)
        self.branches[branch] = None
        return branch

    def keep(self, branch: Branch, tokens: int | None = None) -> None:
        """Make a branch, or its first `tokens` own tokens, the trunk; the branch is then empty, at the new tip.

        With recurrent layers, the state after `tokens` must be known.
        """
        beyond, visible = branch.columns[tokens:] if tokens is not None else [], self.block.visible
        self.cache.live_texts.forget(self, branch.base)
        if beyond:
            visible[branch.mask_row, beyond] = False
        visible[self.mask_row] = visible[branch.mask_row]
        self.free(beyond)
        tip = branch.base - self.prefix
        self.orphaned += self.columns[tip:]
        self._free_orphaned()
        self.columns[tip:] = branch.columns[:tokens]
        self.ids[branch.base :] = branch.ids[:tokens]
        self.long = branch.long
        base, branch.base, branch.columns, branch.ids = branch.base, len(self.ids), [], []
        if branch.states:
            self._keep_states(branch, base)
        self.cache.shrink(self)

    def _keep_states(self, branch: Branch, base: int) -> None:
        release(self.states, base)
        for length, state in branch.states.items():
            if base < length <= len(self.ids):
                self.states[length] = state.shared()
        for length in [*self.states][1 : 1 - STATES]:
            self.states.pop(length).release()
        release(branch.states, -1)
        branch.begin_with(self.states)

    def can_share(self, tokens: int) -> bool:
        """True if all branches see the first `tokens` tokens of the trunk, so that these can be a shared prefix."""
        return not self.orphaned and all(branch.base >= tokens for branch in self.branches)

    def drop(self, branch: Branch) -> None:
        """Free the branch's own columns and its mask row; a dropped branch may be dropped again."""
        if branch.mask_row >= 0:
            self.free(branch.columns)
            del self.branches[branch]
            self.block.free_mask_rows.append(branch.mask_row)
            branch.mask_row, branch.columns, branch.ids = -1, [], []
            release(branch.states, -1)
            self._free_orphaned()

    def _free_orphaned(self) -> None:
        """Free orphaned columns that no branch sees any more."""
        if self.orphaned:
            seen = np.any(self.block.visible[self.mask_rows][:, self.orphaned], axis=0).tolist()
            self.free([column for column, held in zip(self.orphaned, seen, strict=True) if not held])
            self.orphaned = [column for column, held in zip(self.orphaned, seen, strict=True) if held]

    @property
    def taken(self) -> int:
        """Columns in use, including the scratch column."""
        return self.untouched - len(self.freed)

    def has_room(self, count: int) -> bool:
        """True if the row is wide enough for `count` more columns."""
        return self.untouched - len(self.freed) + count <= self.block.columns

    def allocate(self, count: int) -> list[int]:
        """Take the `count` lowest free columns."""
        if not self.has_room(count):
            self.cache.make_room({self: count})
        columns = [heappop(self.freed) for _ in range(min(count, len(self.freed)))] if self.freed else []
        first, self.untouched = self.untouched, self.untouched + count - len(columns)
        columns += range(first, self.untouched)
        return columns

    def allocate_one(self) -> int:
        """Take the lowest free column of a row that has room."""
        if self.freed:
            return heappop(self.freed)
        self.untouched += 1
        return self.untouched - 1

    def free(self, columns: list[int]) -> None:
        """Let columns be allocated again."""
        if columns:
            self.freed += columns
            heapify(self.freed)

    def used_columns(self) -> list[int]:
        """Return the columns in use, the scratch column first."""
        gone = set(self.freed)
        return [column for column in range(self.untouched) if column not in gone]

    def renumber(self, used: Sequence[int]) -> None:
        """Make the columns in use the first ones of the row."""
        if self.freed:
            now = {column: i for i, column in enumerate(used)}
            for path in self.paths:
                path.columns = [now[column] for column in path.columns]
            self.orphaned = [now[column] for column in self.orphaned]
            self.untouched, self.freed = len(used), []


def known_length(states: Mapping[int, State], tokens: int) -> int:
    """Return the largest length, at most `tokens`, with a state; 0 if there is none."""
    return max((length for length in states if length <= tokens), default=0)


def release(states: dict[int, State], length: int) -> None:
    """Give back the states of texts that are longer than `length`."""
    for each in [each for each in states if each > length]:
        states.pop(each).release()


class AttentionCall(NamedTuple):
    """The number of an attention call in its forward, and its keys and values."""

    number: int
    keys: ReferenceType[torch.Tensor]
    values: ReferenceType[torch.Tensor]

    def had(self, pair: Pair) -> bool:
        """True if these are the very same tensors, not others that were given their ids."""
        return self.keys() is pair[0] and self.values() is pair[1]


class TreeCache(Cache):
    """The rows of all live requests, in blocks of equal width.

    Args:
        layers: The cache layers of the model.
        layout: What is kept of each token; by default unknown until the first forward.
        states: What the recurrent layers keep of each text.
        size: Rows and columns of a block that is always there, in which every text begins.
        min_shared: The least number of tokens of a common prefix that is held once for several live rows; None for
            never.
        dtype: The data type of keys and values; None for what the model computes.

    Attributes:
        written: The blocks that the next forward writes to, each with its part of the forward's tokens.
    """

    def __init__(
        self,
        layers: Sequence[TreeLayer | RecurrentLayer],
        layout: Layout | None = None,
        states: StateLayout | None = None,
        size: tuple[int, int] = (1, STEP),
        min_shared: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(layers=[*layers])
        recurrent = {index: layer for index, layer in enumerate(layers) if isinstance(layer, RecurrentLayer)}
        self.pool = StatePool(recurrent, states or StateLayout()) if recurrent else None
        self.dtype = dtype
        self.layout = layout if layout is not None else Layout()
        self.min_shared = min_shared
        self.prefixes: dict[SharedPrefix, None] = {}
        least, self.narrowest = size
        self.trees: dict[Tree, None] = {}
        self.live_texts: LiveTexts[Tree] = LiveTexts()
        self.blocks: dict[int, RowBlock] = {self.narrowest: RowBlock(self.layout, self.narrowest, least)}
        self.written: list[tuple[RowBlock, slice]] = []
        self._write_indices: torch.Tensor
        self._positions: torch.Tensor
        self._calls: dict[tuple[int, int], AttentionCall] = {}

    def begin(self, write_indices: torch.Tensor, positions: torch.Tensor) -> None:
        """Begin a forward.

        Args:
            write_indices: For each token the index into rows * columns of its block, (tokens,).
            positions: For each token the number of those before it in its text, (tokens,).
        """
        self._write_indices = write_indices
        self._positions = positions
        self._calls.clear()
        self._count = 0

    def get_seq_length(self, layer_idx: int | None = None) -> int | torch.Tensor:
        """Return how many tokens lie before those of the forward.

        Args:
            layer_idx: A layer that counts for itself: Llama 4 scales queries by how far they are from the beginning.

        Returns:
            None are told to the model, which is given positions. A layer gets what it has to add to the index of each
            token in the forward, (tokens,).
        """
        if layer_idx is None:
            return 0
        return self._positions - torch.arange(len(self._positions), device=self._positions.device)

    def go_on(self, paths: Sequence[tuple[Branch, int]]) -> None:
        """Set the states from which the recurrent layers go on.

        Args:
            paths: Each branch with the number of its last tokens that the forward reads.
        """
        assert self.pool is not None
        starts = [branch.length - tokens for branch, tokens in paths]
        states = [branch.states.get(start) for (branch, _), start in zip(paths, starts, strict=True)]
        if any(state is None and start for state, start in zip(states, starts, strict=True)):
            raise ModelError("a text cannot go on from where no state of its recurrent layers is known.")
        self.pool.begin(states)

    def advance(self, branches: Sequence[Branch]) -> None:
        """Give these branches the states after the forward."""
        assert self.pool is not None
        for branch, state in zip(branches, self.pool.end(len(branches)), strict=True):
            release(branch.states, -1)
            branch.states[branch.length] = state

    def latent(self, layer: int) -> Pair | None:
        """Return, once, the latents that a layer has given in this forward, if they may be kept instead of the rest."""
        given, self.layers[layer].given = getattr(self.layers[layer], "given", None), None
        return given if self.layout.latents else None

    def store(self, pair: Pair) -> int:
        """Write the keys and values of an attention call, (batch, heads, tokens, head size) with batch * tokens in all.

        Returns:
            The number of the call, or of an earlier call of the forward with the very same tensors.
        """
        known = self._calls.get((id(pair[0]), id(pair[1])))
        if known is not None and known.had(pair):
            return known.number
        call, self._count = self._count, self._count + 1
        self._calls[id(pair[0]), id(pair[1])] = AttentionCall(call, ref(pair[0]), ref(pair[1]))
        keys, values = (each.transpose(1, 2).flatten(0, 1).to(self.dtype or each.dtype) for each in pair)
        self.layout.note(call, (keys, values))
        for block, tokens in self.written:
            indices = self._write_indices[tokens]
            for stored, new in zip(block.fit(call), (keys, values), strict=True):
                stored.flatten(0, 1).index_copy_(0, indices, new[tokens])
        return call

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, of all layers."""
        return self.layout.bytes_per_token

    @property
    def bytes(self) -> int:
        """Bytes of the cache as it is now."""
        rows = sum(block.rows * block.columns for block in self.blocks.values())
        states = self.pool.bytes if self.pool is not None else 0
        return (rows + sum(map(len, self.prefixes))) * self.bytes_per_token + states

    @property
    def bytes_per_state(self) -> int:
        """Bytes of what recurrent layers keep of a text, whatever its length."""
        return self.pool.layout.bytes if self.pool is not None else 0

    def _width(self, columns: int) -> int:
        """Return the width of a row of at least `columns` columns; a block that exists comes before a narrower one.

        A few blocks with columns to spare cost less than many, as each block is a call of the attention.
        """
        width = max(width_for(columns), self.narrowest)
        there = [each for each in self.blocks if width <= each <= max(width + STEP, width * 5 // 4)]
        return min(there, default=width)

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row of at least `columns` columns."""
        return self._width(columns) * self.bytes_per_token + self.bytes_per_state

    def columns_within(self, tree: Tree, more: int) -> int:
        """Return how many columns a tree may use before the cache grows by more than `more` columns."""
        return max(tree.block.columns, width_within(more * 4 // 5))

    def open(self, columns: int = 0, long: bool = False) -> Tree:
        """Return a new, empty row.

        Args:
            columns: Its least width.
            long: Whether it is read with the rotary frequencies of long texts.
        """
        tree = Tree(self, long)
        tree.expected = columns
        self.trees[tree] = None
        block = self._block(columns)
        block.add([tree])
        tree.mask_row = block.allocate_mask_row()
        return tree

    def close(self, tree: Tree) -> None:
        """Free a row, with all its branches."""
        del self.trees[tree]
        self.live_texts.forget(tree)
        self._leave_prefix(tree)
        tree.block.free_mask_rows += tree.mask_rows
        for branch in tree.branches:
            branch.mask_row = -1  # so that dropping it later has no effect
            release(branch.states, -1)
        release(tree.states, -1)
        tree.branches.clear()
        tree.block.remove(tree, tree.row)
        self._give_back([tree.block])
        if self.pool is not None:
            self.pool.give_back()

    def growth(self, more: Mapping[Tree, int], paths: int = 0) -> int:
        """Return by how many bytes the cache grows, at most.

        Args:
            more: How many columns each row is given.
            paths: How many paths get a new recurrent state.
        """
        columns = sum(self.row_bytes(tree.taken + count) for tree, count in more.items() if not tree.has_room(count))
        return columns + (self.pool.growth(paths) if self.pool is not None else 0)

    def make_room(self, more: Mapping[Tree, int]) -> None:
        """Move rows that are about to outgrow their blocks; rows between the same two blocks move together.

        Args:
            more: How many columns each row will be given.
        """
        moving: dict[tuple[RowBlock, int], list[Tree]] = {}
        for tree, count in more.items():
            if not tree.has_room(count):
                moving.setdefault((tree.block, self._width(tree.taken + count)), []).append(tree)
        for (source, width), trees in moving.items():
            self._move(trees, source, self._block(width))

    def shrink(self, tree: Tree, sparse: int = SPARSE) -> None:
        """Move a row that uses less than 1 / `sparse` of its columns to a narrower block."""
        needed, source = max(tree.taken, tree.expected), tree.block
        if needed * sparse < source.columns and self._width(needed * sparse // 2) < source.columns:
            self._move([tree], source, self._block(needed * sparse // 2))

    def _block(self, columns: int) -> RowBlock:
        """Return the block for rows of at least `columns` columns."""
        width = self._width(columns)
        if width not in self.blocks:
            self.blocks[width] = RowBlock(self.layout, width)
        return self.blocks[width]

    @torch.inference_mode()
    def _move(self, trees: Sequence[Tree], source: RowBlock, target: RowBlock) -> None:
        rows, columns = [tree.row for tree in trees], [tree.used_columns() for tree in trees]
        try:  # memory may run out here, before anything has moved
            self._copy_states(source, target, rows, columns)
        except RuntimeError:
            self._give_back([target])
            raise
        target.add(trees)
        for tree, row, used in zip(trees, rows, columns, strict=True):
            tree.renumber(used)
            target.positions[tree.row, : len(used)] = source.positions[row, used]
            for path in tree.paths:
                mask_row = target.allocate_mask_row()
                target.visible[mask_row, : len(used)] = source.visible[path.mask_row, used]
                source.free_mask_rows.append(path.mask_row)
                path.mask_row = mask_row
        for row, tree in sorted(zip(rows, trees, strict=True), key=lambda pair: -pair[0]):
            source.remove(tree, row)
        self._give_back([source])

    def _copy_states(self, source: RowBlock, target: RowBlock, rows: list[int], columns: list[list[int]]) -> None:
        """Copy the keys and values of these columns to the next free rows of another block."""
        first, widest = len(target.trees), max(map(len, columns))
        target.make_rows(first + len(rows))
        if widest == 1:  # only the scratch columns
            return
        device = next((keys.device for keys, _ in source.states.values()), None)
        padded = [used + [0] * (widest - len(used)) for used in columns]
        at = torch.tensor(rows, device=device)[:, None], torch.tensor(padded, device=device)
        for call in source.states:
            for stored, moved in zip(target.fit(call), source.fit(call), strict=True):
                stored[first : first + len(rows), :widest] = moved[at]

    def release(self) -> None:
        """Free all memory; the cache is not used any more."""
        for block in self.blocks.values():
            block.release()
        self.blocks.clear()
        self.prefixes.clear()
        self.layers.clear()
        if self.pool is not None:
            self.pool.release()

    def compact(self) -> None:
        """Release all rows that are not in use."""
        for block in [*self.blocks.values()]:
            block.give_back(most=1.0)
        self._give_back([*self.blocks.values()])
        if self.pool is not None:
            self.pool.give_back()

    def _give_back(self, blocks: Iterable[RowBlock]) -> None:
        """Release memory that these blocks no longer need."""
        for block in blocks:
            block.give_back()
            if not block.rows:
                block.release()
                del self.blocks[block.columns]

    @torch.inference_mode()
    def read(self, tree: Tree, tokens: int, first: int = 0) -> States:
        """Return a copy of the keys and values of the trunk's tokens from `first` up to `tokens`."""
        start = tree.prefix
        columns = tree.columns[max(0, first - start) : max(0, tokens - start)]
        own = [(keys[tree.row, columns], values[tree.row, columns]) for keys, values in self._states(tree.block)]
        if tree.shared is None or first >= start:
            return own
        shared = part(tree.shared.states, first, min(tokens, start))
        return joined([shared, own]) if columns else shared

    @torch.inference_mode()
    def write(self, tree: Tree, ids: Sequence[int], states: States) -> None:
        """Make tokens with known keys and values the trunk of an empty tree."""
        branch = tree.branch()
        columns = branch.extend(ids)
        self._put(tree, columns, states)
        tree.keep(branch)
        tree.drop(branch)

    def copy(self, source: Tree, target: Tree) -> None:
        """Copy the trunk of a tree to an empty one."""
        target.long = source.long
        if source.shared is not None:
            self.attach(target, source.shared)
        self.write(target, source.ids[source.prefix :], self.read(source, len(source.ids), source.prefix))
        if (state := source.states.get(len(source.ids))) is not None:
            target.states[len(target.ids)] = state.shared()

    # --- what rows share ---

    def shares(self, tokens: int) -> bool:
        """True if a common prefix of `tokens` tokens is worth being held once."""
        return self.min_shared is not None and tokens >= self.min_shared

    def share(self, tree: Tree, ids: Sequence[int], source: Tree | None, live: int) -> None:
        """Let an empty row begin with a shared prefix, which may be made for it.

        Args:
            tree: The row.
            ids: The tokens that it will have.
            source: The live row that has the longest common prefix with these, if there is one.
            live: The length of that prefix in tokens.
        """
        tokens = live // STEP * STEP  # else two prompts that agree a little further would share this alone
        if self.min_shared is None or not self.shares(tokens):
            return
        prefix = max((each for each in self.prefixes if each.begins(ids, tree.long)), key=len, default=None)
        known = len(prefix) if prefix is not None else 0
        if source is not None and tokens - known >= max(self.min_shared, known) and source.can_share(tokens):
            prefix = SharedPrefix(source.ids[:tokens], self.read(source, tokens), source.long)
            if source.prefix < tokens:
                self.attach(source, prefix)
        if prefix is not None:
            self.attach(tree, prefix)

    def attach(self, tree: Tree, prefix: SharedPrefix) -> None:
        """Let a row share a prefix; it gives up its own columns for these tokens."""
        columns, own = tree.columns[: len(prefix) - tree.prefix], len(prefix) - tree.prefix
        tree.columns = tree.columns[own:]
        tree.ids = tree.ids or [*prefix.ids]
        self._leave_prefix(tree)
        for mask_row in tree.mask_rows:
            tree.block.visible[mask_row, columns] = False
        tree.free(columns)
        tree.shared, tree.expected = prefix, max(0, tree.expected - own)
        prefix.users.add(tree)
        self.prefixes[prefix] = None
        self.shrink(tree, sparse=2)

    @torch.inference_mode()
    def unshare(self, tree: Tree) -> None:
        """Copy a row's shared prefix into columns of its own, so that branches can leave the trunk within it."""
        if (prefix := tree.shared) is not None:
            columns = tree.allocate(len(prefix))
            self._put(tree, columns, prefix.states)
            tree.block.positions[tree.row, columns] = range(len(prefix))
            for mask_row in tree.mask_rows:
                tree.block.visible[mask_row, columns] = True
            self._leave_prefix(tree)
            tree.columns = columns + tree.columns

    def _leave_prefix(self, tree: Tree) -> None:
        if tree.shared is not None:
            tree.shared.users.remove(tree)
            if not tree.shared.users:
                del self.prefixes[tree.shared]
            tree.shared = None

    def _put(self, tree: Tree, columns: list[int], states: States) -> None:
        for call, pair in enumerate(states):
            for stored, new in zip(tree.block.fit(call), pair, strict=True):
                stored[tree.row, columns] = new

    @staticmethod
    def _states(block: RowBlock) -> States:
        return [block.states[call] for call in sorted(block.states)]
