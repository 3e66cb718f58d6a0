"""Models for text and images, of which the part that reads and writes text is used."""

from __future__ import annotations

from typing import Any


def text_family(config: Any) -> Any:
    """Return the class of transformers that loads the language model of a config, alone or with what is around it."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    kind = type(config)
    composite = kind not in MODEL_FOR_CAUSAL_LM_MAPPING and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if composite else AutoModelForCausalLM


def drop_other_parts(model: Any) -> None:
    """Free what a text does not run through: towers for images and sound, and what leads from them to tokens."""
    if model.config.get_text_config() is model.config:
        return
    parts = dict(model.base_model.named_children())
    called: set[str] = set()
    hooks = [part.register_forward_hook(lambda *_, name=name: called.add(name)) for name, part in parts.items()]
    try:
        _read_one_token(model)
    finally:
        for hook in hooks:
            hook.remove()
    for name in parts.keys() - called if called else ():
        setattr(model.base_model, name, None)


def _read_one_token(model: Any) -> None:
    import torch

    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
