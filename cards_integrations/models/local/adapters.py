"""peft adapters: merged into a model's weights, or into copies of those that two models share."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cards_integrations.errors import ModelError
from cards_integrations.models.local.checks import check_complete, check_finite
from cards_integrations.models.local.load_lock import load_errors
from cards_integrations.models.local.resolve import resolve_adapter
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.paths import is_directory

WEIGHTS = "adapter_model.safetensors"
MISSING = "Found missing adapter keys while loading the checkpoint: "  # how peft's warning begins
LAST_LAYER = re.compile(r"(^|\.)(score|classifier|classification_head|logits_proj)(\.out_proj)?\.weight$")
"""The name of the weights that give the labels, in heads of one layer and of two."""


def can_share_weights(spec: LocalModel) -> bool:
    """Return True if the adapter can be merged into copies of some weights, with all others shared.

    Other kinds of adapters are loaded, or initialized, by writing into the base model's own weights.
    """
    assert spec.adapter is not None
    from peft import PeftConfig

    with load_errors(spec.adapter, "adapter"):
        config = PeftConfig.from_pretrained(resolve_adapter(spec.adapter))
    keeps_base = getattr(config, "init_lora_weights", None) in (True, False, "gaussian")
    everywhere = not getattr(config, "alora_invocation_tokens", None)  # else only behind certain tokens
    return config.peft_type == "LORA" and config.bias == "none" and keeps_base and everywhere


def merge_adapter(spec: LocalModel, model: Any, shared: bool) -> Any:
    """Return the model with its adapter merged.

    Args:
        spec: The model, with an adapter.
        model: The base model, which is changed.
        shared: Whether its weights are another model's, too; those that the adapter changes are copied.
    """
    places = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    with load_errors(spec.adapter or "", "adapter"):
        adapted = _load_adapter(spec, model)
    _copy_adapted_weights(adapted, lambda weight: shared or places[id(weight)] > 1)
    return adapted.merge_and_unload()


def _load_adapter(spec: LocalModel, model: Any) -> Any:
    """peft's model of a base model, which is changed, and an adapter."""
    from peft import PeftModel

    assert spec.adapter is not None
    with warnings.catch_warnings():
        # peft reads an attribute that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("error", MISSING)
        weights = _tensors(spec.adapter)
        check_finite(f"adapter={spec.adapter!r}", weights)
        try:
            adapted = PeftModel.from_pretrained(model, resolve_adapter(spec.adapter), autocast_adapter_dtype=False)
        except UserWarning as missing:
            names = re.findall(r"'(.*?)'", str(missing))
            return check_complete(f"adapter={spec.adapter!r}", names, (), f"model={spec.model!r}")
    if not hasattr(adapted, "merge_and_unload"):
        kind = adapted.active_peft_config.peft_type.value
        raise ModelError(f"adapter={spec.adapter!r} ({kind}) cannot be merged into weights, as a LoRA can: use one.")
    if stray := [name for name in weights if not _has_place(adapted, name)]:
        raise ModelError(
            f"adapter={spec.adapter!r} has weights for {stray[0]!r}, which model={spec.model!r} does not have: it was "
            "trained on another model, or for another task."
        )
    return adapted


def _has_place(adapted: Any, name: str) -> bool:
    """Return True if an adapter's weight belongs to a layer of the model; peft passes over what does not."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    module = adapted
    for step in name.split("."):
        if isinstance(module, BaseTunerLayer):
            return True  # peft looks after its own
        if not hasattr(module, step):
            return False
        module = getattr(module, step)
    return True


def brought_by(spec: LocalModel) -> set[str]:
    """Return the names of a model's own weights that its adapter replaces, such as a head that the model lacks."""
    if spec.adapter is None:
        return set()
    with load_errors(spec.adapter, "adapter"):
        return {name.removeprefix("base_model.model.") for name in _tensors(spec.adapter)}


