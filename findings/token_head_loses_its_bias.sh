#!/usr/bin/env bash
# A token classifier loads as a sequence classifier, with its head but without the head's bias.
#
# transformers 5.23.0, torch 2.13.0, on a CPU; models of random weights.
# Expected: config.json names `LlamaForTokenClassification`, so `AutoModelForSequenceClassification` refuses the folder,
#   or makes a new head and says so, or its logits are those of the token head at the last token.
# Seen: the weights of both heads are called `score.weight` and have one shape, so those of the token head are taken;
#   `score.bias` has no place, and is left out. Every logit is off by the bias. The
#   loading report has `score.bias` as UNEXPECTED, and says that it "can be ignored when loading from different
#   task/architecture"; nothing is missing. The same with Qwen2, Qwen3, Mistral, Gemma 2 and Phi 3. What process reward
#   models are (token classifiers on decoders) is what a reward model's loader is easily given.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.23.0"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work" <<'PY'
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

print("transformers", transformers.__version__)
COMMON = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
ids, bias = torch.tensor([[5, 7, 9, 11]]), torch.tensor([3.0, -3.0])
for kind in ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3"):
    torch.manual_seed(0)
    saved = AutoModelForTokenClassification.from_config(AutoConfig.for_model(kind, num_labels=2, **COMMON)).eval()
    saved.score.bias.data.copy_(bias)
    folder = Path(sys.argv[1]) / kind
    saved.save_pretrained(folder)
    loaded, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        meant, found = saved(ids).logits[0, -1], loaded(ids).logits[0]
    print(f"{kind}: saved as {loaded.config.architectures}, logits {meant.tolist()}")
    print(f"  loaded as {type(loaded).__name__}, logits {found.tolist()}; unexpected {report['unexpected_keys']}, "
          f"missing {report['missing_keys']}")
    assert set(report["unexpected_keys"]) == {"score.bias"} and not report["missing_keys"], "changed: the report"
    assert torch.allclose(meant - found, bias, atol=1e-4), "changed: the bias used to be left out"
PY
