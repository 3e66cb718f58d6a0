"""Attention of a flat sequence of tokens to the rows of a `TreeCache`.

A forward carries the tokens of all branches one after another, without padding, as one sequence (1, tokens). Only
attention needs to know which row a token belongs to: here the tokens are arranged by rows, attend to their row under
the mask, and are put back in order. Query heads that share a key head are placed side by side, so that no key or value
is repeated for them.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from cards_integrations.transformer.kv_block import Pair, RowBlock, States
from cards_integrations.transformer.latents import as_key, latent_heads

NAME = "cards_tree"
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"  # patterns, as configs call them


class StateStore(Protocol):
    """Where the keys and values of a forward are written."""

    def store(self, pair: Pair) -> int:
        """Write the keys and values of an attention call, (1, heads, tokens, size) each; return the call's number."""

    def latent(self, layer: int) -> Pair | None:
        """Return the latents that a layer has given to the cache in this forward; None if there are none."""


@dataclass
class GroupMetadata:
    """Rows that attend in one call, with up to n tokens each.

    Attributes:
        block: The block of the cache that has the rows.
        rows: The rows in the block.
        columns: The columns that are read, the same in each row.
        tokens: (rows, n) indices into the flat sequence.
        restore: (tokens of the group,) indices into rows * n that put the outputs back in order.
        start: Where the group's tokens begin in the flat sequence if they are in order there, without padding; then
            neither `tokens` nor `restore` is needed. None otherwise.
        masks: For each attention pattern an additive mask (rows, 1, n, columns).
        repeated: Masks repeated for several heads, which all layers use.
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

    def states(self, call: int) -> list[torch.Tensor]:
        """Return the keys and values that the group reads in a call, (rows, KV heads, columns, head size)."""
        return [states[self.rows, self.columns].transpose(1, 2) for states in self.block.states[call]]

    def mask(self, pattern: str, heads: int) -> torch.Tensor:
        """Return the mask for `heads` query heads that share a key head, (rows, 1, heads * n, columns)."""
        if (pattern, heads) not in self.repeated:
            self.repeated[pattern, heads] = self.masks[pattern].repeat(1, 1, heads, 1)
        return self.repeated[pattern, heads]


@dataclass
class SharedMetadata:
    """A shared prefix, and the tokens that see all of it: indices into the flat sequence."""

    states: States
    tokens: slice | torch.Tensor


@dataclass
class AttentionMetadata:
    """What attends to what in one forward.

    Attributes:
        groups: The groups, in the order of their tokens.
        patterns: For each layer the name of its mask.
        store: Takes the keys and values of the forward.
        rounded: True if the numbers of tokens, rows and columns have been rounded up.
        shared: Prefixes that rows have in common, and that are not in their columns.
        rows: How many rows the flat sequence is cut into; more than 1 for recurrent layers only.
    """

    groups: list[GroupMetadata]
    patterns: list[str]
    store: StateStore
    rounded: bool = False
    shared: list[SharedMetadata] = field(default_factory=list)
    rows: int = 1


METADATA: ContextVar[AttentionMetadata | None] = ContextVar("METADATA", default=None)
"""The metadata of the forward that runs now."""


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
    """Write to a tree cache and attend to it, or, without `METADATA`, attend as usual.

    Args:
        module: The attention layer.
        query: (batch, heads, tokens, head size); the flat sequence is batch * tokens.
        key: (batch, KV heads, tokens, head size) of these tokens.
        value: Like `key`.
        attention_mask: Unused, except without metadata.
        scaling: Factor of the scores; None for 1 / sqrt(head size).
        softcap: Scores become softcap * tanh(scores / softcap).
        kwargs: Other options of transformers. Of these, `s_aux` (heads,) are attention sinks: scores of a token that
            every query sees, and whose value is zero. The others are ignored.

    Returns:
        (batch, tokens, heads, head size), and None in place of attention weights.
    """
    metadata, sinks = METADATA.get(), kwargs.get("s_aux")
    shared = metadata.shared if metadata is not None else []
    options = ScoreOptions(scaling, softcap, with_sums=bool(shared) or sinks is not None)
    if metadata is None:
        return _attend_as_usual(query, key, value, attention_mask, options, sinks), None
    latent = metadata.store.latent(module.layer_idx)
    heads = latent_heads(module, latent) if scaling is not None else None
    if heads is not None and latent is not None:
        query, (key, value), options = heads.query(query), as_key(latent), options._replace(latent=heads.rank)
    call, flat = metadata.store.store((key, value)), query.transpose(1, 2).flatten(0, 1)
    pattern = metadata.patterns[module.layer_idx]
    attended = [_attend_by_rows(group, pattern, flat, group.states(call), options) for group in metadata.groups]
    out = torch.cat([each for each, _ in attended]) if len(attended) > 1 else attended[0][0]
    if options.with_sums:
        sums = torch.cat([each for _, each in attended if each is not None])
        for prefix in shared:
            _add_shared(out, sums, prefix.tokens, _attend_to_shared(prefix, flat, call, options))
        if sinks is not None:
            out = out * _share_beside(sinks, sums)[..., None].to(out.dtype)
    if heads is not None:
        out = heads.output(out)
    return out.view(len(query), -1, *out.shape[1:]).to(query.dtype), None


def _attend_as_usual(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, options: ScoreOptions,
    sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Attend to the keys and values that are given, (batch, heads, length, size) -> (batch, tokens, heads, size)."""
    heads = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
    out, sums = _attend(query, key, value, mask, options)
    if sinks is not None and sums is not None:
        out = out * _share_beside(sinks, sums.transpose(1, 2)).transpose(1, 2)[..., None].to(out.dtype)
    return out.transpose(1, 2)


