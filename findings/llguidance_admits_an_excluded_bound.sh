#!/usr/bin/env bash
# llguidance admits the excluded lower bound of a number whose two bounds lie within one whole number.
#
# llguidance 1.9.1.
# Expected: a JSON schema of a number with `exclusiveMinimum: 0` refuses 0, whatever its maximum is.
# Seen: so it does with a maximum of 1 or 2, and without one. With a maximum of 0.5 it takes 0, though not 0.0; with
#   1 < x <= 1.5 it takes 1. Upwards the same: -0.5 <= x < 0 takes -0. No error, no warning.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "llguidance==1.9.1"
"$work/venv/bin/python" - <<'PY'
import json
from decimal import Decimal
from importlib.metadata import version

from llguidance import LLMatcher, LLTokenizer

print("llguidance", version("llguidance"))
tokenizer = LLTokenizer("byte")
NUMBERS = ("-1", "-0.5", "-0.1", "-0", "0", "0.0", "0.01", "0.25", "0.5", "0.51", "0.75", "1", "1.0", "1.01", "1.25",
           "1.5", "1.51", "1.75", "2", "2.0", "2.5")


def admitted(schema):
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
    found = set()
    for number in NUMBERS:
        matcher, tokens = LLMatcher(tokenizer, grammar), tokenizer.tokenize_str(number)
        if matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens) and matcher.is_accepting():
            found.add(number)
    return found


def wrong(within, **bounds):
    """The numbers that are admitted and out of bounds, and those that are refused and within them."""
    schema = {"type": "number"} | bounds
    found, wanted = admitted(schema), {number for number in NUMBERS if within(Decimal(number))}
    print(json.dumps(schema))
    print("  admits out of bounds:", sorted(found - wanted), "refuses within:", sorted(wanted - found))
    return found - wanted, wanted - found


RIGHT = set(), set()
assert wrong(lambda x: 0 < x, exclusiveMinimum=0) == RIGHT, "changed: this used to be held"
assert wrong(lambda x: 0 < x <= 1, exclusiveMinimum=0, maximum=1) == RIGHT, "changed: this used to be held"
assert wrong(lambda x: 1 < x <= 2, exclusiveMinimum=1, maximum=2) == RIGHT, "changed: this used to be held"
found = wrong(lambda x: Decimal("0.25") < x <= Decimal("0.75"), exclusiveMinimum=0.25, maximum=0.75)
assert found == RIGHT, "changed: this used to be held"
found = wrong(lambda x: 0 < x <= Decimal("0.5"), exclusiveMinimum=0, maximum=0.5)
assert found == ({"0"}, set()), "changed: 0 used to be admitted"
found = wrong(lambda x: 1 < x <= Decimal("1.5"), exclusiveMinimum=1, maximum=1.5)
assert found == ({"1"}, set()), "changed: 1 used to be admitted"
found = wrong(lambda x: Decimal("-0.5") <= x < 0, minimum=-0.5, exclusiveMaximum=0)
assert found == ({"-0"}, set()), "changed: -0 used to be admitted"
PY
