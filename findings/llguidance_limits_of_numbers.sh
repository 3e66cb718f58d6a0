#!/usr/bin/env bash
# llguidance builds no grammar for the plainest 64-bit integer, though it does for the unsigned one.
#
# llguidance 1.9.1.
# Expected: a JSON schema of an integer from -2**63 to 2**63 - 1 (what Rust, Java and databases call a long), of one with
#   a minimum of 2**60 only, and of a number within 1e30 can be held, as one from 0 to 2**64 - 1 can.
# Seen: "Failed to generate regex for integer range" (and "float range"): bounds are kept as floats, so -(2**63 - 1) is
#   refused as -2**63, and a minimum without a maximum has an end.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "llguidance==1.9.1"
"$work/venv/bin/python" - <<'PY'
import json
from importlib.metadata import version

from llguidance import LLMatcher

print("llguidance", version("llguidance"))
HELD = [
    {"type": "integer", "minimum": 0, "maximum": 2**64 - 1},
    {"type": "integer", "minimum": -(2**62), "maximum": 2**62},
    {"type": "integer", "minimum": 2**53},
    {"type": "number", "minimum": -1e9, "maximum": 1e9},
]
REFUSED = [
    {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    {"type": "integer", "minimum": -(2**63 - 1), "maximum": 2**63 - 1},
    {"type": "integer", "minimum": 2**60},
    {"type": "number", "minimum": -1e30, "maximum": 1e30},
]
found = {}
for schema in (*HELD, *REFUSED):
    text = json.dumps(schema)
    found[text] = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(text), None)
    print(text, "->", found[text][:100] or "held")
assert not any(found[json.dumps(schema)] for schema in HELD), "changed: these used to be held"
assert all("range" in found[json.dumps(schema)] for schema in REFUSED), "changed: these used to be refused"
PY
