#!/usr/bin/env bash
# Llama 4's checkpoints, whose class takes images and texts, read no text in transformers 5.24.0.
#
# transformers 5.24.0, torch 2.13.0, on a CPU; a small Llama 4 of random weights.
# Expected: `Llama4ForConditionalGeneration` has logits for a text, and `generate` goes on with it, as in 5.23.0.
# Seen: both raise AttributeError: it passes on `image_outputs` of its language model, whose output has none. The
#   language model alone, `model.language_model`, reads the text.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.24.0"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import AutoModelForImageTextToText, Llama4Config

transformers.logging.set_verbosity_error()
print("transformers", transformers.__version__)
TEXT = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}
VISION = {
    "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
}
torch.manual_seed(0)
model = AutoModelForImageTextToText.from_config(Llama4Config(text_config=TEXT, vision_config=VISION)).eval()
ids = torch.tensor([[3, 4, 5]])


def found(read):
    try:
        with torch.no_grad():
            return f"logits {tuple(read().shape)}"
    except AttributeError as error:
        return f"AttributeError: {error}"


alone = found(lambda: model.language_model(ids).logits)
whole = found(lambda: model(ids).logits)
goes_on = found(lambda: model.generate(ids, max_new_tokens=2, do_sample=False))
print(f"language model: {alone}\n{type(model).__name__}: {whole}\ngenerate: {goes_on}")
assert alone.startswith("logits")
assert "image_outputs" in whole and "image_outputs" in goes_on, "changed: both used to raise"
PY
