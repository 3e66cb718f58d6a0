"""A transformers model run over trees of candidates: the one forward that drafting and scoring share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cards_integrations.errors import ModelError
from cards_integrations.models.kv_cache import SCRATCH, Branch, TreeCache

NO_TREES = {  # architectures that would be silently wrong, for they do not go by positions and mask alone
    "bloom": "ALiBi", "falcon": "ALiBi", "mpt": "ALiBi", "gpt_neo": "a causal mask of its own",
    "openai-gpt": "no KV cache", "rwkv": "a recurrent state",
}  # fmt: skip
MASKS = {"full_attention", "sliding_attention"}


@dataclass
class Feed:
    """Tokens to append to a branch in the next forward; `owner` is for whoever asked."""

    branch: Branch
    ids: Sequence[int]
    owner: Any = None


class Transformer:
    """A decoder with a `TreeCache`.

    `batch(feeds)` lays the feeds out as one forward: a row per tree, the feeds of a tree one after
    another in it, with per-token positions and a mask in which a token sees its own branch only.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        self.window: int | None = getattr(self.config, "sliding_window", None)
        self.patterns = set(getattr(self.config, "layer_types", None) or ())
        self.check(self.config, model.config._attn_implementation)
        self.cache = TreeCache(self.config.num_hidden_layers)
        self.forwards = 0
        self.tokens = 0

    @staticmethod
    def check(config: Any, attention: str) -> None:
        """Raise `ModelError` for an architecture whose attention cannot be given a tree mask."""
        patterns = set(getattr(config, "layer_types", None) or ())
        if config.model_type in NO_TREES or patterns - MASKS:
            what = NO_TREES.get(config.model_type) or ", ".join(sorted(patterns - MASKS))
            raise ModelError(f"model type {config.model_type!r} uses {what}, which has no exact tree mask here.")
        if attention not in ("sdpa", "eager"):
            raise ModelError(f"attention={attention!r} takes no 4D mask; use engine=EngineSettings(attention='sdpa').")

    def batches(self, feeds: Iterable[Feed], tokens: int = 2048) -> Iterator[list[Feed]]:
        """Split feeds into forwards of at most `tokens` padded tokens, rows of like length together."""
        by_tree: dict[int, list[Feed]] = {}
        for feed in feeds:
            by_tree.setdefault(id(feed.branch.tree), []).append(feed)
        rows = sorted(by_tree.values(), key=lambda row: sum(len(feed.ids) for feed in row))
        batch: list[list[Feed]] = []
        for row in rows:
            if batch and (len(batch) + 1) * sum(len(feed.ids) for feed in row) > tokens:
                yield [feed for r in batch for feed in r]
                batch = []
            batch.append(row)
        if batch:
            yield [feed for r in batch for feed in r]

    def batch(self, feeds: Sequence[Feed]) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
        """Model inputs for one forward, and (row, column) of each feed's last token in its output."""
        trees = sorted({id(f.branch.tree): f.branch.tree for f in feeds}.values(), key=lambda tree: tree.slot)
        row_of = {id(tree): row for row, tree in enumerate(trees)}
        laid: list[list[tuple[Feed, NDArray[np.intp], NDArray[np.bool_], int]]] = [[] for _ in trees]
        last = []
        for feed in feeds:
            row, position = row_of[id(feed.branch.tree)], feed.branch.length
            columns, sees = feed.branch.extend(feed.ids)
            laid[row].append((feed, columns, sees, position))
            last.append((row, sum(len(f.ids) for f, *_ in laid[row]) - 1))
        length = max(sum(len(f.ids) for f, *_ in row) for row in laid)
        width = max(tree.width for tree in trees)

        ids = np.zeros((len(trees), length), dtype=np.int64)
        positions = np.zeros_like(ids)
        columns_at = np.full_like(ids, SCRATCH)
        mask = np.zeros((len(trees), length, width), dtype=bool)
        mask[:, :, SCRATCH] = True  # padding must see something, or its softmax is NaN
        for row, parts in enumerate(laid):
            at = 0
            for feed, columns, sees, position in parts:
                end = at + len(feed.ids)
                ids[row, at:end] = feed.ids
                positions[row, at:end] = np.arange(position, position + len(feed.ids))
                columns_at[row, at:end] = columns
                seen = min(width, sees.shape[1])
                mask[row, at:end, :seen] = sees[:, :seen]
                at = end
        device = self.model.device
        self.cache.at(trees, torch.from_numpy(columns_at).to(device), width)
        self.forwards += 1
        self.tokens += sum(len(feed.ids) for feed in feeds)
        inputs = {
            "input_ids": torch.from_numpy(ids).to(device),
            "position_ids": torch.from_numpy(positions).to(device),
            "attention_mask": self._mask(mask, positions, [tree.positions for tree in trees], width),
            "past_key_values": self.cache,
            "use_cache": True,
        }
        rows, ends = torch.tensor(last, device=device).T
        return inputs, rows, ends

    def _mask(
        self, mask: NDArray[np.bool_], positions: NDArray[np.int64], of_columns: list[NDArray[np.int64]], width: int
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        if self.window is None or ("sliding_attention" not in self.patterns and self.patterns):
            return self._tensor(mask)
        keys = np.stack([np.pad(p[:width], (0, max(0, width - len(p)))) for p in of_columns])
        near = positions[:, :, None] - keys[:, None, :] < self.window
        near[:, :, SCRATCH] = True
        if not self.patterns:
            return self._tensor(mask & near)
        return {"full_attention": self._tensor(mask), "sliding_attention": self._tensor(mask & near)}

    def _tensor(self, mask: NDArray[np.bool_]) -> torch.Tensor:
        """(batch, 1, n, columns): boolean for sdpa, additive for eager attention."""
        allowed = torch.from_numpy(mask)[:, None].to(self.model.device)
        if self.model.config._attn_implementation == "sdpa":
            return allowed
        dtype = self.model.dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )
