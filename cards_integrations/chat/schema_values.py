"""Merges the keywords of JSON schemas for single values: types, literals, strings, numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import ROUND_DOWN, Decimal
from typing import Any

from cards_integrations.chat.formats import FREE, format_pattern
from cards_integrations.chat.patterns import expressible, fault
from cards_integrations.errors import SettingsError, short_repr

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
KEYWORDS = {
    "type", "enum", "const", "properties", "patternProperties", "additionalProperties", "unevaluatedProperties",
    "propertyNames", "required", "minProperties", "maxProperties", "prefixItems", "items", "additionalItems",
    "unevaluatedItems", "minItems", "maxItems", "uniqueItems", "minLength", "maxLength", "pattern", "format", "minimum",
    "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
}  # fmt: skip
MAX_MULTIPLE = 10**5  # of `multipleOf`; for larger numbers llguidance's automaton takes seconds, or hours
MAX_INTEGER = 2**63 - 1024  # the engine keeps bounds both as 64-bit floats and as 64-bit integers
LONG_INTEGER = 10**17  # the engine needs both bounds of an integer beyond it
LONGEST = 2**31  # characters, items or properties; the engine counts to 2**32
EXACT_INTEGER = 2**53  # up to which a 64-bit float holds all integers
LITTLE = 1e-9  # share of the distance between two bounds by which an excluded one moves
BOUNDS = (("minimum", max), ("exclusiveMinimum", max), ("maximum", min), ("exclusiveMaximum", min))

Note = Callable[[str, str], None]
"""Notes what is left to validation, given the path of the field and a description."""


def located(path: str) -> str:
    """Return the beginning of a message about the field at this path."""
    return f"field {path!r}: " if path else ""


def distinct(values: Iterable[Any]) -> list[Any]:
    """Return the values without duplicates, by their JSON, in the order of their last occurrences."""
    return list({json.dumps(value, sort_keys=True): value for value in reversed(list(values))}.values())[::-1]


def types(flat: Sequence[Mapping[str, Any]], path: str) -> list[str] | None:
    """Return the types that all parts allow; None if no part has a type."""
    found: list[str] | None = None
    for part in flat:
        if "type" in part:
            given = part["type"] if isinstance(part["type"], list) else [part["type"]]
            for each in given:
                if each not in TYPES:
                    raise SettingsError(f"{located(path)}type={short_repr(each)} is not one of {', '.join(TYPES)}.")
            found = given if found is None else _common(found, given)
    return found if found is None or "number" not in found else [each for each in found if each != "integer"]


def _common(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """Return the types that both lists allow; an integer is a number, too."""
    whole = [each for each in ("integer",) if {"integer", "number"} & {*one} and {"integer", "number"} & {*other}]
    both = [each for each in one if each in other]
    return both if "number" in both else [*both, *(each for each in whole if each not in both)]


def literals(flat: Sequence[Mapping[str, Any]], path: str) -> list[Any] | None:
    """Return the values that all parts allow; None if no part lists values."""
    found: dict[str, Any] | None = None
    lists = [part["enum"] for part in flat if "enum" in part] + [[part["const"]] for part in flat if "const" in part]
    for values in lists:
        if not isinstance(values, list):
            raise SettingsError(f"{located(path)}enum={short_repr(values)} is not a list.")
        given = {json.dumps(value, sort_keys=True): value for value in values}
        found = given if found is None else {key: value for key, value in found.items() if key in given}
    return None if found is None else list(found.values())


# --- strings ---


def strings(flat: Sequence[Mapping[str, Any]], path: str, note: Note) -> dict[str, Any]:
    """Merge the lengths, patterns and formats of strings, as far as the engine can express them."""
    found = counts(flat, path, ("minLength", max), ("maxLength", min))
    patterns = [*_patterns(flat, path, note), *_formats(flat, path, note)]
    if patterns:
        found["pattern"] = patterns[0]
    if len(patterns) > 1:
        found["allOf"] = [{"pattern": pattern} for pattern in patterns[1:]]
    return found


def _patterns(flat: Sequence[Mapping[str, Any]], path: str, note: Note) -> Iterable[str]:
    for pattern in dict.fromkeys(part["pattern"] for part in flat if "pattern" in part):
        if not isinstance(pattern, str):
            raise SettingsError(f"{located(path)}pattern={short_repr(pattern)} is not a text.")
        known, exact = expressible(pattern)
        if not exact:
            note(path, f"the pattern {pattern!r}")
        if known is not None:
            yield known


def _formats(flat: Sequence[Mapping[str, Any]], path: str, note: Note) -> Iterable[str]:
    for name in dict.fromkeys(part["format"] for part in flat if isinstance(part.get("format"), str)):
        pattern = format_pattern(name)
        if pattern is not None:
            yield pattern
        elif name not in FREE:
            note(path, f"the format {name!r}")


# --- numbers ---


def numbers(flat: Sequence[Mapping[str, Any]], path: str, whole: bool, note: Note) -> dict[str, Any]:
    """Merge the bounds and multiples of numbers, as far as the engine can express them.

    Args:
        flat: The parts.
        path: The path of the field.
        whole: True if only integers are allowed.
        note: Takes what is left to validation.
    """
    found = _whole_bounds(flat, path) if whole else _open_bounds(bounds(flat, path, *BOUNDS))
    problem = fault({"type": "integer" if whole else "number", **found})
    if problem and "nsatisfiable" not in problem:
        note(path, "the bounds of the number")
        found = {}
    multiples = distinct(part["multipleOf"] for part in flat if _number(part, "multipleOf", path) is not None)
    if not multiples:
        return found
    too_long = math.lcm(*(_significant(each) or 1 for each in multiples)) > MAX_MULTIPLE
    if too_long or any(fault({"type": "number", "multipleOf": each}) for each in multiples):
        note(path, f"multipleOf={short_repr(multiples[0])}")
        return found
    first, *others = multiples
    return {**found, "multipleOf": first, **({"allOf": [{"multipleOf": each} for each in others]} if others else {})}


def _number(part: Mapping[str, Any], key: str, path: str) -> int | float | None:
    value = part.get(key)
    if value is None or (type(value) in (int, float) and math.isfinite(value)):
        return value
    raise SettingsError(f"{located(path)}{key}={short_repr(value)} is not a number.")


def bounds(flat: Sequence[Mapping[str, Any]], path: str, *choices: tuple[str, Callable[..., Any]]) -> dict[str, Any]:
    """Return the narrowest of each bound; `choices` are pairs of a keyword, and `max` or `min`."""
    found: dict[str, Any] = {}
    for key, choose in choices:
        values = [value for part in flat if (value := _number(part, key, path)) is not None]
        found |= {key: choose(values)} if values else {}
    return found


def counts(flat: Sequence[Mapping[str, Any]], path: str, *choices: tuple[str, Callable[..., Any]]) -> dict[str, Any]:
    """Return the narrowest of each bound of a length, without those above any length that is ever written."""
    found = {key: int(value) if value == int(value) else value for key, value in bounds(flat, path, *choices).items()}
    return {key: value for key, value in found.items() if not (key.startswith("max") and value > LONGEST)}


def _whole_bounds(flat: Sequence[Mapping[str, Any]], path: str) -> dict[str, Any]:
    """Return the bounds of integers as the first and the last one that are allowed and that a 64-bit float holds."""
    found: dict[str, Any] = {}
    given = bounds(flat, path, *BOUNDS)
    low = [math.ceil(given["minimum"])] if "minimum" in given else []
    low += [math.floor(given["exclusiveMinimum"]) + 1] if "exclusiveMinimum" in given else []
    high = [math.floor(given["maximum"])] if "maximum" in given else []
    high += [math.ceil(given["exclusiveMaximum"]) - 1] if "exclusiveMaximum" in given else []
    if low and max(low) > LONG_INTEGER:
        high.append(MAX_INTEGER)
    if high and min(high) < -LONG_INTEGER:
        low.append(-MAX_INTEGER)
    if low:
        found["minimum"] = max(_exact(max(low), 1), -MAX_INTEGER)
    if high:
        found["maximum"] = min(_exact(min(high), -1), MAX_INTEGER)
    return found


def _open_bounds(found: dict[str, Any]) -> dict[str, Any]:
    """Return bounds that the engine keeps: above 0 and below 0.5, it would allow 0, so the 0 moves up a little."""
    low = max(found.get("minimum", -math.inf), found.get("exclusiveMinimum", -math.inf))
    high = min(found.get("maximum", math.inf), found.get("exclusiveMaximum", math.inf))
    if not 0 < high - low < 1:
        return found
    little = (high - low) * LITTLE
    if low == found.get("exclusiveMinimum") == math.floor(low):
        found = {**found, "minimum": low + little}
    if high == found.get("exclusiveMaximum") == math.floor(high):
        found = {**found, "maximum": high - little}
    return found


def shorter_numbers(schema: Mapping[str, Any]) -> list[float]:
    """Return numbers within the bounds that the engine wrongly refuses: the beginnings of a bound, 0.9 of 0.99."""
    low, above = schema.get("minimum", -math.inf), schema.get("exclusiveMinimum", -math.inf)
    high, below = schema.get("maximum", math.inf), schema.get("exclusiveMaximum", math.inf)
    found: set[float] = set()
    for bound in (Decimal(repr(each)) for each in (low, above, high, below) if math.isfinite(each)):
        decimals = -int(bound.as_tuple().exponent)
        found |= {float(bound.quantize(Decimal(1).scaleb(-n), ROUND_DOWN)) for n in range(1, decimals)}
    return sorted(each for each in found if each and low <= each <= high and above < each < below)


def _exact(value: int, direction: int) -> int:
    """Return the nearest integer, upwards (1) or downwards (-1), that a 64-bit float holds."""
    if abs(value) <= EXACT_INTEGER or abs(value) > MAX_INTEGER:
        return value
    found = float(value)
    if (int(found) - value) * direction < 0:
        found = math.nextafter(found, math.inf * direction)
    return int(found)


def _significant(number: int | float) -> int:
    """Return the significant digits as one number: 1 for 1,000,000 and 0.01, 25 for 2.5, 0 for infinity and NaN."""
    try:
        digits = Decimal(str(number)).normalize().as_tuple().digits
    except ValueError:  # thousands of digits
        return MAX_MULTIPLE + 1
    return int("".join(map(str, digits)) or 0)
