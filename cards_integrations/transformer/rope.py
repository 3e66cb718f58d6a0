"""Rotary frequencies that depend on the length of a text: on its own length, not on that of its neighbours.

With the rope type "longrope" (Phi-3 and Phi-4 with 128k tokens) a text of up to `original_max_position_embeddings`
tokens, the *switch*, is read with one set of frequencies, and a longer one with another. transformers chooses the set
for a whole forward, by its largest position. A forward of the engine has many texts, so here each token has a flag.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import DynamicCache

from cards_integrations.errors import ModelError
from cards_integrations.transformer.cache_layers import cache_argument

LONGROPE = "longrope"
SWITCH = "original_max_position_embeddings"
FAR = 2**30  # a position beyond every switch

LONG: ContextVar[torch.Tensor | None] = ContextVar("LONG", default=None)
"""Which tokens of the running forward are read with the frequencies of long texts, (tokens,) bool; None leaves the
choice to the model."""


def rope_switch(config: Any) -> int:
    """Return the length up to which texts are read with the frequencies of short ones; 0 if there is only one set.

    Args:
        config: The config of a text model.

    Raises:
        ModelError: Its layers have different switches.
    """
    switches = {each[SWITCH] for each in _with_two_sets(config)}
    if len(switches) > 1:
        raise ModelError(f"model type {config.model_type!r} has rotary embeddings with several switches, {switches}.")
    switch = min(switches, default=0)
    return switch if switch < (getattr(config, "max_position_embeddings", None) or FAR) else 0


def _with_two_sets(config: Any) -> list[dict[str, Any]]:
    """Return those rope parameters, of all layers or of each kind of layer, that have two sets of frequencies."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer = [parameters, *(each for each in parameters.values() if isinstance(each, dict))]
    return [each for each in by_layer if each.get("rope_type") == LONGROPE]


@contextmanager
def short_texts(config: Any, tokens: int) -> Iterator[None]:
    """Lower the switch of a config to `tokens` inside the block, if it is higher."""
    before = rope_switch(config)
    try:
        if before > tokens:
            _set_switch(config, tokens)
        yield
    finally:
        if before > tokens:
            _set_switch(config, before)


def _set_switch(config: Any, tokens: int) -> None:
    for parameters in _with_two_sets(config):
        parameters[SWITCH] = tokens
    if hasattr(config, SWITCH):  # this one takes precedence
        setattr(config, SWITCH, tokens)


class TokenwiseRotary(torch.nn.Module):
    """A rotary embedding that chooses the frequencies of each token by its flag in `LONG`.

    It has two copies of the model's own embedding, which changes its state with the length of the text. One copy sees
    only the positions of short texts; the other one always sees a position far beyond the switch. So neither of them
    ever changes its state.

    Args:
        native: The model's own rotary embedding.
    """

    def __init__(self, native: torch.nn.Module) -> None:
        super().__init__()
        config = getattr(native, "config", None)  # shared by all copies, as `short_texts` changes its switch
        self.native = native
        self.short, self.long = (copy.deepcopy(native, {id(config): config}) for _ in range(2))

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        flags = LONG.get()
        if flags is None:
            return self.native(x, position_ids, *args, **kwargs)
        far = torch.cat([position_ids, torch.full_like(position_ids[..., :1], FAR)], -1)
        short = self.short(x, position_ids.masked_fill(flags, 0), *args, **kwargs)
        long = self.long(x, far, *args, **kwargs)
        if isinstance(short, torch.Tensor):
            return torch.where(flags[:, None], long[..., :-1, :], short)
        return tuple(torch.where(flags[:, None], b[..., :-1, :], a) for a, b in zip(short, long, strict=True))


def use_tokenwise_rotary(model: Any) -> int:
    """Replace a model's rotary embeddings that depend on the length of a text, in place.

    Returns:
        `rope_switch` of the model.
    """
    if switch := rope_switch(model.config.get_text_config()):
        for parent in [*model.modules()]:
            for name, module in [*parent.named_children()]:
                if not isinstance(parent, TokenwiseRotary) and _has_two_sets(module):
                    setattr(parent, name, TokenwiseRotary(module))
    return switch


def _has_two_sets(module: torch.nn.Module) -> bool:
    types = getattr(module, "rope_type", None)
    return LONGROPE in (types.values() if isinstance(types, dict) else [types])


def reads_again(model: Any, switch: int) -> bool:
    """True if a model's own `generate` reads a text from its beginning again once it outgrows the switch, as Phi-3's.

    Others go on, with keys of both sets in their cache. To find out, the model prepares its inputs at the switch.

    Args:
        model: A model of transformers.
        switch: `rope_switch` of it.
    """
    cache = DynamicCache()
    cache.update(*torch.zeros(2, 1, 1, switch, 1), 0)
    ids = torch.zeros(1, switch + 1, dtype=torch.long)
    name = cache_argument(model.forward)
    inputs = model.prepare_inputs_for_generation(ids, **{name: cache}, next_sequence_length=1, use_cache=True)
    return inputs.get(name) is None
