"""Builders of tiny random models and tokenizers, saved as ordinary Hugging Face directories."""

from __future__ import annotations

from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

PAD, EOS = 0, 1
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
WINDOW = {"sliding_window": 6}  # smaller than the texts of the tests
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": WINDOW,
    "gemma": {"head_dim": 8},
    "gemma2": {**MIXED, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {**MIXED, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gpt2": {"n_inner": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {},
    "phi3": WINDOW,
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "gpt_oss": {**MIXED, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    "deepseek_v3": {
        "kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "moe_intermediate_size": 24, "num_key_value_heads": 4,
    },
    "gemma4_text": {
        **WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4,
        "num_kv_shared_layers": 2, "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 48,
    },
    "llama4_text": {
        "attention_chunk_size": 6, "num_local_experts": 2, "intermediate_size_mlp": 48, "num_hidden_layers": 4,
        "head_dim": 8,
    },
    "diffllama": {},
}  # fmt: skip
HYBRIDS: dict[str, dict[str, Any]] = {  # with layers that have states
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "falcon_h1": {  # in all layers beside attention
        "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8,
        "head_dim": 8,
    },
    "jamba": {  # which goes on by single tokens only
        "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1,
        "mamba_d_state": 8, "mamba_dt_rank": 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
}  # fmt: skip
WITHOUT_CLASSIFIER = {"gemma4_text", "llama4_text", "falcon_h1", "lfm2"}  # transformers has none for them
# Shapes as they come, or as on a GPU.
RUNS = [(family, rounded) for family in FAMILIES for rounded in (False, True)] + [(each, False) for each in HYBRIDS]
SCORED_RUNS = [(family, rounded) for family, rounded in RUNS if family not in WITHOUT_CLASSIFIER]
ALTERNATING = (
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def words(**special: str | None) -> PreTrainedTokenizerFast:
    """Word-level: padding, end of sequence, unknown, three marks, then w6 to w47."""
    names = ["<pad>", "</s>", "<unk>", ".", "!", "?", *(f"w{i}" for i in range(6, 48))]
    fast = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=fast, model_max_length=256, **special)


def byte_pairs(merged: str = "the cat sat on the mat and the dog ran away. ", size: int = 280) -> Any:
    """Byte-level BPE with merges learned from `merged`; every text is readable."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "</s>"], initial_alphabet=sorted(alphabet), show_progress=False
    )
    fast.train_from_iterator([merged] * 8, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", model_max_length=256)


def fallback(known: str = "") -> PreTrainedTokenizerFast:
    """One token for each byte, as sentencepiece models have for characters that they do not know."""
    names = ["<pad>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *known]
    fast = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>")


def line_breaks() -> PreTrainedTokenizerFast:
    """Bytes, letters, and line breaks that merge and are added tokens as well, as Gemma has them."""
    breaks = ["\n", "\n\n", "\n\n\n"]
    names = ["<pad>", "</s>", "<mark>", *(f"<0x{byte:02X}>" for byte in range(256)), *breaks, *ascii_lowercase]
    merges = [("\n", "\n"), ("\n\n", "\n")]
    fast = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges, byte_fallback=True))
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast.add_tokens([AddedToken(text, normalized=False) for text in (*breaks, "<mark>")])
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>")


def config(family: str, **options: Any) -> Any:
    return AutoConfig.for_model(family, **{**SIZES, **{**FAMILIES, **HYBRIDS}.get(family, {}), **options})


def attention(family: str) -> str:
    return "eager" if family in ("gemma2", "bloom", "gpt_oss", "fnet", "mamba2") else "sdpa"  # all there is


def causal(family: str = "llama", seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family, **options), attn_implementation=attention(family))
    return model.float().eval()


def classifier(family: str = "llama", seed: int = 1, **options: Any) -> Any:
    torch.manual_seed(seed)
    settings = config(family, **{"num_labels": 1, **options})
    model = AutoModelForSequenceClassification.from_config(settings, attn_implementation=attention(family))
    return model.float().eval()


def save(folder: Path, model: Any, tokenizer: Any) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
