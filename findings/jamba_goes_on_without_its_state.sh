#!/usr/bin/env bash
# Several tokens after a cache begin anew in the recurrent layers of some models, and go on in those of others.
#
# transformers 5.23.0, torch 2.13.0, on a CPU with torch's own operations (no mamba-ssm, no causal-conv1d).
# Expected: a text that is read in two pieces, the second with `past_key_values` (or `cache_params`) of the first, has
#   the logits of the text read at once, as with every model that only attends.
# Seen: so it is for Falcon-H1 and Mamba 2. In Jamba, Mamba and FalconMamba a second piece of several tokens starts from
#   a state of zeros, without an error or a warning; read one by one the same tokens are right. So reading a prompt in
#   pieces, or scoring a continuation of several tokens on a cached prompt, gives other logits than the text has.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.23.0"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

print("transformers", transformers.__version__)
COMMON = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3, "pad_token_id": 0,
          "bos_token_id": None, "eos_token_id": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
KINDS = {
    "falcon_h1": {**HEADS, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
                  "mamba_chunk_size": 8, "head_dim": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "jamba": {**HEADS, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1,
              "mamba_d_state": 8, "mamba_dt_rank": 4},
    "mamba": {"state_size": 8, "time_step_rank": 4, "intermediate_size": 64},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4, "intermediate_size": 64},
}
text = torch.tensor([[7, 9, 20, 31, 5, 14, 22, 8, 40, 11]])


def read(model, name, *lengths):
    cache, at = DynamicCache(config=model.config), 0
    for length in lengths:
        positions = torch.arange(at, at + length)[None]
        options = {} if name == "cache_params" else {"position_ids": positions}
        out = model(text[:, at : at + length], **{name: cache}, use_cache=True, **options)
        at += length
    return out.logits[0, -1]


off = {}
for kind, sizes in KINDS.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON, **sizes)).eval()
    name = "cache_params" if "mamba" in kind else "past_key_values"
    with torch.no_grad():
        whole = model(text, use_cache=False).logits[0, -1]
        pieces, tokens = read(model, name, 6, 4), read(model, name, 6, 1, 1, 1, 1)
    off[kind] = float((pieces - whole).abs().max()), float((tokens - whole).abs().max())
    print(f"{kind}: largest difference of the last logits: in two pieces {off[kind][0]:.2g}, one by one {off[kind][1]:.2g}")
assert all(one_by_one < 1e-3 for _, one_by_one in off.values()), "changed: single tokens used to be right"
assert all(off[kind][0] < 1e-3 for kind in ("falcon_h1", "mamba2")), "changed: these used to go on"
assert all(off[kind][0] > 0.05 for kind in ("jamba", "mamba", "falcon_mamba")), "changed: these used to begin anew"
PY
