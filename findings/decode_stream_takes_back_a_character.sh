#!/usr/bin/env bash
# tokenizers' DecodeStream and decode() disagree about bytes, and then the stream stops for good.
#
# tokenizers 0.23.3, a decoder with ByteFallback (as Llama 2 and Gemma have).
# Expected: what step() has given, joined, is what decode() gives for the same ids; an incomplete character is U+FFFD.
# Seen: decode() turns a whole run of byte tokens to U+FFFD if it holds one incomplete character, the complete ones
#   before it included. The stream has given such a complete character already; as soon as the next letter shows that
#   the byte after it stays incomplete, step() raises "Invalid prefix", and so it does for every later token.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "tokenizers==0.23.3"
"$work/venv/bin/python" - <<'PY'
import tokenizers
from tokenizers import Tokenizer, decoders, models

print("tokenizers", tokenizers.__version__)
vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, "b": 257, "<unk>": 258}
tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
EURO, BEGUN = [0xE2, 0x82, 0xAC], [0xE2]
ids = [256, *EURO, *BEGUN, 257, 256]

stream, given = decoders.DecodeStream(), []
for token in ids:
    try:
        given.append(stream.step(tokenizer, token))
    except Exception as error:
        given.append(type(error))
        print("step raised:", error)
whole = tokenizer.decode(ids)
print("the stream gave", given)
print("decode() of all ids gives", ascii(whole))
assert given == ["a", None, None, "\u20ac", None, Exception, Exception], "changed: the stream"
assert whole == "a" + 4 * "\ufffd" + "ba", "changed: decode()"
PY
