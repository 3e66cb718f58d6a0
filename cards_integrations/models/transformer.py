"""A transformers model run over trees of candidates: the one forward that drafting and scoring share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cards_integrations.errors import ModelError, OutOfMemory
from cards_integrations.models.attention import LAYOUT, NAME, Group, Layout
from cards_integrations.models.kv_cache import SCRATCH, Branch, Tree, TreeCache
from cards_integrations.models.kv_memory import KVMemory

NO_TREES = {  # architectures that would be silently wrong, for they do not go by positions and mask alone
    "bloom": "ALiBi", "falcon": "ALiBi", "mpt": "ALiBi", "gpt_neo": "a causal mask of its own",
    "openai-gpt": "no KV cache", "rwkv": "a recurrent state",
}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"
SHORT = 32  # rows with at most so many tokens attend together, padded to the longest; a longer one alone


@dataclass
class Feed:
    """Tokens to append to a branch in the next forward; `owner` is for whoever asked."""

    branch: Branch
    ids: Sequence[int]
    owner: Any = None


class Transformer:
    """A decoder with a `TreeCache`. The tokens of all feeds make one flat sequence (1, tokens)."""

    def __init__(self, model: Any, memory: KVMemory | None = None) -> None:
        self.check(model)
        self.model = model
        self.config = model.config.get_text_config()
        self.patterns = _patterns(self.config)
        self.window: int = getattr(self.config, "sliding_window", None) or 0
        self.memory = memory or KVMemory(2**62, reuse=False)
        self.cache = TreeCache(self.config.num_hidden_layers, _bytes_per_token(self.config, model.dtype))
        self.memory.caches.append(self.cache)
        self.forwards = 0
        self.tokens = 0
        model.set_attn_implementation(NAME)

    @staticmethod
    def check(model: Any) -> None:
        """Raise `ModelError` for an architecture whose attention cannot be given a tree mask."""
        config = model.config.get_text_config()
        strange = sorted(set(_patterns(config)) - {FULL, SLIDING})
        if config.model_type in NO_TREES or strange or not model._can_set_attn_implementation():
            what = NO_TREES.get(config.model_type) or ", ".join(strange) or "attention of its own"
            raise ModelError(f"model type {config.model_type!r} uses {what}, which has no exact tree mask here.")

    def logits(self, feeds: Sequence[Feed]) -> list[torch.Tensor | OutOfMemory]:
        """Forward a causal model: logits (vocabulary,) after each feed's last token."""

        def forward(inputs: dict[str, Any], ends: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.model(**inputs, logits_to_keep=ends).logits[0]
            return found

        return self._forward(feeds, forward)

    def hidden(self, feeds: Sequence[Feed]) -> list[torch.Tensor | OutOfMemory]:
        """Forward the body: hidden state (hidden size,) of each feed's last token."""

        def forward(inputs: dict[str, Any], ends: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.model.base_model(**inputs).last_hidden_state[0, ends]
            return found

        return self._forward(feeds, forward)

    def _forward(
        self, feeds: Sequence[Feed], run: Callable[[dict[str, Any], torch.Tensor], torch.Tensor]
    ) -> list[torch.Tensor | OutOfMemory]:
        """One forward; where memory runs out, in halves, down to the feed that does not fit."""
        inputs, ends, layout = self._lay_out(feeds)
        try:
            with _attending(layout):
                return list(run(inputs, ends))
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
        for feed in feeds:
            feed.branch.retract(len(feed.ids))
        if self.memory.forget():
            return self._forward(feeds, run)
        if len(feeds) == 1:
            return [
                OutOfMemory(f"No memory for {len(feeds[0].ids)} tokens more: use a shorter prompt or fewer requests.")
            ]
        half = len(feeds) // 2
        return self._forward(feeds[:half], run) + self._forward(feeds[half:], run)

    def batches(self, feeds: Sequence[Feed], tokens: int = 2048) -> Iterator[list[Feed]]:
        """Split feeds into forwards of at most `tokens` tokens (or of one feed)."""
        batch: list[Feed] = []
        for feed in feeds:
            if batch and sum(len(f.ids) for f in batch) + len(feed.ids) > tokens:
                yield batch
                batch = []
            batch.append(feed)
        if batch:
            yield batch

    def _lay_out(self, feeds: Sequence[Feed]) -> tuple[dict[str, Any], torch.Tensor, Layout]:
        """Model inputs, the index of each feed's last token, and who attends to what."""
        by_tree: dict[Tree, list[tuple[int, Feed]]] = {}
        for index, feed in enumerate(feeds):
            by_tree.setdefault(feed.branch.tree, []).append((index, feed))
        sizes = {tree: sum(len(feed.ids) for _, feed in row) for tree, row in by_tree.items()}
        short = [tree for tree, size in sizes.items() if size <= SHORT]
        rooms = [_Room(short, sizes)] if short else []
        rooms += [_Room([tree], sizes) for tree, size in sizes.items() if size > SHORT]

        flat = _Tokens()
        ends = [0] * len(feeds)
        for room in rooms:
            room.start = len(flat.ids)
            for tree in room.trees:
                at = room.row(tree) * room.length
                for index, feed in by_tree[tree]:
                    room.back += range(at, at + len(feed.ids))
                    at += len(feed.ids)
                    flat.add(feed)
                    ends[index] = len(flat.ids) - 1
            room.end = len(flat.ids)
        sees = flat.sees(self.cache)
        layout = Layout([self._group(room, flat, sees) for room in rooms], self.patterns)

        device = self.model.device
        place = [slot * self.cache.columns + column for slot, column in zip(flat.slots, flat.columns, strict=True)]
        ids, positions, self.cache.place = torch.tensor([flat.ids, flat.positions, place]).to(device)
        self.forwards += 1
        self.tokens += len(flat.ids)
        inputs = {
            "input_ids": ids[None],
            "position_ids": positions[None],
            "attention_mask": self._marker(device),
            "past_key_values": self.cache,
            "use_cache": True,
        }
        return inputs, torch.tensor(ends, device=device), layout

    def _group(self, room: _Room, flat: _Tokens, sees: NDArray[np.bool_]) -> Group:
        own = slice(room.start, room.end)
        width = int(np.flatnonzero(sees[own].any(0))[-1]) + 1
        seen = {FULL: sees[own, :width]}
        if SLIDING in self.patterns:
            keys = self.cache.positions[flat.slots[own], :width]
            near = np.array(flat.positions[own])[:, None] - keys < self.window
            seen[SLIDING] = seen[FULL] & near
        tokens = np.zeros(room.rows * room.length, dtype=np.int64)
        tokens[room.back] = range(room.start, room.end)
        device = self.model.device
        return Group(
            room.slots(device),
            torch.from_numpy(tokens).view(room.rows, room.length).to(device),
            torch.tensor(room.back, device=device),
            {pattern: self._additive(room, seen[pattern]) for pattern in set(self.patterns)},
        )

    def _additive(self, room: _Room, seen: NDArray[np.bool_]) -> torch.Tensor:
        """seen (tokens, columns) -> 0 or -inf, (rows, 1, length, columns)."""
        hidden = np.ones((room.rows * room.length, seen.shape[1]), dtype=bool)
        hidden[:, SCRATCH] = False  # padding must see something, or its softmax is NaN
        hidden[room.back] = ~seen
        masked = torch.from_numpy(hidden).to(self.model.device)
        mask = torch.zeros(masked.shape, dtype=self.model.dtype, device=masked.device).masked_fill_(masked, -torch.inf)
        return mask.view(room.rows, 1, room.length, -1)

    def _marker(self, device: torch.device) -> torch.Tensor | dict[str, torch.Tensor]:
        """A prepared 4D mask is passed on as it is; the real ones are in the layout."""
        marker = torch.empty(1, 1, 1, 1, device=device)
        return dict.fromkeys(self.patterns, marker) if len(set(self.patterns)) > 1 else marker


class _Tokens:
    """The tokens of all feeds, one after another."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.slots: list[int] = []
        self.columns: list[int] = []
        self.lanes: list[int] = []
        self.runs: list[tuple[int, list[int]]] = []  # where feeds of several tokens begin, and their columns

    def add(self, feed: Feed) -> None:
        branch, n = feed.branch, len(feed.ids)
        self.positions += range(branch.length, branch.length + n)
        columns = branch.extend(feed.ids)
        if n > 1:
            self.runs.append((len(self.ids), columns))
        self.ids += feed.ids
        self.columns += columns
        self.slots += [branch.tree.slot] * n
        self.lanes += [branch.lane] * n

    def sees(self, cache: TreeCache) -> NDArray[np.bool_]:
        """(tokens, columns): its path up to itself."""
        sees: NDArray[np.bool_] = cache.sees[self.lanes]
        for start, columns in self.runs:
            sees[start : start + len(columns), columns] = np.tri(len(columns), dtype=bool)
        return sees


class _Room:
    """Rows of the cache that attend together: from the first to the last of `trees`, or just these."""

    def __init__(self, trees: list[Tree], sizes: dict[Tree, int]) -> None:
        slots = [tree.slot for tree in trees]
        self.trees = trees
        self.length = max(sizes[tree] for tree in trees)
        self.first, span = min(slots), max(slots) - min(slots) + 1
        self.dense = span <= 2 * len(trees)  # then idle rows between are cheaper than a copy of the others
        self.rows = span if self.dense else len(trees)
        self.index = {tree: tree.slot - self.first if self.dense else row for row, tree in enumerate(trees)}
        self.start = self.end = 0
        self.back: list[int] = []

    def row(self, tree: Tree) -> int:
        return self.index[tree]

    def slots(self, device: torch.device) -> slice | torch.Tensor:
        if self.dense:
            return slice(self.first, self.first + self.rows)
        return torch.tensor([tree.slot for tree in self.trees], device=device)


def _bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * dtype.itemsize)


def _patterns(config: Any) -> list[str]:
    """The attention of each layer."""
    layers: list[str] | None = getattr(config, "layer_types", None)
    kind = FULL if getattr(config, "sliding_window", None) is None else SLIDING
    return list(layers) if layers else [kind] * config.num_hidden_layers


def _out_of_memory(error: RuntimeError) -> bool:
    """torch has a class for it on a GPU only."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


@contextmanager
def _attending(layout: Layout) -> Iterator[None]:
    token = LAYOUT.set(layout)
    try:
        with torch.inference_mode():
            yield
    finally:
        LAYOUT.reset(token)
