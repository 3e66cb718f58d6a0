"""Linear layers with weights of 4, 8 or 16 bits, which use torch's kernels for CPUs.

16 bits are half precision; their products are those of float32, summed in another order.

On x86 the kernels for 4 and 8 bits are vectorized for bf16 only: inputs and outputs are rounded to it, and sums are in
float32. They give a row the same bits whatever the other rows of the batch are, and so do norms and activations.
Attention does not: it sums over the columns of the cache in another order if other candidates lie in between. In
float32, a difference in the last bit could then change how the inputs of the next product are rounded to bf16; in
float64, it is too small for that. So attention runs in float64, and a model whose products are all of this kind gives a
token the same bits alone and in a batch. The price is 8 bytes for each number of keys and values.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

GROUP = 32  # weights that share a scale and a minimum
ALIGNED = 16  # rows of a block of the int4 kernel; columns that the int8 kernel reads at once, without a check


class Groups(NamedTuple):
    """A weight (rows, columns) in 4 bits: `scale * values + minimum`.

    Attributes:
        values: (rows, columns) uint8, 0 to 15.
        scale: The distance of two neighboring values in each group, (rows, columns / 32).
        minimum: The weight of value 0 in each group, (rows, columns / 32).
    """

    values: Tensor
    scale: Tensor
    minimum: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Groups:
        """Round a weight (rows, columns) to 16 evenly spaced values between the extremes of each group."""
        grouped = weight.float().view(len(weight), -1, GROUP)
        low, high = grouped.amin(-1), grouped.amax(-1)
        scale = ((high - low) / 15).bfloat16().float()  # as the kernel will hold it
        steps = (grouped - low[..., None]) / scale.clamp_min(1e-30)[..., None]
        return cls(steps.round().clamp(0, 15).view_as(weight).to(torch.uint8), scale, low)

    @property
    def weight(self) -> Tensor:
        """The rounded weight, (rows, columns) float32."""
        grouped = self.values.view(len(self.values), -1, GROUP).float()
        return (grouped * self.scale.float()[..., None] + self.minimum.float()[..., None]).view(self.values.shape)

    @classmethod
    def cat(cls, several: Sequence[Groups]) -> Groups:
        """Return the groups of several weights, their rows one below the other."""
        return cls(*(torch.cat(parts) for parts in zip(*several, strict=True)))


class QuantizedLinear(nn.Module):
    """A linear layer whose product a kernel computes; its inputs and outputs are float32.

    Args:
        shape: That of the weight, (outputs, inputs).
        bias: (outputs,), or None.
    """

    bias: Tensor | None
    rounds_inputs = True
    """Whether the kernel rounds inputs to bf16."""

    def __init__(self, shape: Sequence[int], bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.register_buffer("bias", bias)

    def product(self, rows: Tensor) -> Tensor:
        """Multiply by the weight: (rows, inputs) -> (rows, outputs), both bf16."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        if not inputs.is_floating_point():  # as Mamba-2 casts them to the type of the weights of its head
            raise TypeError("it makes integers of what quantized layers read: leave quantization= out")
        rows = inputs.reshape(-1, self.in_features).bfloat16()
        out = self.product(rows).float().view(*inputs.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


class Int4Linear(QuantizedLinear):
    """A linear layer with 16 values for each group of 32 weights, see `Groups`.

    Attributes:
        weight: The values in the kernel's own layout.
        scales: The scale and the zero of each group, (inputs / 32, outputs, 2) bf16.
    """

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
    """A linear layer with 255 values around zero for each row of the weight, see `int8_rows`.

    Args:
        weight: (outputs, inputs) int8.
        scale: (outputs,) bf16.
        bias: (outputs,), or None.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight.shape, bias)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    @staticmethod
    def takes(shape: Sequence[int]) -> bool:
        """Return True if the kernel can multiply by a weight (outputs, inputs), which it does not check itself."""
        return shape[1] % ALIGNED == 0

    def product(self, rows: Tensor) -> Tensor:
        product: Tensor = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale)
        return product


class Packed:
    """A weight in half precision in a kernel's own layout, which copies of a module share.

    Args:
        weight: (outputs, inputs) float32.
    """

    def __init__(self, weight: Tensor) -> None:
        self.content = torch.ops.quantized.linear_prepack_fp16(weight, None)

    def __deepcopy__(self, memo: Any) -> Packed:
        return self


class Float16Linear(QuantizedLinear):
    """A linear layer with a weight in half precision; inputs, products and sums are float32.

    Args:
        weight: (outputs, inputs).
        bias: (outputs,), or None.
    """

    rounds_inputs = False

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight.shape, bias)
        self.packed: Packed | None = Packed(weight.float())
        self.weight = torch.empty(weight.shape, device="meta")  # only its shape

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Return True if all weights are within the range of half precision."""
        return bool(weight.abs().max() <= torch.finfo(torch.float16).max)  # False for NaN

    def forward(self, inputs: Tensor) -> Tensor:
        assert self.packed is not None
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(inputs, self.packed.content)
        return out if self.bias is None else out + self.bias

    def release(self) -> None:
        """Drop the weight, whose memory is freed if no copy of the layer has it."""
        self.packed = None


class HalfEmbedding(nn.Module):
    """An embedding in half precision, which returns float32.

    Args:
        weight: (tokens, size) float16.
    """

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.register_buffer("weight", weight)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.weight).float()


