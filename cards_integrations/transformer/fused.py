"""Decoder layers and norms that compute the same results in fewer operations.

A step of a small model on a CPU consists of hundreds of small operations, and calling one takes longer than computing
it. A module is replaced only if it has the expected parts, and if its replacement gives the same output for random
input.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cards_integrations.transformer.cache_layers import cache_argument
from cards_integrations.transformer.quantization import rounds_inputs, side_by_side

EXACT, ROUNDED = 1e-5, 1e-2  # largest relative error of a replacement, without and with rounded inputs of products
PARTS = {  # all parts of a layer that `FusedLayer` can replace; it would leave out others, such as norms of queries
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}


class FusedRMSNorm(nn.Module):
    """An RMSNorm in four operations: `inputs * weight / sqrt(mean(inputs^2) + eps)`, by way of the norm of `inputs`.

    Args:
        weight: (hidden size,).
        eps: The constant under the root.
    """

    scaled: Tensor

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("scaled", weight.data * len(weight) ** 0.5, persistent=False)
        self.register_buffer("least", weight.data.new_tensor((len(weight) * eps) ** 0.5), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True)
        return (inputs * self.scaled).div_(length.hypot_(self.least))


class OncePerForward(threading.local):
    """What all layers of a forward share: its rotary angles and its attention function; each thread has its own.

    A head is rotated by `head * cos + swapped * sin`, where `swapped` has its halves exchanged, the first one negated.

    Attributes:
        attend: The attention function of transformers.
    """

    def __init__(self) -> None:
        self.attend: Any = None
        self._given: Any = None
        self._cos = self._sin = torch.empty(0)

    def __deepcopy__(self, memo: Any) -> OncePerForward:
        return OncePerForward()  # a copied model has forwards of its own

    def begin(self, given: tuple[Tensor, Tensor], config: Any) -> None:
        """Prepare a forward, in its first layer.

        Args:
            given: Cosines and sines, (batch, tokens, head size); the same pair in all layers of a forward.
            config: The config of the attention.
        """
        if given is not self._given:
            cos, sin = given
            half = sin.shape[-1] // 2
            self._given, self._cos = given, cos.unsqueeze(2)
            self._sin = torch.cat([-sin[..., :half], sin[..., half:]], -1).unsqueeze(2)
            self.attend = ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation, sdpa_attention_forward)

    def rotated(self, heads: Tensor) -> Tensor:
        """Return heads (batch, tokens, heads, head size) rotated by the angles of their tokens."""
        exchanged = heads.roll(heads.shape[-1] // 2, -1)
        return (heads * self._cos).add_(exchanged.mul_(self._sin))


class FusedLayer(nn.Module):
    """A decoder layer like Llama's, in one function. Its parts keep their names, so that adapters find them.

    Args:
        layer: The layer whose parts it takes over.
        shared: One object for all layers of the model.
    """

    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def __init__(self, layer: nn.Module, shared: OncePerForward) -> None:
        super().__init__()
        for name, part in layer.named_children():
            self.add_module(name, part)
        self.shared = shared
        self.cache_argument = cache_argument(layer.forward)
        own = self.self_attn
        self.scaling, self.index, self.size = own.scaling, own.layer_idx, own.head_dim
        self.queries, self.keys = (each.out_features // self.size for each in (own.q_proj, own.k_proj))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the outputs of the layer, with the arguments that transformers passes to a decoder layer.

        Args:
            hidden_states: (batch, tokens, hidden size).
            attention_mask: As the attention function takes it.
            position_embeddings: Cosines and sines, (batch, tokens, head size).
            kwargs: The cache, and further arguments of the attention function.

        Returns:
            (batch, tokens, hidden size).
        """
        assert position_embeddings is not None
        self.shared.begin(position_embeddings, self.self_attn.config)
        cache = kwargs.pop(self.cache_argument, None)
        attended = self._attend(self.input_layernorm(hidden_states), attention_mask, cache, kwargs)
        hidden_states = hidden_states + attended
        mlp, normed = self.mlp, self.post_attention_layernorm(hidden_states)
        gate, up = side_by_side((mlp.gate_proj, mlp.up_proj), normed).chunk(2, -1)
        outputs: Tensor = hidden_states + mlp.down_proj(mlp.act_fn(gate) * up)
        return outputs

    def _attend(self, normed: Tensor, mask: Tensor | None, cache: Any, kwargs: dict[str, Any]) -> Tensor:
        """Return the output of the attention, (batch, tokens, hidden size)."""
        own, shape = self.self_attn, normed.shape[:-1]
        heads = side_by_side((own.q_proj, own.k_proj, own.v_proj), normed).view(*shape, -1, self.size)
        value = heads[:, :, self.queries + self.keys :].transpose(1, 2)
        turned = self.shared.rotated(heads[:, :, : self.queries + self.keys]).transpose(1, 2)
        query, key = turned[:, : self.queries], turned[:, self.queries :]
        if cache is not None:
            key, value = cache.update(key, value, self.index)
        out, _ = self.shared.attend(own, query, key, value, mask, scaling=self.scaling, dropout=0.0, **kwargs)
        found: Tensor = own.o_proj(out.reshape(*shape, -1))
        return found


