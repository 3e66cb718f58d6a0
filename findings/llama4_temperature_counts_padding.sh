#!/usr/bin/env bash
# Llama 4 scales queries by their place in the forward, not by `position_ids`: a text beside a longer one is another text.
#
# transformers 5.23.0, torch 2.13.0, on a CPU; a small Llama 4 of random weights whose temperature changes after 16 tokens
#   (`floor_scale`; 8,192 by default).
# Expected: a text that is padded on the left, with its attention mask and its positions, as `generate` pads a batch, has the
#   logits that it has alone.
# Seen: so it is with `attn_temperature_tuning=False`. With True, the default, layers without rotary positions count the
#   padding, too, and the logits are others, without an error.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.23.0"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

transformers.logging.set_verbosity_error()
print("transformers", transformers.__version__)
SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "max_position_embeddings": 512,
    "layer_types": ["full_attention"] * 2, "no_rope_layers": [0, 0], "floor_scale": 16, "attn_scale": 0.5,
}
PADDING = 100
text = torch.tensor([[5 + 7 * i % 40 for i in range(20)]])
mask = torch.cat([torch.zeros(1, PADDING, dtype=torch.long), torch.ones_like(text)], 1)
padded = torch.cat([torch.zeros(1, PADDING, dtype=torch.long), text], 1)
positions = (mask.cumsum(-1) - 1).clamp(min=0)
off = {}
for tuned in (False, True):
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama4_text", attn_temperature_tuning=tuned, **SIZES)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        alone = model(text).logits[0, -1]
        beside = model(padded, attention_mask=mask, position_ids=positions).logits[0, -1]
    off[tuned] = float((beside - alone).abs().max())
    print(f"attn_temperature_tuning={tuned}: largest difference of the logits alone and padded: {off[tuned]:.6f}")
assert off[False] < 1e-3, "changed: without the temperature, padding used to change nothing"
assert off[True] > 0.1, "changed: the temperature used to count the padding"
PY
