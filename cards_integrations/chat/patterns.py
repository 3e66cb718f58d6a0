"""Regular expressions of JSON schemas, rewritten where llguidance, the engine of grammars, cannot express them."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

LOOK_AROUND = ("(?=", "(?!", "(?<=", "(?<!")
QUANTIFIER = re.compile(r"(?:[*+?]|\{\d*,?\d*\})[?+]?")
MAX_KEPT = 2000  # characters; what is wrong with shorter schemas is remembered
ANCHORS = {"A": "^", "Z": "$", "z": "$", "b": "", "B": ""}  # replacements of escapes that match a position


def fault(schema: dict[str, Any]) -> str:
    """Return what the engine of grammars finds wrong with a JSON schema; "" if nothing."""
    text = json.dumps(schema)
    return _known_fault(text) if len(text) < MAX_KEPT else _fault(text)


@lru_cache(maxsize=1024)
def _known_fault(schema: str) -> str:
    return _fault(schema)


def _fault(schema: str) -> str:
    from llguidance import LLMatcher

    found = LLMatcher.validate_grammar(f"start: %json {schema}").strip().split("\n   1 |")[0]
    return re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", found)


def expressible(pattern: str) -> tuple[str | None, bool]:
    """Return a pattern that the engine can express, and whether it matches the same texts as this one.

    If not, it matches more texts: conditions at a position, such as look-ahead and `\\b`, are left out. It is None if
    the engine cannot express it without these either.
    """
    if not fault({"type": "string", "pattern": pattern}):
        return pattern, True
    relaxed = without_conditions(pattern)
    exact = relaxed == re.sub(r"\\[AZz]", lambda found: ANCHORS[found[0][1]], pattern)
    return (relaxed, exact) if not fault({"type": "string", "pattern": relaxed}) else (None, False)


def without_conditions(pattern: str) -> str:
    """Return the pattern without look-around and word boundaries, and with `^` and `$` for the ends of the text."""
    found, at = "", 0
    while at < len(pattern):
        end = _atom_end(pattern, at)
        atom = pattern[at:end]
        if atom[0] == "\\" and atom[1:] in ANCHORS:
            atom = ANCHORS[atom[1:]]
        elif pattern.startswith(LOOK_AROUND, at):
            end = _group_end(pattern, at)
            repeated = QUANTIFIER.match(pattern, end)
            atom, end = "", repeated.end() if repeated else end
        found, at = found + atom, end
    return found


def _atom_end(pattern: str, at: int) -> int:
    """Return where the escape, the class or the character at this index ends."""
    if pattern[at] == "\\":
        return at + 2
    if pattern[at] != "[":
        return at + 1
    at += 2 if pattern.startswith("[^", at) else 1
    at += pattern.startswith("]", at)  # the first one is a member
    while at < len(pattern) and pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return at + 1


def _group_end(pattern: str, at: int) -> int:
    """Return where the group that begins at this index ends."""
    depth = 0
    while at < len(pattern):
        depth += {"(": 1, ")": -1}.get(pattern[at], 0)
        at = _atom_end(pattern, at)
        if depth == 0:
            break
    return at
