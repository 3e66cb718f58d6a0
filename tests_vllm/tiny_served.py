"""Tiny random models of a shape that vLLM serves on a CPU, with a token that is never drawn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import tiny

SENTINEL, MARK = 2, 3  # <unk>, "."
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 2,  # heads of 64, the least that vLLM has attention for on a CPU
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


def language_model(folder: Path) -> str:
    """The end of the sequence and a full stop are about as likely as any token, the sentinel as good as impossible.

    The first coordinate of the residual stream is the same large number everywhere, so that it is a bias.
    """
    model = tiny.causal(seed=3, **SHAPE)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 3.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[SENTINEL, 0] = -200.0
        model.lm_head.weight[tiny.EOS, 0] = 6.0
        model.lm_head.weight[MARK, 0] = 14.0
    return tiny.save(folder, model, tiny.words())


def reward_model(folder: Path) -> str:
    return tiny.save(folder, tiny.classifier(**SHAPE), tiny.words())


def with_settings(folder: str, **settings: Any) -> None:
    """Write a generation config, as publishers of models do."""
    from transformers import GenerationConfig

    GenerationConfig(eos_token_id=tiny.EOS, pad_token_id=tiny.PAD, do_sample=True, **settings).save_pretrained(folder)
