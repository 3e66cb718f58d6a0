#!/usr/bin/env bash
# llguidance refuses 0.9 for a number of at most 0.99: what the maximum begins with is not admitted.
#
# llguidance 1.9.1.
# Expected: a JSON schema of a number with `minimum: 0, maximum: 0.99` admits 0.9, as it admits 0.8 and 0.90, which is
#   the same number.
# Seen: where a maximum has several decimals, every shorter number that it begins with is refused: 0.9 under 0.91 or
#   0.99, 1.9 under 1.95, 0.1 and 0.12 under 0.125; with `exclusiveMaximum` too, and -0.9 over a minimum of -0.95. Under
#   a maximum of 1 all is right, and under 0.9 only 0.90 is refused. So a model that has written 0.9 may not stop there,
#   and has to add a digit: a confidence of 0.9 becomes 0.90 at best, and 0.99 at worst.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "llguidance==1.9.1"
"$work/venv/bin/python" - <<'PY'
import json
from importlib.metadata import version

from llguidance import LLMatcher, LLTokenizer

print("llguidance", version("llguidance"))
tokenizer = LLTokenizer("byte")
TENTHS = [f"{whole}.{tenth}" for whole in (0, 1) for tenth in range(10)]
NUMBERS = [*TENTHS, *(f"-{number}" for number in TENTHS[1:]), "0.11", "0.12", "0.124", "0.90"]


def refused(low, high, **bounds):
    """The numbers from `low` to `high` that a schema of these bounds does not admit."""
    grammar = LLMatcher.grammar_from_json_schema(json.dumps({"type": "number"} | bounds))
    found = []
    for number in NUMBERS:
        matcher, tokens = LLMatcher(tokenizer, grammar), tokenizer.tokenize_str(number)
        read = matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens)
        if low <= float(number) <= high and not (read and matcher.is_accepting()):
            found.append(number)
    print(json.dumps(bounds), "refuses", found)
    return found


assert refused(0, 0.9, minimum=0, maximum=0.9) == ["0.90"], "changed: a maximum of one decimal"
assert refused(0, 1, minimum=0, maximum=1) == [], "changed: this used to be right"
assert refused(0.05, 1, minimum=0.05, maximum=1) == [], "changed: this used to be right"
for highest, shorter in ((0.91, ["0.9"]), (0.99, ["0.9"]), (1.95, ["1.9"]), (0.125, ["0.1", "0.12"])):
    assert refused(0, highest, minimum=0, maximum=highest) == shorter, "changed: shorter numbers used to be refused"
assert refused(0, 0.98, minimum=0, exclusiveMaximum=0.99) == ["0.9"], "changed: shorter numbers used to be refused"
assert refused(-0.95, -0.1, minimum=-0.95, maximum=-0.1) == ["-0.9"], "changed: shorter numbers used to be refused"
PY
