"""A transformers model run over trees of candidates: the one forward that drafting and scoring share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cards_integrations.errors import ModelError, OutOfMemory
from cards_integrations.transformer.attention import LAYOUT, NAME, Group, Layout
from cards_integrations.transformer.cuda_graphs import StaticSteps
from cards_integrations.transformer.kv_cache import Branch, Tree, TreeCache
from cards_integrations.transformer.kv_memory import KVMemory
from cards_integrations.transformer.step_times import least_seconds

NO_TREES = {  # architectures that would be silently wrong, for they do not go by positions and mask alone
    "bloom": "ALiBi", "falcon": "ALiBi", "mpt": "ALiBi", "gpt_neo": "a causal mask of its own",
    "openai-gpt": "no KV cache", "rwkv": "a recurrent state",
}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"
PIECE = 2048  # tokens that a forward reads at most, where they can be read in several
SHORT = 32  # rows with at most so many tokens attend together, padded to the longest


@dataclass
class ForwardInput:
    """Tokens to append to a branch in the next forward, and how many of the last give an output.

    `owner` is for whoever asked.
    """

    branch: Branch
    ids: Sequence[int]
    owner: Any = None
    outputs: int = 1


class Row(NamedTuple):
    """What a forward (n, ...) gave for one feed; `at` is its last output."""

    batch: torch.Tensor
    at: int
    outputs: int = 1

    @property
    def value(self) -> torch.Tensor:
        return self.batch[self.at]

    @property
    def values(self) -> torch.Tensor:
        """All of its outputs (outputs, ...)."""
        return self.batch[self.at + 1 - self.outputs : self.at + 1]


class Transformer:
    """A decoder with a `TreeCache`. The tokens of all feeds make one flat sequence (1, tokens)."""

    def __init__(self, model: Any, memory: KVMemory | None = None) -> None:
        self.check(model)
        self.model = model
        self.config = model.config.get_text_config()
        self.patterns = _patterns(self.config)
        self.window: int = getattr(self.config, "sliding_window", None) or 0
        self.memory = memory or KVMemory(2**62, reuse=False)
        size = (8, 1024) if model.device.type == "cuda" else (1, 64)  # a graph is lost when its cache grows
        self.cache = TreeCache(self.config.num_hidden_layers, _bytes_per_token(self.config, model.dtype), size)
        self.memory.caches.append(self.cache)
        self.forwards = 0
        self.tokens = 0
        model.set_attn_implementation(NAME)
        self._logits = StaticSteps(self.cache, self._run_model, model.device)
        self._hidden = StaticSteps(self.cache, self._run_body, model.device)

    @staticmethod
    def check(model: Any) -> None:
        """Raise `ModelError` for an architecture whose attention cannot be given a tree mask."""
        config = model.config.get_text_config()
        strange = sorted(set(_patterns(config)) - {FULL, SLIDING})
        if config.model_type in NO_TREES or strange or not model._can_set_attn_implementation():
            what = NO_TREES.get(config.model_type) or ", ".join(strange) or "attention of its own"
            raise ModelError(f"model type {config.model_type!r} uses {what}, which has no exact tree mask here.")

    def logits(self, feeds: Sequence[ForwardInput]) -> list[Row | OutOfMemory]:
        """Forward a causal model: logits (vocabulary,) after each feed's last token, or (outputs, vocabulary)."""
        return self._forward(feeds, self._logits)

    def hidden(self, feeds: Sequence[ForwardInput]) -> list[Row | OutOfMemory]:
        """Forward the body: hidden state (hidden size,) of each feed's last token."""
        return self._forward(feeds, self._hidden)

    def _forward(self, feeds: Sequence[ForwardInput], run: StaticSteps) -> list[Row | OutOfMemory]:
        """One forward; where memory runs out, in halves, down to the feed that does not fit."""
        before = [len(feed.branch.columns) for feed in feeds]
        try:
            layout = self._lay_out(feeds)
            self.memory.make_room(0)  # the cache may have grown
            output = run(*layout)
            ends = accumulate(feed.outputs for feed in feeds)
            return [Row(output, end - 1, feed.outputs) for feed, end in zip(feeds, ends, strict=True)]
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
        for feed, columns in zip(feeds, before, strict=True):
            feed.branch.retract(len(feed.branch.columns) - columns)
        if self.memory.forget():
            return self._forward(feeds, run)
        if len(feeds) == 1:
            n = len(feeds[0].ids)
            return [OutOfMemory(f"No memory for {n} more tokens: use a shorter prompt, or a smaller max_rows.")]
        half = len(feeds) // 2
        return self._forward(feeds[:half], run) + self._forward(feeds[half:], run)

    def time(self, tokens: int) -> float:
        """Seconds of a forward of the body with so many tokens, after a short text."""
        aside = Transformer(self.model)
        trunk = aside.cache.open().branch()
        aside.hidden([ForwardInput(trunk, [0] * 32)])
        return least_seconds(lambda: aside.hidden([ForwardInput(trunk.branch(), [0] * tokens)]), self.model.device)

    def _run_model(self, inputs: dict[str, torch.Tensor], layout: Layout) -> torch.Tensor:
        logits: torch.Tensor = self._run(self.model, inputs, layout, logits_to_keep=inputs["ends"]).logits[0]
        return logits

    def _run_body(self, inputs: dict[str, torch.Tensor], layout: Layout) -> torch.Tensor:
        hidden: torch.Tensor = self._run(self.model.base_model, inputs, layout).last_hidden_state[0, inputs["ends"]]
        return hidden

    def _run(self, model: Any, inputs: dict[str, torch.Tensor], layout: Layout, **options: Any) -> Any:
        self.cache.place = inputs["place"]
        marker = torch.empty(1, 1, 1, 1, device=inputs["ids"].device)  # a 4D mask is passed on as it is
        token = LAYOUT.set(layout)
        try:
            with torch.inference_mode():
                return model(
                    input_ids=inputs["ids"][None],
                    position_ids=inputs["positions"][None],
                    attention_mask=dict.fromkeys(self.patterns, marker) if len(set(self.patterns)) > 1 else marker,
                    past_key_values=self.cache,
                    use_cache=True,
                    **options,
                )
        finally:
            LAYOUT.reset(token)

    def batches(self, feeds: Sequence[ForwardInput]) -> Iterator[list[ForwardInput]]:
        """Split feeds into forwards of at most `PIECE` tokens (or of one feed)."""
        batch: list[ForwardInput] = []
        for feed in feeds:
            if batch and sum(len(f.ids) for f in batch) + len(feed.ids) > PIECE:
                yield batch
                batch = []
            batch.append(feed)
        if batch:
            yield batch

    def _lay_out(self, feeds: Sequence[ForwardInput]) -> tuple[dict[str, torch.Tensor], Layout]:
        """Who attends to what, and the inputs.

        Those are the ids, positions and places in the cache of all tokens (tokens,), and the index
        of those with outputs (outputs,).
        """
        rooms = _rooms(feeds)
        flat = _Tokens()
        ends: list[range] = [range(0)] * len(feeds)
        for room in rooms:
            room.start = len(flat.ids)
            for tree, row in room.feeds.items():
                at = room.index[tree] * room.length
                for which, feed in row:
                    room.back += range(at, at + len(feed.ids))
                    at += len(feed.ids)
                    flat.add(feed)
                    ends[which] = range(len(flat.ids) - feed.outputs, len(flat.ids))
            room.end = len(flat.ids)
        sees = flat.sees(self.cache)
        layout = Layout([self._group(room, flat, sees) for room in rooms], self.patterns)

        columns = self.cache.columns
        place = [slot * columns + column for slot, column in zip(flat.slots, flat.columns, strict=True)]
        numbers = torch.tensor([*flat.ids, *flat.positions, *place, *chain(*ends)]).to(self.model.device)
        n = len(flat.ids)
        self.forwards += 1
        self.tokens += n
        names = ("ids", "positions", "place", "ends")
        return dict(zip(names, numbers.tensor_split((n, 2 * n, 3 * n)), strict=True)), layout

    def _group(self, room: _Room, flat: _Tokens, sees: NDArray[np.bool_]) -> Group:
        own, device = slice(room.start, room.end), self.model.device
        columns = np.flatnonzero(sees[own].any(0))
        if not room.alone:
            columns = np.arange(columns[-1] + 1)
        seen = {FULL: sees[own][:, columns]}
        if SLIDING in self.patterns:
            keys = self.cache.positions[flat.slots[own]][:, columns]
            seen[SLIDING] = seen[FULL] & (np.array(flat.positions[own])[:, None] - keys < self.window)
        tokens = np.zeros(room.rows * room.length, dtype=np.int64)
        tokens[room.back] = range(room.start, room.end)
        return Group(
            room.slots(device),
            torch.from_numpy(columns).to(device) if room.alone else None,
            torch.from_numpy(tokens).view(room.rows, room.length).to(device),
            torch.tensor(room.back, device=device),
            room.start if room.back == list(range(len(tokens))) else None,
            {pattern: self._additive(room, seen[pattern]) for pattern in set(self.patterns)},
        )

    def _additive(self, room: _Room, seen: NDArray[np.bool_]) -> torch.Tensor:
        """seen (tokens, columns) -> 0 or -inf, (rows, 1, length, columns)."""
        hidden = np.ones((room.rows * room.length, seen.shape[1]), dtype=bool)
        hidden[:, 0] = False  # padding must see something, or its softmax is NaN
        hidden[room.back] = ~seen
        masked = torch.from_numpy(hidden).to(self.model.device)
        mask = torch.zeros(masked.shape, dtype=self.model.dtype, device=masked.device).masked_fill_(masked, -torch.inf)
        return mask.view(room.rows, 1, room.length, -1)


