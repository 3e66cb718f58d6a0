"""Turns a loaded model into one with weights of 4 or 8 bits, some of whose layers are computed together."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cards_integrations.errors import ModelError
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.transformer.quantization import (
    Bits,
    FusedRMSNorm,
    Groups,
    Int4Linear,
    Int8Embedding,
    Int8Linear,
    Part,
    QuantizedLinear,
    Together,
    int8_rows,
)

Place = tuple[nn.Module, str]
"""Where a module is: its parent, and its name there."""


LIBRARIES = {  # that transformers needs for a checkpoint's `quant_method`
    "bitsandbytes": "bitsandbytes", "gptq": "gptqmodel", "awq": "gptqmodel", "torchao": "torchao",
    "compressed-tensors": "compressed_tensors",
}  # fmt: skip


def check_quantization(spec: LocalModel, config: Any) -> None:
    """Refuse what cannot be done with a checkpoint that is quantized.

    Raises:
        ModelError: It is to be quantized again or to take an adapter, or the library that reads it is not installed.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    method = str(found["quant_method"] if isinstance(found, dict) else found.quant_method)
    if spec.quantization is not None:
        raise ModelError(f"model={spec.model!r} is quantized ({method}): leave quantization={spec.quantization!r} out.")
    if spec.adapter is not None:
        raise ModelError(
            f"adapter={spec.adapter!r} cannot be merged into the quantized weights ({method}) of model={spec.model!r}: "
            "use the model that they were made from, with quantization= if it is to be small."
        )
    _need(LIBRARIES.get(method), f"model={spec.model!r} is quantized ({method}), which needs a library")


def gpu_options(bits: Bits, device: torch.device) -> dict[str, Any]:
    """Return the options of `from_pretrained` with which bitsandbytes quantizes a model on a GPU.

    Raises:
        ModelError: It is not installed.
    """
    _need("bitsandbytes", f"quantization={bits!r} on {device.type!r} needs a library")
    from transformers import BitsAndBytesConfig

    own = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16} if bits == "int4" else {"load_in_8bit": True}
    return {"quantization_config": BitsAndBytesConfig(**own), "device_map": {"": device}}


def _need(library: str | None, why: str) -> None:
    if library is not None and importlib.util.find_spec(library) is None:
        raise ModelError(f"{why}: run `pip install {library.replace('_', '-')}`.")


@torch.no_grad()
def quantize(model: Any, bits: Bits, known: Mapping[str, Groups]) -> None:
    """Replace the linear layers of a transformers model; what else it has is held in float32.

    Layers of a shape that the kernel does not take stay as they are, and so do classification heads. The vocabulary
    (embedding and output) is held in 8 bits.

    Args:
        model: The model, which is changed.
        bits: Of the layers.
        known: Weights that were in 4 bits before they were loaded, by the names of the model's parameters.

    Raises:
        ModelError: No layer has a shape that the kernel takes.
    """
    names = {module: name for name, module in model.named_modules()}
    for places in _with_one_input(model):
        layers = [getattr(parent, name) for parent, name in places]
        if all(layer in names and _takes(bits, layer) for layer in layers):
            _replace(places, layers, bits, [known.get(f"{names[layer]}.weight") for layer in layers])
    if not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ModelError(
            f"quantization={bits!r}: {type(model).__name__} has no linear layer that torch's kernel takes."
        )
    _quantize_vocabulary(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    fuse_norms(model)


def _takes(bits: Bits, layer: nn.Module) -> bool:
    kernel = Int4Linear if bits == "int4" else Int8Linear
    return type(layer) is nn.Linear and kernel.takes(layer.weight.shape)


def _with_one_input(model: Any) -> list[list[Place]]:
    """The linear layers of the body: those of one parent that are given the same tensor, together, in their order."""
    places = [(parent, name) for parent in model.base_model.modules() for name in dict(parent.named_children())]
    places = [place for place in places if type(getattr(*place)) is nn.Linear]
    inputs: dict[nn.Module, torch.Tensor] = {}
    hooks = [
        getattr(*place).register_forward_pre_hook(lambda m, given: inputs.update({m: given[0]})) for place in places
    ]
    try:
        model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[tuple[int, int], list[Place]] = {}
    for parent, name in places:
        layer = getattr(parent, name)
        found.setdefault((id(parent), id(inputs.get(layer, layer))), []).append((parent, name))
    return list(found.values())


def _replace(places: list[Place], layers: Sequence[Any], bits: Bits, known: list[Groups | None]) -> None:
    """Put one product in the place of several layers, or of one."""
    whole = len(places) == 1
    linear = _quantized(layers, bits, known)
    together = Together(linear, [layer.out_features for layer in layers])
    for index, (parent, name) in enumerate(places):
        setattr(parent, name, linear if whole else Part(together, index))


def _quantized(layers: Sequence[Any], bits: Bits, known: list[Groups | None]) -> QuantizedLinear:
    biases = [torch.zeros(layer.out_features) if layer.bias is None else layer.bias.data.float() for layer in layers]
    bias = None if all(layer.bias is None for layer in layers) else torch.cat(biases)
    if bits == "int8":
        weight, scale = int8_rows(torch.cat([layer.weight.data for layer in layers]))
        return Int8Linear(weight, scale, bias)
    groups = [own or Groups.of(layer.weight.data) for own, layer in zip(known, layers, strict=True)]
    return Int4Linear(Groups.cat(groups), bias)


def _quantize_vocabulary(model: Any) -> None:
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output is not None and output.weight is embedding.weight
    if type(output) is nn.Linear and _takes("int8", output):
        bias = None if output.bias is None else output.bias.data.float()
        rows = int8_rows(output.weight.data)
        model.set_output_embeddings(Int8Linear(*rows, bias))
        if type(embedding) is nn.Embedding:
            model.set_input_embeddings(Int8Embedding(*(rows if tied else int8_rows(embedding.weight.data))))
    elif type(embedding) is nn.Embedding:
        model.set_input_embeddings(Int8Embedding(*int8_rows(embedding.weight.data)))


def fuse_norms(model: nn.Module) -> None:
    """Replace each RMSNorm of a float32 model by torch's own, where both give the same on random input."""
    for parent, name, module in list(_children(model)):
        fused = _as_rms_norm(module)
        if fused is not None:
            setattr(parent, name, fused)


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for name, module in parent.named_children():
            yield parent, name, module


def _as_rms_norm(module: nn.Module) -> FusedRMSNorm | None:
    """The same as an RMSNorm of torch, or None if it is not one."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    parameters = dict(module.named_parameters())
    if not isinstance(eps, float) or set(parameters) != {"weight"} or parameters["weight"].dim() != 1:
        return None
    weight = parameters["weight"]
    sample = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    expected = module(sample)
    for candidate in (weight, nn.Parameter(1 + weight, requires_grad=False)):  # Gemma holds its weights less 1
        fused = FusedRMSNorm(candidate, eps)
        if expected.shape == sample.shape and torch.allclose(fused(sample), expected, rtol=1e-5, atol=1e-6):
            return fused
    return None
