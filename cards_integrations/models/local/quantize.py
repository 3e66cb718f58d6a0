"""Turns a loaded model into one with weights of 4, 8 or 16 bits, some of whose layers are computed together."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cards_integrations.errors import ModelError
from cards_integrations.models.local.settings import Bits, LocalModel
from cards_integrations.transformer.fused import fuse
from cards_integrations.transformer.quantization import (
    Float16Linear,
    Groups,
    HalfEmbedding,
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
        ModelError: It is not installed, or does not know so many bits.
    """
    if bits == "float16":
        raise ModelError("quantization='float16' is for a CPU: use dtype='float16' on a GPU.")
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
    (embedding and output) is held in 8 bits, or in half precision.

    Args:
        model: The model, which is changed.
        bits: Of the layers.
        known: Weights that were in 4 bits before they were loaded, by the names of the model's parameters.

    Raises:
        ModelError: No layer has a shape that the kernel takes.
    """
    names = {module: name for name, module in model.named_modules()}  # of those that are dense: the others go at once
    for places in _with_one_input(model):
        layers = [getattr(parent, name) for parent, name in places]
        if all(layer in names and _takes(bits, layer) for layer in layers):
            _replace(places, layers, bits, [known.get(f"{names.pop(layer)}.weight") for layer in layers])
    if not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ModelError(
            f"quantization={bits!r}: {type(model).__name__} has no linear layer that torch's kernel takes."
        )
    (_halve_vocabulary if bits == "float16" else _quantize_vocabulary)(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    fuse(model)


def _takes(bits: Bits, layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear:
        return False
    if bits == "float16":
        return Float16Linear.takes(layer.weight.data)
    return (Int4Linear if bits == "int4" else Int8Linear).takes(layer.weight.shape)


def _with_one_input(model: Any) -> list[list[Place]]:
    """The linear layers of the body: those of one parent that are given the same tensor, together, in their order."""
    places = [(parent, name) for parent in model.base_model.modules() for name in dict(parent.named_children())]
    places = [place for place in places if type(getattr(*place)) is nn.Linear]
    inputs: dict[nn.Module, torch.Tensor] = {}
    hooks = [
        getattr(*place).register_forward_pre_hook(lambda m, given: inputs.update({m: given[0]})) for place in places
    ]
    try:
        model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device))
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
    if bits == "float16":
        return Float16Linear(torch.cat([layer.weight.data for layer in layers]), bias)
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


def _halve_vocabulary(model: Any) -> None:
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is not None and _takes("float16", output):
        model.set_output_embeddings(_quantized([output], "float16", []))
    if type(embedding) is nn.Embedding:
        own = embedding.weight.data
        half = own if own.dtype.itemsize == 2 else own.half()
        if torch.isfinite(half).all():
            model.set_input_embeddings(HalfEmbedding(half))