class _Tokens:
    """The tokens of all feeds, one after another."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.slots: list[int] = []
        self.columns: list[int] = []
        self.lanes: list[int] = []
        self.runs: list[tuple[int, list[int]]] = []  # where feeds of several tokens begin, and their columns

    def add(self, feed: ForwardInput) -> None:
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
    """Feeds that attend together: rows of the cache from the first to the last, or one long feed `alone`."""

    def __init__(self, feeds: dict[Tree, list[tuple[int, ForwardInput]]], alone: bool = False) -> None:
        slots = [tree.slot for tree in feeds]
        self.feeds = feeds
        self.alone = alone  # reads the columns of its own path only
        self.length = max(sum(len(feed.ids) for _, feed in row) for row in feeds.values())
        self.first, span = min(slots), max(slots) - min(slots) + 1
        self.dense = span <= 2 * len(feeds)  # then idle rows between are cheaper than a copy of the others
        self.rows = span if self.dense else len(feeds)
        self.index = {tree: tree.slot - self.first if self.dense else row for row, tree in enumerate(feeds)}
        self.start = self.end = 0
        self.back: list[int] = []

    def slots(self, device: torch.device) -> slice | torch.Tensor:
        if self.dense:
            return slice(self.first, self.first + self.rows)
        return torch.tensor([tree.slot for tree in self.feeds], device=device)


def _rooms(feeds: Sequence[ForwardInput]) -> list[_Room]:
    """Short rows in one; a row of many short feeds, and a long feed, each in one of its own."""
    long: list[_Room] = []
    by_tree: dict[Tree, list[tuple[int, ForwardInput]]] = {}
    for which, feed in enumerate(feeds):
        if len(feed.ids) > SHORT:
            long.append(_Room({feed.branch.tree: [(which, feed)]}, alone=True))
        else:
            by_tree.setdefault(feed.branch.tree, []).append((which, feed))
    short = {tree: row for tree, row in by_tree.items() if sum(len(feed.ids) for _, feed in row) <= SHORT}
    short = dict(sorted(short.items(), key=lambda row: row[0].slot))
    many = [_Room({tree: row}) for tree, row in by_tree.items() if tree not in short]
    return ([_Room(short)] if short else []) + many + long


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