class Int8Embedding(nn.Module):
    """An embedding in the form of an `Int8Linear`, with which it may share its weight; it returns float32.

    Args:
        weight: (tokens, size) int8.
        scale: (tokens,) bf16.
    """

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
    """Round a weight (rows, columns) to int8, and return it with its scales, (rows,) bf16."""
    scale = (weight.float().abs().amax(-1) / 127).bfloat16()
    rounded = torch.empty(weight.shape, dtype=torch.int8)
    for at in range(0, len(weight), 4096):  # a large vocabulary in float32 takes much memory
        piece = slice(at, at + 4096)
        steps = weight[piece].float() / scale[piece].float().clamp_min(1e-30)[:, None]
        rounded[piece] = steps.round().clamp(-127, 127).to(torch.int8)
    return rounded, scale


class LastProduct(threading.local):
    """Outputs of `Together` that have been computed and not fetched yet; each thread has its own.

    Attributes:
        inputs: The inputs that they belong to; None if all of them have been fetched.
        outputs: The outputs of each layer, by its index.
    """

    def __init__(self) -> None:
        self.inputs: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}

    def __deepcopy__(self, memo: Any) -> LastProduct:
        return LastProduct()


class Together(nn.Module):
    """Linear layers that always get the same input, computed as one product.

    Args:
        linear: A layer with the outputs of all of them, one after the other.
        sizes: How many outputs each of them has.
    """

    def __init__(self, linear: nn.Module, sizes: Sequence[int]) -> None:
        super().__init__()
        self.linear = linear
        self.sizes = list(sizes)
        self._last = LastProduct()

    def part(self, inputs: Tensor, index: int) -> Tensor:
        """Return the outputs (..., size) of the layer with this index; the first call computes those of all layers."""
        last = self._last
        if inputs is not last.inputs or index not in last.outputs:
            last.inputs, last.outputs = inputs, dict(enumerate(self.linear(inputs).split(self.sizes, -1)))
        output = last.outputs.pop(index)
        if not last.outputs:
            last.inputs = None
        return output


class Part(nn.Module):
    """One of the layers of a `Together`.

    Args:
        together: The layers.
        index: Which of them this is.
    """

    def __init__(self, together: Together, index: int) -> None:
        super().__init__()
        self.together = together
        self.index = index
        self.in_features: Any = together.linear.in_features
        self.out_features = together.sizes[index]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.together.part(inputs, self.index)


def side_by_side(layers: Sequence[nn.Module], inputs: Tensor) -> Tensor:
    """Return the outputs of layers with the same input one after the other, in one product if they are `Part`s.

    Args:
        layers: The layers.
        inputs: (..., inputs).

    Returns:
        (..., sum of outputs).
    """
    whole = getattr(layers[0], "together", None)
    if whole is not None and all(getattr(each, "together", None) is whole for each in layers[1:]):
        product: Tensor = whole.linear(inputs)
        return product
    return torch.cat([layer(inputs) for layer in layers], -1)


class LowRank(nn.Module):
    """A layer with what a LoRA adapter adds to it.

    The addition is computed in float64, so that it hardly depends on the order of sums in a batch.

    Args:
        base: The layer.
        down: The first matrix of the adapter, (rank, inputs).
        up: The second one, times its scale, (outputs, rank).
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
    """Return the form of layers that is faster than float32 on this CPU; None if none is known.

    Those of 4 bits are faster with AVX-512 only: the kernels for AVX2 are slower from about sixteen rows on.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return "int4"
    return "float16" if capability == "AVX2" and has_half_kernel() else None


@lru_cache(1)
def has_half_kernel() -> bool:
    """Return True if torch can multiply by weights in half precision on this CPU, and the result is right."""
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
    """Return a text that differs for weights of one model that were loaded in different forms or dtypes."""
    kinds = {type(module).__name__ for module in model.modules() if isinstance(module, QuantizedLinear)}
    return " ".join([*sorted(kinds), str(model.dtype)])


def attention_dtype(model: Any) -> torch.dtype:
    """Return the precision of a model's keys, values and attention."""
    own: torch.dtype = model.dtype
    return torch.float64 if rounds_inputs(model) else own
