#!/usr/bin/env bash
# What PaliGemma makes of a text depends on the attention implementation: "eager" reads it causally, "sdpa" both ways.
#
# transformers 5.23.0, torch 2.13.0, on a CPU; PaliGemma and Gemma 3 for images and text, with random weights.
# Expected: the implementations differ by rounding. PaliGemma's text config has `use_bidirectional_attention=True`, and
#   its model makes a causal mask; whichever of the two holds, it holds for both implementations.
# Seen: given token ids alone, "sdpa" (the default) lets tokens attend to later ones, so that a changed last token changes
#   the logits of all before it; "eager" does not. Gemma 3 is causal with both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.23.0"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText

transformers.logging.set_verbosity_error()
print("transformers", transformers.__version__)
TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
VISION = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
          "num_attention_heads": 4, "image_size": 28, "patch_size": 14, "vision_use_head": False, "projection_dim": 32}
moved = {}
for kind, text in (("paligemma", "gemma"), ("gemma3", "gemma3_text")):
    torch.manual_seed(0)
    sizes = {"text_config": {"model_type": text, **TEXT}, "vision_config": VISION}
    sizes |= {"projection_dim": 32, "hidden_size": 32} if kind == "paligemma" else {"mm_tokens_per_image": 4}
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    one, other = torch.tensor([[7, 9, 20, 31, 5, 14]]), torch.tensor([[7, 9, 20, 31, 5, 40]])
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            before, after = (model(input_ids=ids, use_cache=False).logits[0, :-1] for ids in (one, other))
        moved[kind, implementation] = float((before - after).abs().max())
        print(f"{kind}, {implementation}: another last token moves earlier logits by {moved[kind, implementation]:.3g}")
assert moved["gemma3", "eager"] < 1e-4 and moved["gemma3", "sdpa"] < 1e-4
assert moved["paligemma", "eager"] < 1e-4, "changed: eager used to read a text causally"
assert moved["paligemma", "sdpa"] > 1e-3, "changed: sdpa used to let tokens attend to later ones"
PY
