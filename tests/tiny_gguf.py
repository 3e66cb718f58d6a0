"""A tiny Llama as a GGUF file, as llama.cpp's own converter would write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny

NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def model() -> Any:
    """The model that `write` writes, with a vocabulary for `tiny.byte_pairs`."""
    return tiny.causal("llama", vocab_size=280)


def write(file: Path, architecture: str = "llama", packed: bool = False) -> Path:
    """Write it, in 32 bits or in 8."""
    config, tokenizer = model().config, tiny.byte_pairs()
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].__getitem__))
    writer.add_token_types([3, 3, *[1] * (len(bpe["vocab"]) - 2)])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(tiny.EOS)
    writer.add_eos_token_id(tiny.EOS)
    writer.add_pad_token_id(tiny.PAD)
    for name, weights in model().state_dict().items():
        _add(writer, name, weights.numpy(), config, packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer: gguf.GGUFWriter, name: str, weights: Any, config: Any, packed: bool) -> None:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, number in heads.items():
        if part in name:  # llama.cpp keeps the two halves of a rotation beside each other
            weights = weights.reshape(number, 2, -1, weights.shape[1]).swapaxes(1, 2).reshape(weights.shape)
    module = name.removesuffix(".weight")
    if module.startswith("model.layers."):
        _, _, layer, part = module.split(".", 3)
        name = f"blk.{layer}.{NAMES[part]}.weight"
    else:
        name = f"{WHOLE[module]}.weight"
    if packed and weights.ndim == 2 and weights.shape[1] % 32 == 0:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quantize(weights, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, np.ascontiguousarray(weights))
