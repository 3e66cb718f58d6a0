"""Linear layers with weights of 4, 8 or 16 bits, by the kernels that torch has for them on a CPU.

16 bits are half precision, and products of them are those of float32, in another order.

On x86 the kernels for 4 and 8 bits are vectorized for bf16 only: inputs and outputs are rounded to it, and sums are in
float32. They give a row the same bits whatever the other rows are, and so do norms and activations. Attention does not:
its sums run over the columns in another order when other candidates lie between, and a last bit that differs becomes
one of bf16's. In float64 it differs too little for that. So a model whose products are all of this kind gives a token
the same bits alone and in company, at the price of keys and values of 8 bytes a number.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

GROUP = 32  # weights that share a scale and a minimum
ALIGNED = 16  # rows that the int4 kernel takes together; columns that the int8 kernel reads at once, unchecked


class Groups(NamedTuple):
    """A weight (rows, columns) in 4 bits: `scale * values + minimum`.

    Attributes:
        values: (rows, columns), 0 to 15.
        scale: (rows, columns / 32).
        minimum: (rows, columns / 32).
    """

    values: Tensor
    scale: Tensor
    minimum: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Groups:
        """Round a weight to the nearest of 16 values between the least and the greatest of each group."""
        grouped = weight.float().view(len(weight), -1, GROUP)
        low, high = grouped.amin(-1), grouped.amax(-1)
        scale = ((high - low) / 15).bfloat16().float()  # as the kernel will hold it
        steps = (grouped - low[..., None]) / scale.clamp_min(1e-30)[..., None]
        return cls(steps.round().clamp(0, 15).view_as(weight).to(torch.uint8), scale, low)

    @property
    def weight(self) -> Tensor:
        """The weight, in float32."""
        grouped = self.values.view(len(self.values), -1, GROUP).float()
        return (grouped * self.scale.float()[..., None] + self.minimum.float()[..., None]).view(self.values.shape)

    @classmethod
    def cat(cls, several: Sequence[Groups]) -> Groups:
        """Return the groups of weights one below the other."""
        return cls(*(torch.cat(parts) for parts in zip(*several, strict=True)))


class QuantizedLinear(nn.Module):
    """A linear layer with a kernel for its product, in float32 outside of it.

    Args:
        shape: (outputs, inputs).
        bias: (outputs,), or None.
    """

    bias: Tensor | None
    rounds_inputs = True
    """Whether the kernel rounds inputs to bf16; then `product` takes and gives bf16, and float32 otherwise."""

    def __init__(self, shape: Sequence[int], bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.register_buffer("bias", bias)

    def product(self, rows: Tensor) -> Tensor:
        """(rows, inputs) -> (rows, outputs)."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, self.in_features).bfloat16()
        out = self.product(rows).float().view(*inputs.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


class Int4Linear(QuantizedLinear):
    """16 values between a minimum and a maximum for each group of 32 weights; `weight` is what the kernel packs."""

    weight: Tensor
    scales: Tensor

    def __init__(self, groups: Groups, bias: Tensor | None = None) -> None:
        super().__init__(groups.values.shape, bias)
        zero = groups.minimum.float() + 8 * groups.scale.float()  # the kernel's weight: (value - 8) * scale + zero
        scales = torch.stack([groups.scale.float(), zero], -1).transpose(0, 1).contiguous()
        self.register_buffer("weight", torch.ops.aten._convert_weight_to_int4pack_for_cpu(groups.values.int(), 1))
        self.register_buffer("scales", scales.bfloat16())

    @staticmethod
    def takes(shape: Sequence[int]) -> bool:
        """Return True if the kernel can multiply by a weight (outputs, inputs)."""
        return shape[0] % ALIGNED == 0 and shape[1] % GROUP == 0

    def product(self, rows: Tensor) -> Tensor:
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, GROUP, self.scales)
        return product


class Int8Linear(QuantizedLinear):
    """255 values around zero for each row of the weight."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight.shape, bias)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    @staticmethod
    def takes(shape: Sequence[int]) -> bool:
        """Return True if the kernel can multiply by a weight (outputs, inputs); it does not check that itself."""
        return shape[1] % ALIGNED == 0

    def product(self, rows: Tensor) -> Tensor:
        product: Tensor = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale)
        return product


class Packed:
    """A weight in a kernel's own form, which copies of a module share."""

    def __init__(self, weight: Tensor) -> None:
        self.content = torch.ops.quantized.linear_prepack_fp16(weight, None)

    def __deepcopy__(self, memo: Any) -> Packed:
        return self


class Float16Linear(QuantizedLinear):
    """A weight in half precision, for a product in float32 with inputs that are not rounded."""

    rounds_inputs = False

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight.shape, bias)
        self.packed: Packed | None = Packed(weight.float())
        self.weight = torch.empty(weight.shape, device="meta")  # for those who ask for its shape

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Return True if half precision has such large numbers."""
        return bool(weight.abs().max() <= torch.finfo(torch.float16).max)  # False for NaN

    def forward(self, inputs: Tensor) -> Tensor:
        assert self.packed is not None
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(inputs, self.packed.content)
        return out if self.bias is None else out + self.bias

    def release(self) -> None:
        """Give the weight back, if no copy of the layer has it."""
        self.packed = None


class HalfEmbedding(nn.Module):
    """An embedding held in half precision, whose rows are given in float32."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.register_buffer("weight", weight)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.weight).float()


