#!/usr/bin/env bash
# Weights of an adapter that have no place in the model are left out without a warning.
#
# peft 0.21.0, transformers 5.23.0, torch 2.13.0, on a CPU; Llamas of random weights.
# Expected: `PeftModel.from_pretrained` says that weights of the adapter were not used, as it warns where the model has
#   layers for which the adapter has none, and as the `load_adapter` of transformers' own models does.
# Seen: without a word an adapter of four layers loads onto a model of two, and one of a reward model onto a causal
#   model, where its trained head is lost. Only `PeftModel.load_adapter` tells, in the `unexpected_keys` of its result,
#   which `from_pretrained` drops. So a base model that is not the adapter's is noticed if it is too large, and not if
#   it is too small.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.23.0" "peft==0.21.0"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work" <<'PY'
import logging
import sys
import warnings
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

print("peft", peft.__version__, "transformers", transformers.__version__)
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "pad_token_id": 0,
         "bos_token_id": None, "eos_token_id": 1}
logged = []
transformers.logging.set_verbosity_warning()
transformers.logging.disable_progress_bar()
handler = logging.Handler()
handler.emit = lambda record: logged.append(record.getMessage())
logging.getLogger().addHandler(handler)
transformers.logging.add_handler(handler)


def model(cls, layers):
    torch.manual_seed(0)
    return cls(LlamaConfig(num_hidden_layers=layers, num_labels=1, **SIZES))


def adapter(task, cls, layers):
    config = LoraConfig(task_type=task, target_modules=["q_proj"], init_lora_weights=False)
    folder = Path(sys.argv[1]) / task
    get_peft_model(model(cls, layers), config).save_pretrained(folder)
    return folder


def load(folder, cls, layers):
    """What `from_pretrained` says, and what `load_adapter` has as unexpected."""
    logged.clear()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", FutureWarning)
        loaded = PeftModel.from_pretrained(model(cls, layers), folder)
    said = [str(each.message) for each in warned] + logged
    return said, loaded.load_adapter(folder, "again").unexpected_keys


causal, reward = adapter("CAUSAL_LM", LlamaForCausalLM, 4), adapter("SEQ_CLS", LlamaForSequenceClassification, 4)
CASES = {
    "its own model": (causal, LlamaForCausalLM, 4),
    "a model of more layers": (causal, LlamaForCausalLM, 6),
    "a model of fewer layers": (causal, LlamaForCausalLM, 2),
    "a reward model's, its own model": (reward, LlamaForSequenceClassification, 4),
    "a reward model's, a causal model": (reward, LlamaForCausalLM, 4),
}
said, unexpected = {}, {}
for name, case in CASES.items():
    said[name], unexpected[name] = load(*case)
    print(f"{name}: said {[each[:60] for each in said[name]]}; without a place: {unexpected[name]}")
assert any("missing adapter keys" in each for each in said["a model of more layers"]), "changed: this used to be said"
assert len(unexpected["a model of fewer layers"]) == 4, "changed: two layers used to have no place"
assert any("score" in key for key in unexpected["a reward model's, a causal model"]), "changed: the head had no place"
for name in ("its own model", "a reward model's, its own model"):
    assert not said[name] and not unexpected[name], "changed: an adapter's own model"
for name in ("a model of fewer layers", "a reward model's, a causal model"):
    assert not said[name], "changed: nothing used to be said"

logged.clear()
model(LlamaForCausalLM, 2).load_adapter(str(causal))
reported = [line for text in logged for line in text.splitlines() if "UNEXPECTED" in line and "lora" in line]
print("a model of fewer layers, load_adapter of transformers:", *reported, sep="\n  ")
assert reported, "changed: transformers used to report them"
PY
