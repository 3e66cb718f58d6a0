"""Attention of a flat sequence of tokens to the rows of a `TreeCache`.

A forward carries the tokens of all branches one after another, with no padding, as one sequence
(1, tokens). Only attention needs to know which row a token belongs to: here the tokens are laid out
by rows, attend to their row under the layout's mask, and are put back in order. Query heads that
share a key head are laid side by side, so that no key or value is repeated for them.
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

NAME = "cards_tree"


@dataclass
class Group:
    """Rows that attend in one call: `slots` in the cache, with up to n tokens each.

    `columns` (columns,) are those that one row reads; None: all up to the masks' end. `tokens`
    (rows, n) are indices into the flat sequence, `back` (tokens of the group,) the way back from
    (rows * n); where they lie in order, without padding, from `start` on, neither is needed. `masks`
    are additive, (rows, 1, n, columns) for each attention pattern.
    """

    slots: slice | torch.Tensor
    columns: torch.Tensor | None
    tokens: torch.Tensor
    back: torch.Tensor
    start: int | None
    masks: dict[str, torch.Tensor]
    repeated: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Columns that are read."""
        return next(iter(self.masks.values())).shape[-1]

    def mask(self, pattern: str, heads: int) -> torch.Tensor:
        """The mask, once for each of the `heads` that share a key head: (rows, 1, heads * n, columns)."""
        if (pattern, heads) not in self.repeated:  # the same in all layers
            self.repeated[pattern, heads] = self.masks[pattern].repeat(1, 1, heads, 1)
        return self.repeated[pattern, heads]


@dataclass
class Layout:
    """The groups of one forward; `patterns` names the mask of each layer."""

    groups: list[Group]
    patterns: list[str]


LAYOUT: ContextVar[Layout | None] = ContextVar("LAYOUT", default=None)


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
    """Under a layout: query (1, heads, tokens, size), key and value (rows, columns, KV heads, size).

    Without one: plain attention, all of them (batch, heads, length, size). Returns (batch, tokens,
    heads, size).
    """
    if kwargs.get("s_aux") is not None:
        raise ModelError(f"{type(module).__name__} has attention sinks, which are not supported here.")
    layout = LAYOUT.get()
    if layout is None:
        heads = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
        return _attend(query, key, value, attention_mask, scaling, softcap).transpose(1, 2), None
    pattern, flat = layout.patterns[module.layer_idx], query[0].transpose(0, 1)
    found = [_by_rows(group, pattern, flat, key, value, scaling, softcap) for group in layout.groups]
    return (found[0] if len(found) == 1 else torch.cat(found))[None], None


def _by_rows(
    group: Group, pattern: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    scaling: float | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """query (tokens, heads, size) of all groups -> (tokens of this group, heads, size)."""
    (rows, n), (heads, size), kv = group.tokens.shape, query.shape[1:], key.shape[2]
    if group.columns is None:
        key, value = (states[group.slots, : group.width].transpose(1, 2) for states in (key, value))
    else:
        key, value = (states[group.slots][:, group.columns].transpose(1, 2) for states in (key, value))
    ours = query[group.tokens.flatten()] if group.start is None else query[group.start : group.start + rows * n]
    laid = ours.view(rows, n, kv, heads // kv, size)
    if rows == 1:  # (group size, KV heads, n, size): one row's keys serve a batch of them unrepeated
        laid = laid[0].permute(2, 1, 0, 3)
        key, value = key.expand(len(laid), -1, -1, -1), value.expand(len(laid), -1, -1, -1)
        out = _attend(laid, key, value, group.masks[pattern], scaling, softcap).permute(2, 1, 0, 3)
    else:  # (rows, KV heads, group size * n, size)
        laid = laid.permute(0, 2, 3, 1, 4).flatten(2, 3)
        out = _attend(laid, key, value, group.mask(pattern, heads // kv), scaling, softcap)
        out = out.view(rows, kv, heads // kv, n, size).permute(0, 3, 1, 2, 4)
    out = out.reshape(rows * n, heads, size)
    return out[group.back] if group.start is None else out


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    scaling: float | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap) + (0 if mask is None else mask)
    return scores.float().softmax(-1).to(value.dtype) @ value


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, eager_mask)
