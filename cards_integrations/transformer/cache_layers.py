"""The layers of the cache as transformers sees them."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from cards_integrations.transformer.kv_block import Pair

RECURRENT = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}  # layers with states, as configs call them
StateName = tuple[str, int]
"""The kind of a state, as transformers calls it, and its number in the layer."""


def cache_argument(function: Callable[..., Any]) -> str:
    """Return the name by which a function of transformers takes a cache: "cache", or before 5.24 one of two others."""
    taken = signature(function).parameters
    return next((name for name in ("cache", "cache_params") if name in taken), "past_key_values")


class TreeLayer(CacheLayerMixin):
    """The cache of an attention layer, which returns the keys and values that it is given.

    They are stored later, when the layer attends: by `TreeCache.store`. `given` serves layers that cache latents.
    """

    given: Pair | None = None

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the blocks allocate their tensors themselves."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        self.given = key_states, value_states
        return self.given

    def get_seq_length(self) -> int:
        return 0  # positions are always passed in

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # the masks come with the attention metadata

    def get_max_length(self) -> int:
        return -1


class RecurrentLayer(LinearAttentionLayer):
    """The cache of a recurrent layer: its states in the forward that runs."""

    def hold(self, states: dict[StateName, torch.Tensor]) -> None:
        """Begin a forward from these states, (rows, ...) each; from none where texts begin."""
        LinearAttentionLayer.__init__(self, self.number_of_states)
        for (kind, number), state in states.items():
            getattr(self, kind)[number] = state
            getattr(self, f"is_{kind}_initialized")[number] = self.has_previous_state[number] = True
            if kind == "conv_states":
                self.conv_kernel_size[number] = state.shape[-1]
            self.dtype, self.device = state.dtype, state.device

    @property
    def held(self) -> dict[StateName, torch.Tensor]:
        """The states after the forward."""
        kinds = {"conv_states": self.conv_states, "recurrent_states": self.recurrent_states}
        every = {(kind, number): state for kind, states in kinds.items() for number, state in states.items()}
        return {name: state for name, state in every.items() if state is not None}


class RecurrentTreeLayer(RecurrentLayer, TreeLayer):
    """The cache of a layer that is recurrent and attends as well."""


def cache_layers(config: Any) -> list[TreeLayer | RecurrentLayer]:
    """Return the layers of a model's cache.

    Args:
        config: The config of a decoder.
    """
    if not RECURRENT & {*(getattr(config, "layer_types", None) or ())}:
        return [TreeLayer() for _ in range(config.num_hidden_layers)]
    return [_layer_like(layer) for layer in DynamicCache(config=config).layers]


def _layer_like(layer: Any) -> TreeLayer | RecurrentLayer:
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return TreeLayer()
    kind = RecurrentTreeLayer if isinstance(layer, CacheLayerMixin) else RecurrentLayer
    return kind(layer.number_of_states)
