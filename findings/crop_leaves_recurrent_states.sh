#!/usr/bin/env bash
# `crop` on the cache of a model with recurrent layers takes tokens back from attention and convolution only.
#
# transformers 5.23.0, torch 2.13.0, on a CPU; Qwen3-Next, Falcon-H1 and LFM2 of random weights.
# Expected: after `activate_past_recording()`, `crop(-k)` makes the cache what it was k tokens before, or raises, as the
#   layers say of themselves that they are not croppable.
# Seen: keys, values and convolution states go back, recurrent states stay as they are after the tokens that were taken
#   back, and what is read next has other logits, without an error. With LFM2, which has convolutions only, it is right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.23.0"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

transformers.logging.set_verbosity_error()
print("transformers", transformers.__version__)
COMMON = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
KINDS = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8,
                  "head_dim": 8},
}
kept, back, after = torch.tensor([[7, 9, 20, 31, 5, 14]]), torch.tensor([[22, 8, 40]]), torch.tensor([[11, 17]])
off = {}
for kind, sizes in KINDS.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON, **sizes)).eval()
    with torch.no_grad():
        whole = model(torch.cat([kept, after], 1), use_cache=False).logits[0, -1]
        cache = DynamicCache(config=model.config)
        model(kept, past_key_values=cache, use_cache=True)
        cache.activate_past_recording()
        model(back, past_key_values=cache, use_cache=True)
        try:
            cache.crop(-back.shape[1])
            found = model(after, past_key_values=cache, use_cache=True).logits[0, -1]
            off[kind] = float((found - whole).abs().max())
        except (RuntimeError, ValueError) as error:
            off[kind] = f"{type(error).__name__}: {error}"
    print(f"{kind}: largest difference of the logits after crop: {off[kind]}")
assert off["lfm2"] < 1e-3, "changed: convolutions used to go back"
assert off["qwen3_next"] > 0.05 and off["falcon_h1"] > 0.05, "changed: recurrent states used to stay"
PY
