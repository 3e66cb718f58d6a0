"""Attention of a flat sequence of tokens to the rows of a `TreeCache`.

A forward carries the tokens of all branches one after another, with no padding, as one sequence
(1, tokens). Only attention needs to know which row a token belongs to: here the tokens are arranged
by rows, attend to their row under the mask, and are put back in order. Query heads that share a key
head are placed side by side, so that no key or value is repeated for them.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from cards_integrations.errors import ModelError
from cards_integrations.transformer.kv_block import RowBlock

NAME = "cards_tree"
FULL, SLIDING = "full_attention", "sliding_attention"  # attention patterns, as configs call them


@dataclass
class GroupMetadata:
    """Rows that attend in one call, with up to n tokens each.

    Attributes:
        block: The block of the cache that has the rows.
        rows: The rows in the block.
        columns: Those that are read, the same in each row.
        tokens: (rows, n) indices into the flat sequence.
        restore: (tokens of the group,) indices into rows * n that put the outputs back in order.
        start: Where the group's tokens begin in the flat sequence if they are in order there, without
            padding; then neither `tokens` nor `restore` is needed. None otherwise.
        masks: Additive masks (rows, 1, n, columns), for each attention pattern.
        repeated: The masks repeated for several heads, the same in all layers.
    """

    block: RowBlock
    rows: slice | torch.Tensor
    columns: slice | torch.Tensor
    tokens: torch.Tensor
    restore: torch.Tensor
    start: int | None
    masks: dict[str, torch.Tensor]
    repeated: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Number of columns that are read."""
        return next(iter(self.masks.values())).shape[-1]

    def states(self, layer: int) -> list[torch.Tensor]:
        """Return the keys and values that the group reads in a layer, (rows, KV heads, columns, head size)."""
        return [states[self.rows, self.columns].transpose(1, 2) for states in self.block.states[layer] or ()]

    def mask(self, pattern: str, heads: int) -> torch.Tensor:
        """Return the mask for `heads` query heads that share a key head, (rows, 1, heads * n, columns)."""
        if (pattern, heads) not in self.repeated:
            self.repeated[pattern, heads] = self.masks[pattern].repeat(1, 1, heads, 1)
        return self.repeated[pattern, heads]


@dataclass
class AttentionMetadata:
    """The groups of one forward, in the order of their tokens; `patterns` names the mask of each layer.

    `rounded` says that all numbers of tokens, rows and columns have been rounded up.
    """

    groups: list[GroupMetadata]
    patterns: list[str]
    rounded: bool = False


METADATA: ContextVar[AttentionMetadata | None] = ContextVar("METADATA", default=None)
"""Of the forward that runs now."""


def tree_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend to a tree cache, or, without `METADATA`, as usual.

    Args:
        module: The attention layer.
        query: (1, heads, tokens, head size).
        key: Unused, except without metadata: what it was is in the cache by now.
        value: Like `key`.
        attention_mask: Like `key`; without metadata, all are the usual (batch, heads, length, size).
        scaling: Factor of the scores; None for 1 / sqrt(head size).
        softcap: Scores become softcap * tanh(scores / softcap).
        kwargs: Other options of transformers, which are ignored.

    Returns:
        (batch, tokens, heads, head size), and None in place of attention weights.

    Raises:
        ModelError: The layer has attention sinks.
    """
    if kwargs.get("s_aux") is not None:
        raise ModelError(f"{type(module).__name__} has attention sinks, which are not supported here.")
    metadata = METADATA.get()
    if metadata is None:
        heads = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
        return _attend(query, key, value, attention_mask, scaling, softcap).transpose(1, 2), None
    pattern, flat = metadata.patterns[module.layer_idx], query[0].transpose(0, 1)
    outputs = [
        _attend_by_rows(group, pattern, flat, group.states(module.layer_idx), scaling, softcap)
        for group in metadata.groups
    ]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


def _attend_by_rows(
    group: GroupMetadata, pattern: str, query: torch.Tensor, states: list[torch.Tensor],
    scaling: float | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """query (tokens, heads, size) of all groups -> (tokens of this group, heads, size), computed as the cache is."""
    key, value = states
    (rows, n), (heads, size), kv = group.tokens.shape, query.shape[1:], key.shape[1]
    own = query[group.tokens.flatten()] if group.start is None else query[group.start : group.start + rows * n]
    by_rows = own.to(key.dtype).view(rows, n, kv, heads // kv, size)
    if rows == 1:  # (heads // kv, kv, n, size): the keys of one row serve as a batch, unrepeated
        by_rows = by_rows[0].permute(2, 1, 0, 3)
        key, value = key.expand(len(by_rows), -1, -1, -1), value.expand(len(by_rows), -1, -1, -1)
        out = _attend(by_rows, key, value, group.masks[pattern], scaling, softcap).permute(2, 1, 0, 3)
    else:  # (rows, kv, heads // kv * n, size)
        by_rows = by_rows.permute(0, 2, 3, 1, 4).flatten(2, 3)
        out = _attend(by_rows, key, value, group.mask(pattern, heads // kv), scaling, softcap)
        out = out.view(rows, kv, heads // kv, n, -1).permute(0, 3, 1, 2, 4)
    out = out.reshape(rows * n, heads, -1).to(query.dtype)
    return out[group.restore] if group.start is None else out


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    scaling: float | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """softmax(query key^T * scaling + mask) value, with the scores capped softly if the model says so."""
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap) + (0 if mask is None else mask)
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1).to(value.dtype) @ value


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, eager_mask)
