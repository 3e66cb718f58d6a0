#!/usr/bin/env bash
# With longrope a long text in a batch changes the logits of a short one beside it.
#
# transformers 5.23.0, torch 2.13.0, on a CPU; a Phi-3 of random weights, original_max_position_embeddings 16.
# Expected: a row of a padded batch has the logits that it has alone, up to rounding: so it is with rope types
#   "default", "linear", "llama3" and "yarn".
# Seen: with "longrope" the frequencies for long texts are taken for all rows as soon as one of them is long, for the
#   choice goes by the largest position of the whole batch. The greedy text of the short row is another one, too.
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
SIZES = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "original_max_position_embeddings": 16,
         "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
TYPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [1.0, 4.0, 8.0, 16.0], "original_max_position_embeddings": 16},
}
short, long = [7, 9, 20, 31, 5], list(range(3, 35))
padded = torch.tensor([[0] * (len(long) - len(short)) + short, long])
mask = (padded != 0).long()
positions = (mask.cumsum(-1) - 1).clamp(min=0)
off = {}
for kind, parameters in TYPES.items():
    torch.manual_seed(0)
    rope = {"rope_type": kind, "rope_theta": 10000.0, **parameters}
    family = "phi3" if kind == "longrope" else "llama"
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, rope_parameters=rope)).eval()
    with torch.no_grad():
        alone = model(torch.tensor([short]), use_cache=False).logits[0, -1]
        beside = model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[0, -1]
        one = model.generate(torch.tensor([short]), max_new_tokens=8, do_sample=False)[0, len(short) :].tolist()
        two = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False)[0, len(long) :].tolist()
    off[kind] = float((alone - beside).abs().max()), one == two
    print(f"{kind}: largest difference of the short row's logits {off[kind][0]:.2g}; same greedy text: {one == two}")
assert all(difference < 1e-3 and same for kind, (difference, same) in off.items() if kind != "longrope"), "changed"
assert off["longrope"][0] > 0.1 and not off["longrope"][1], "changed: a long neighbour used to change a short text"
PY