class Int8Embedding(nn.Module):
    """An embedding in the form of an `Int8Linear`, with which it may share its weight."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.weight[ids].float() * self.scale[ids].float()[..., None]
        return found


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight (rows, columns) to int8; returns it with its scales (rows,) in bf16."""
    scale = (weight.float().abs().amax(-1) / 127).bfloat16()
    rounded = torch.empty(weight.shape, dtype=torch.int8)
    for at in range(0, len(weight), 4096):  # a large vocabulary in float32 takes much memory
        piece = slice(at, at + 4096)
        steps = weight[piece].float() / scale[piece].float().clamp_min(1e-30)[:, None]
        rounded[piece] = steps.round().clamp(-127, 127).to(torch.int8)
    return rounded, scale


class LastProduct(threading.local):
    """What `Together` has computed and not given out yet; for each thread its own."""

    def __init__(self) -> None:
        self.inputs: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}

    def __deepcopy__(self, memo: Any) -> LastProduct:
        return LastProduct()


class Together(nn.Module):
    """Linear layers that are always given the same input, computed in one product.

    Args:
        linear: The product of all.
        sizes: The outputs of each.
    """

    def __init__(self, linear: nn.Module, sizes: Sequence[int]) -> None:
        super().__init__()
        self.linear = linear
        self.sizes = list(sizes)
        self._last = LastProduct()

    def part(self, inputs: Tensor, index: int) -> Tensor:
        """Return the output of one; the first that is asked computes those of all."""
        last = self._last
        if inputs is not last.inputs or index not in last.outputs:
            last.inputs, last.outputs = inputs, dict(enumerate(self.linear(inputs).split(self.sizes, -1)))
        output = last.outputs.pop(index)
        if not last.outputs:
            last.inputs = None
        return output


class Part(nn.Module):
    """One of the layers of a `Together`."""

    def __init__(self, together: Together, index: int) -> None:
        super().__init__()
        self.together = together
        self.index = index
        self.in_features: Any = together.linear.in_features
        self.out_features = together.sizes[index]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.together.part(inputs, self.index)


def side_by_side(layers: Sequence[nn.Module], inputs: Tensor) -> Tensor:
    """Return the outputs (..., sum of outputs) of layers that are given the same input, and may be one product."""
    whole = getattr(layers[0], "together", None)
    if whole is not None and all(getattr(each, "together", None) is whole for each in layers[1:]):
        product: Tensor = whole.linear(inputs)
        return product
    return torch.cat([layer(inputs) for layer in layers], -1)


class LowRank(nn.Module):
    """A layer with what an adapter adds to it, in float64 as the layer's own sums are not all it has to agree with.

    Args:
        base: The layer.
        down: (rank, inputs).
        up: (outputs, rank), scaled.
    """

    down: Tensor
    up: Tensor

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.base = base
        self.out_features = len(up)
        self.register_buffer("down", down.double().T.contiguous())
        self.register_buffer("up", up.double().T.contiguous())

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.base(inputs) + (inputs.double() @ self.down @ self.up).float()
        return out


def fast_form() -> Literal["int4", "float16"] | None:
    """Return the form of a model's layers that is faster than dense ones in float32 on this CPU; None if none is known.

    The kernels for 4 bits are so with AVX-512 only: those for AVX2 are slower from about sixteen rows on.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return "int4"
    return "float16" if capability == "AVX2" and has_half_kernel() else None


@lru_cache(1)
def has_half_kernel() -> bool:
    """Return True if torch multiplies by weights in half precision here, and gives what it should."""
    draw = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(32, 48, generator=draw), torch.randn(3, 48, generator=draw)
    try:
        found = Float16Linear(weight)(inputs)
    except (RuntimeError, AttributeError):
        return False
    return torch.allclose(found, inputs @ weight.half().float().T, rtol=1e-4, atol=1e-4)


def is_quantized(model: nn.Module) -> bool:
    """Return True if some of the model's layers are `QuantizedLinear`."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def rounds_inputs(model: nn.Module) -> bool:
    """Return True if some of the layers round their inputs to bf16."""
    return any(module.rounds_inputs for module in model.modules() if isinstance(module, QuantizedLinear))


def precision(model: Any) -> str:
    """Return what tells a model's weights from those of the same model loaded in another way."""
    kinds = {type(module).__name__ for module in model.modules() if isinstance(module, QuantizedLinear)}
    return " ".join([*sorted(kinds), str(model.dtype)])


def attention_dtype(model: Any) -> torch.dtype:
    """Return the precision of a model's keys, values and attention."""
    own: torch.dtype = model.dtype
    return torch.float64 if rounds_inputs(model) else own