def _share_beside(sinks: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Return the share of the probability that sinks (heads,) leave to all else, given its log sums (..., heads)."""
    return torch.sigmoid(sums - sinks.to(sums.dtype))


class ScoreOptions(NamedTuple):
    """How attention scores are computed from queries and keys.

    Attributes:
        scaling: The factor of the scores; None for 1 / sqrt(head size).
        softcap: Scores become softcap * tanh(scores / softcap); None leaves them as they are.
        with_sums: Whether the logarithms of the sums of their exponentials are wanted.
        latent: How many of a key's first numbers are also its value; 0 if values are given.
    """

    scaling: float | None
    softcap: float | None
    with_sums: bool = False
    latent: int = 0


Attended = tuple[torch.Tensor, torch.Tensor | None]
"""Outputs (..., size), and the logarithm of the sum of exponentials of each query's scores, (...)."""


def _attend_by_rows(
    group: GroupMetadata, pattern: str, query: torch.Tensor, states: list[torch.Tensor], options: ScoreOptions
) -> Attended:
    """query (tokens, heads, size) of all groups -> (tokens of this group, heads, size), in the cache's data type."""
    key, value = states
    (rows, n), (heads, size), kv = group.tokens.shape, query.shape[1:], key.shape[1]
    own = query[group.tokens.flatten()] if group.start is None else query[group.start : group.start + rows * n]
    by_rows = own.to(key.dtype).view(rows, n, kv, heads // kv, size)
    if rows == 1:  # (heads // kv, kv, n, size): the keys of one row serve as a batch, unrepeated
        by_rows = by_rows[0].permute(2, 1, 0, 3)
        key, value = key.expand(len(by_rows), -1, -1, -1), value.expand(len(by_rows), -1, -1, -1)
        out, sums = _attend(by_rows, key, value, group.masks[pattern], options)
        out, sums = out.permute(2, 1, 0, 3), sums if sums is None else sums.permute(2, 1, 0)
    else:  # (rows, kv, heads // kv * n, size)
        by_rows = by_rows.permute(0, 2, 3, 1, 4).flatten(2, 3)
        out, sums = _attend(by_rows, key, value, group.mask(pattern, heads // kv), options)
        out = out.view(rows, kv, heads // kv, n, -1).permute(0, 3, 1, 2, 4)
        sums = sums if sums is None else sums.reshape(rows, kv, heads // kv, n).permute(0, 3, 1, 2)
    out, sums = out.reshape(rows * n, heads, -1), sums if sums is None else sums.reshape(rows * n, heads)
    if group.start is None:
        out, sums = out[group.restore], sums if sums is None else sums[group.restore]
    return out, sums


def _attend_to_shared(shared: SharedMetadata, query: torch.Tensor, call: int, options: ScoreOptions) -> Attended:
    """query (tokens, heads, size) -> (tokens that share the prefix, heads, size): all of them see all of it."""
    keys, values = (states.transpose(0, 1)[None] for states in shared.states[call])  # (1, kv, columns, size)
    own, kv = query[shared.tokens].to(keys.dtype), keys.shape[1]
    n, heads, size = own.shape
    by_head = own.view(n, kv, heads // kv, size).permute(1, 2, 0, 3).reshape(1, kv, heads // kv * n, size)
    out, sums = _attend(by_head, keys, values, None, options)
    out = out.reshape(kv, heads // kv, n, -1).permute(2, 0, 1, 3).reshape(n, heads, -1)
    return out, sums if sums is None else sums.reshape(kv, heads // kv, n).permute(2, 0, 1).reshape(n, heads)


def _add_shared(out: torch.Tensor, sums: torch.Tensor, tokens: slice | torch.Tensor, attended: Attended) -> None:
    """Join the attention of these tokens to a shared prefix with that to their own columns, as one softmax."""
    other, other_sums = attended
    assert other_sums is not None
    share = torch.sigmoid(other_sums - sums[tokens])[..., None]
    sums[tokens] = torch.logaddexp(sums[tokens], other_sums)
    precise = torch.promote_types(out.dtype, share.dtype)
    out[tokens] = torch.lerp(out[tokens].to(precise), other.to(precise), share.to(precise)).to(out.dtype)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, options: ScoreOptions
) -> Attended:
    """softmax(query key^T * scaling + mask) value, with soft-capped scores if the model has them."""
    scaling, softcap, with_sums, latent = options
    value = key[..., :latent] if latent else value
    if softcap is None and not with_sums:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling), None
    if softcap is None and query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        found: Attended = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=mask, scale=scaling
        )
        return found
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + (0 if mask is None else mask)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    sums = scores.logsumexp(-1) if with_sums else None
    return scores.softmax(-1).to(value.dtype) @ value, sums


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, eager_mask)