def fuse(model: nn.Module) -> None:
    """Replace the norms and layers of a model, in place, by those that compute the same in fewer operations.

    Args:
        model: A model in float32, or with quantized layers.
    """
    for parent, name, module in list(_children(model)):
        fused = _as_rms_norm(module)
        if fused is not None:
            setattr(parent, name, fused)
    shared = OncePerForward()
    for parent, name, module in list(_children(model)):
        fused_layer = _as_fused_layer(module, shared)
        if fused_layer is not None:
            setattr(parent, name, fused_layer)


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield all modules below the model, each with its parent and its name there."""
    for parent in model.modules():
        for name, module in parent.named_children():
            yield parent, name, module


def _as_rms_norm(module: nn.Module) -> FusedRMSNorm | None:
    """Return a module as a `FusedRMSNorm`; None if it is not an RMSNorm."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    parameters = dict(module.named_parameters())
    if not isinstance(eps, float) or set(parameters) != {"weight"} or parameters["weight"].dim() != 1:
        return None
    if len(signature(module.forward).parameters) > 1:
        return None  # it is also given a gate, as those of recurrent layers are
    weight = parameters["weight"]
    sample = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    expected = module(sample)
    for candidate in (weight, nn.Parameter(1 + weight, requires_grad=False)):  # Gemma stores its weights minus 1
        fused = FusedRMSNorm(candidate, eps)
        if _same(fused(sample), expected, EXACT):
            return fused
    return None


def _as_fused_layer(module: nn.Module, shared: OncePerForward) -> FusedLayer | None:
    """Return a decoder layer as a `FusedLayer`; None if it has another structure."""
    if not all(hasattr(module, name) for name in PARTS if name):
        return None
    if {name: set(dict(module.get_submodule(name).named_children())) for name in PARTS} != PARTS:
        return None
    try:
        fused = FusedLayer(module, shared)
        return fused if _same(*_outputs(fused, module), ROUNDED if rounds_inputs(module) else EXACT) else None
    except (RuntimeError, AttributeError, TypeError, KeyError):
        return None


@torch.no_grad()
def _outputs(fused: FusedLayer, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the outputs of both for five random tokens under a causal mask, each (1, 5, hidden size)."""
    draw = torch.Generator().manual_seed(0)
    width = len(fused.input_layernorm.weight)
    cos, sin = torch.randn(2, 1, 5, fused.size, generator=draw)
    mask = torch.full((1, 1, 5, 5), torch.finfo(torch.float32).min).triu(1)
    given = {"attention_mask": mask, "position_embeddings": (cos, sin)}
    hidden = torch.randn(1, 5, width, generator=draw)
    return fused(hidden, **given), layer(hidden, **given)


def _same(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """True if two tensors have the same shape, and differ by at most the relative tolerance."""
    return found.shape == expected.shape and bool((found - expected).norm() <= tolerance * expected.norm())
