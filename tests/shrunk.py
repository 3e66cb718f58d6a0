"""Tiny configs of any type of model: the defaults of the type, with every size that is known by its name made small."""

from __future__ import annotations

import re
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

VOCABULARY = 64
RULES: dict[str, Any] = {  # a name is what the first expression that matches it whole says
    "pad_token_id|num_kv_shared_layers": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 2,
    "bos_token_id|forced_eos_token_id": None,
    "is_decoder|use_sliding_window": True,
    "initializer_range|init_std": 0.3,
    "(decoder_)?vocab_size|vocab_size_per_layer_input": VOCABULARY,
    # how many
    "encoder_layers|num_encoder_layers|num_key_value_heads|num_kv_heads|num_global_key_value_heads": 2,
    "swa_num_key_value_heads|linear_num_key_heads|index_n_heads|n_mamba_heads|mamba_expand|altup_num_inputs": 2,
    "num_experts_per_tok(en)?|moe_top_?k|moe_k": 2,
    "n_shared_experts|num_shared_experts|moe_num_shared_experts|n_group|topk_group|num_expert_group": 1,
    "first_k_dense_replace|mamba_n_groups|depth|num_blocks|max_window_layers": 1,
    "num_attention_heads|n_heads?|((num_)?(decoder|encoder)_)?attention_heads|swa_num_attention_heads": 4,
    "num_(local_)?experts|n_routed_experts|moe_num_experts": 4,
    "mamba_n(um)?_heads|mamba_d_conv|mamba_dt_rank|time_step_rank|linear_num_(value_)?heads|laurel_rank": 4,
    # how wide
    "head_dim|kv_channels|dim_head|d_head|rotary_dim|qk_(rope|nope)_head_dim|v_head_dim": 8,
    "global_head_dim|swa_head_dim": 8,
    "linear_(key_|value_)?head_dim|hidden_size_per_layer_input": 8,
    "mamba_d_state|(ssm_)?state_size|mamba_chunk_size|chunk_size": 8,
    "q_lora_rank|kv_lora_rank|qk_head_dim|index_head_dim|mamba_d_head|mamba_head_?dim": 16,
    "patch_size|num_position_embeddings": 16,
    # how long
    "sliding_window(_size)?|local_attention|attention_window_size|local_attention_window_len|attention_chunk_size": 8,
    "(original_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(target|source)_positions": 256,
    "context_length|model_max_length|index_topk": 256,
    "mamba_d_ssm": 64,
}  # fmt: skip
WIDTHS = {
    32: """hidden_size n_embd d_model emb_dim embedding_size input_embedding_size output_embedding_size embedding_dim
        out_hidden_size projector_hidden_size image_size""",
    48: """intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim dff dim_ff ffn_hidden_size mlp_dim
        dense_intermediate_size prefix_dense_intermediate_size intermediate_size_mlp feed_forward_size""",
    24: """expert_ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
        moe_shared_expert_intermediate_size shared_experts_intermediate_size""",
}
LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"}
MAY_BE_NONE = {
    "q_lora_rank", "shared_intermediate_size", "prefix_dense_intermediate_size", "head_dim", "n_group", "topk_group",
    "v_head_dim", "num_global_key_value_heads", "sliding_window",
}  # fmt: skip
BOS = {"bos_token_id": 2}
ZAMBA = {
    "num_hidden_layers": 4, "layers_block_type": ["linear_attention"] * 2 + ["hybrid"] * 2, "attention_hidden_size": 64,
    "attention_head_dim": 16, "num_key_value_heads": 4, "n_mamba_heads": 4,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
VL = {"text_config": {"rope_parameters": MROPE}}
OWN: dict[str, dict[str, Any]] = {  # where sizes depend on each other
    "cwm": BOS, "emu3": BOS, "modernbert-decoder": BOS,
    "hunyuan_v1_dense": {"head_dim": 8}, "hunyuan_v1_moe": {"head_dim": 8}, "ministral": {"head_dim": 8},
    "gemma4_text": {"global_head_dim": 16},
    "mimo_v2_flash": {"v_head_dim": 12},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4, "num_dense_layers": 1},
    "mllama": {"text_config": {**BOS, "cross_attention_layers": [1], "num_hidden_layers": 3}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "n_groups": 1,
        "num_hidden_layers": 4,
    },
    "reformer": {
        "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (16, 16), "attn_layers": ["local", "lsh"],
        "attention_head_size": 8, "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 4,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 50, "shape_vocab_size": 50, "pronunciation_embed_dim": 16, "shape_embed_dim": 16,
    },
    "xmod": {"default_language": "en_XX"},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"full_attention": MROPE, "sliding_attention": MROPE},
    },
    "dots3_note_text": {"head_dim": 16, "per_layer_config": None},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
        "indexer_compress_ratio": 2, "hc_lowrank": 8, "ple_embed_dim": 32,
    },
    "qwen2_vl": VL, "qwen2_5_vl": VL, "glm4v": VL, "glm4v_moe": VL, "glm46v": VL, "glm_ocr": VL, "paddleocr_vl": VL,
    "zamba": ZAMBA, "zamba2": ZAMBA,
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16, "num_hidden_layers": 2},
}  # fmt: skip


def shrunk(kind: str, **options: Any) -> Any:
    """Return a tiny config of a type.

    Args:
        kind: As `model_type` names it.
        options: Settings of the config that go before all rules.
    """
    defaults = CONFIG_MAPPING[kind]().to_dict()
    return AutoConfig.for_model(kind, **_over(_over(_small(defaults), OWN.get(kind, {})), options))


def _small(defaults: dict[str, Any], layers: int | None = None) -> dict[str, Any]:
    """The settings that differ from the defaults; of one layer of every kind at least."""
    mixed = len(set(defaults.get("layer_types") or ())) > 1 or "mlp_layer_types" in defaults
    layers = layers or (4 if mixed else 2)
    found: dict[str, Any] = {}
    for name, value in defaults.items():
        if isinstance(value, dict) and "model_type" in value:
            part = _small(value, layers if name == "text_config" else 2)
            found[name] = {**part, "model_type": value["model_type"]}
        elif name in LAYERS:
            found[name] = layers
        elif name in ("layer_types", "mlp_layer_types") and value:
            found[name] = _kinds(value, layers, in_turn=name == "layer_types")
        elif not (value is None and name in MAY_BE_NONE) and (rule := _rule(name)) is not None:
            found[name] = rule[0]
    if "kv_lora_rank" in defaults and "num_key_value_heads" in found:
        found["num_key_value_heads"] = 4
    return found


def _rule(name: str) -> tuple[Any] | None:
    """What a setting of this name is to be, if there is a rule."""
    for width, names in WIDTHS.items():
        if name in names.split():
            return (width,)
    return next(((value,) for names, value in RULES.items() if re.fullmatch(names, name)), None)


def _kinds(kinds: list[str], layers: int, in_turn: bool) -> list[str]:
    each = list(dict.fromkeys(kinds))
    return [each[i % len(each) if in_turn else min(i, len(each) - 1)] for i in range(layers)]


def _over(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both settings, nested ones too; those of the second count."""
    nested = {k: _over(one[k], v) for k, v in other.items() if isinstance(v, dict) and isinstance(one.get(k), dict)}
    return {**one, **other, **nested}
