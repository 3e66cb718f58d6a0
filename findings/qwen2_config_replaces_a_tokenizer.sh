#!/usr/bin/env bash
# A tokenizer that is saved beside the config of a qwen2 model is not the one that AutoTokenizer loads.
#
# transformers 5.23.0, tokenizers as it asks for.
# Expected: the folder's tokenizer.json is what AutoTokenizer.from_pretrained reads, as it says
#   "tokenizer_class": "TokenizersBackend" in tokenizer_config.json.
# Seen: the model type in config.json decides. For "qwen2" the byte-level pipeline of Qwen's own class is put around
#   the vocabulary; a word-level tokenizer then reads every text as no tokens at all, without an error or a warning.
#   Beside the config of a mistral model the same files give the tokens that were saved.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "transformers==5.23.0"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work" <<'PY'
import json
import sys
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

print("transformers", transformers.__version__)
words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(3, 40))]
plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
saved = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
seen = {}
for kind in ("mistral", "qwen2"):
    folder = Path(sys.argv[1]) / kind
    saved.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    loaded = AutoTokenizer.from_pretrained(folder)
    seen[kind] = loaded("w7 w8 w9")["input_ids"]
    print(f"{kind}: {type(loaded).__name__} reads 'w7 w8 w9' as {seen[kind]}; saved: {saved('w7 w8 w9')['input_ids']}")
assert seen["mistral"] == [7, 8, 9], "changed: mistral's config used to leave the tokenizer alone"
assert seen["qwen2"] == [], "changed: qwen2's config used to replace the tokenizer"
PY