def add_adapter(spec: LocalModel, model: Any) -> Any:
    """Return a quantized model with its adapter beside the layers: their weights stay as they are, and may be shared.

    peft sees linear layers without any weights of their own in the place of the quantized ones.

    Args:
        spec: The model, with an adapter.
        model: The base model, which is changed.

    Raises:
        ModelError: The adapter is more than a sum of two factors for each layer, or replaces layers that have been
            made into others.
    """
    import torch

    from cards_integrations.transformer.fused import FusedRMSNorm
    from cards_integrations.transformer.quantization import Int8Embedding, LowRank, Part, QuantizedLinear

    assert spec.adapter is not None
    if not can_share_weights(spec):
        raise ModelError(f"adapter={spec.adapter!r} is not a plain LoRA, which a quantized model cannot take.")
    made = {n for n, m in model.named_modules() if isinstance(m, (FusedRMSNorm, Int8Embedding, Part, QuantizedLinear))}
    if whole := sorted(name for name in brought_by(spec) if name.removesuffix(".weight") in made):
        raise ModelError(
            f"adapter={spec.adapter!r} replaces {whole[0]!r}, which a quantized model cannot take: leave quantization= "
            "out, and for the embedded model use dtype='float32'."
        )
    layers = {
        f"{name}.{child}" if name else child: layer
        for name, parent in model.named_modules()
        for child, layer in parent.named_children()
        if isinstance(layer, (Part, QuantizedLinear)) and ".together" not in f".{name}"
    }
    for name, layer in layers.items():
        model.set_submodule(name, _without_weights(layer.out_features, layer.in_features))
    with load_errors(spec.adapter, "adapter"), torch.no_grad():
        adapted = _load_adapter(spec, model)
        factors = {name: _factors(spec, layer) for name, layer in _tuned(adapted).items()}
        adapted.unload()
    for name, layer in layers.items():
        model.set_submodule(name, LowRank(layer, *factors.pop(name)) if name in factors else layer)
    if factors:
        raise ModelError(f"adapter={spec.adapter!r} changes {next(iter(factors))}, which is not quantized.")
    return model


def _without_weights(outputs: int, inputs: int) -> Any:
    """Return a linear layer whose weights are a single number, to save memory."""
    import torch

    layer = torch.nn.Linear(1, 1, bias=False)
    layer.in_features, layer.out_features = inputs, outputs
    layer.weight = torch.nn.Parameter(torch.zeros(1, 1).expand(outputs, inputs), requires_grad=False)
    return layer


def _tuned(adapted: Any) -> dict[str, Any]:
    """Return the layers that an adapter changes, by their names in the base model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = adapted.get_base_model().named_modules()
    return {name: module for name, module in modules if isinstance(module, BaseTunerLayer)}


def _factors(spec: LocalModel, layer: Any) -> tuple[Any, Any]:
    """Return the two factors whose product an adapter adds to a weight."""
    import torch

    [own] = layer.active_adapters
    down, up = layer.lora_A[own].weight, layer.lora_B[own].weight * layer.scaling[own]
    if layer.use_dora.get(own) or not torch.allclose(up @ down, layer.get_delta_weight(own), atol=1e-6):
        raise ModelError(f"adapter={spec.adapter!r} is not a plain LoRA, which a quantized model cannot take.")
    return down.detach(), up.detach()


def label_options(adapter: str | None) -> dict[str, int]:
    """Return the option `num_labels` that fits the classification head which an adapter brings, if it brings one."""
    if adapter is None:
        return {}
    from safetensors import safe_open

    with load_errors(adapter, "adapter"), safe_open(_weights_file(adapter), "pt") as tensors:
        heads = [name for name in tensors.keys() if LAST_LAYER.search(name)]  # noqa: SIM118 - not iterable
        return {"num_labels": tensors.get_slice(heads[0]).get_shape()[0]} if heads else {}


def _tensors(adapter: str) -> dict[str, Any]:
    """Read the adapter's own weights."""
    from safetensors.torch import load_file

    return load_file(_weights_file(adapter))


def _weights_file(adapter: str) -> str:
    """Return the file of the adapter's own weights in safetensors; peft would fall back on `adapter_model.bin`."""
    found = resolve_adapter(adapter)
    if not is_directory(found):
        from huggingface_hub import hf_hub_download

        return str(hf_hub_download(found, WEIGHTS))
    file = Path(found) / WEIGHTS
    if not file.is_file():
        raise ModelError(f"adapter={adapter!r} has no {WEIGHTS}; weights are not read from pickles.")
    return str(file)


def _copy_adapted_weights(adapted: Any, is_shared: Callable[[Any], bool]) -> None:
    """Copy the shared ones of the weights that an adapter will be merged into; the others stay as they are."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            for name, weight in base.named_parameters(recurse=False):
                if is_shared(weight):
                    setattr(base, name, torch.nn.Parameter(weight.detach().clone(), requires_grad=False))
