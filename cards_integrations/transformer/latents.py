"""Multi-head latent attention: the cache keeps the latent of a token, not the keys and values computed from it.

With k = W_K c and v = W_V c for each head, q^T k = (W_K^T q)^T c and sum_t p_t v_t = W_V sum_t p_t c_t: what projects
the latents moves to the query and to the output (DeepSeek-V2, arXiv 2405.04434, section 2.1).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from cards_integrations.transformer.kv_block import Pair


class LatentHeads(NamedTuple):
    """The projections from a latent to keys and values: W_K and W_V, (heads, size, rank) each."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def rank(self) -> int:
        """The size of a latent."""
        return self.keys.shape[-1]

    def query(self, query: torch.Tensor) -> torch.Tensor:
        """(batch, heads, tokens, size + rotary size) -> (batch, heads, tokens, rank + rotary size)."""
        own, rotary = query.tensor_split([self.keys.shape[1]], -1)
        return torch.cat([own @ self.keys, rotary], -1)

    def output(self, latents: torch.Tensor) -> torch.Tensor:
        """Project sums of latents to outputs of heads, (tokens, heads, rank) -> (tokens, heads, value size)."""
        return (latents.transpose(0, 1) @ self.values.to(latents.dtype).mT).transpose(0, 1)


def as_key(latent: Pair) -> Pair:
    """Return one key of latent and rotary part for all heads, (batch, 1, tokens, ...); its beginning is the value."""
    key = torch.cat(latent, -1)
    return key, key[..., :0]


def latent_heads(module: Any, given: Pair | None) -> LatentHeads | None:
    """Return those of an attention layer.

    Args:
        module: The layer.
        given: What it has given to the cache, (batch, 1, tokens, ...) if that is latents and rotary parts.

    Returns:
        None if the layer keeps something else, or its projection is no plain matrix.
    """
    if given is None or given[0].shape[1] != 1:
        return None
    sizes = "qk_nope_head_dim", "v_head_dim", "kv_lora_rank"
    projection: Any = getattr(module, "kv_b_proj", None)
    plain = type(projection) is torch.nn.Linear  # not a quantized one, which may be of a class made of it
    if not plain or not all(hasattr(module, name) for name in sizes):
        return None
    keys, values, rank = (getattr(module, name) for name in sizes)
    if projection.bias is not None or given[0].shape[-1] != rank:
        return None
    return LatentHeads(*projection.weight.view(-1, keys + values, rank).tensor_split([keys], 1))
