"""JSON schemas in a form that a grammar can enforce.

Parts that apply together (`allOf`, `$ref` and `anyOf` beside other keywords) are merged, and only then is an object
closed against properties that no part names. What a grammar cannot enforce is left out and noted, for validation to
check.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from cards_integrations.chat.patterns import expressible, fault
from cards_integrations.chat.schema_values import (
    KEYWORDS,
    counts,
    distinct,
    literals,
    numbers,
    shorter_numbers,
    strings,
    types,
)
from cards_integrations.chat.schema_values import located as at
from cards_integrations.errors import SettingsError, short_repr

MAX_ALTERNATIVES = 128  # of one value: several anyOf beside each other multiply
LEFT_OUT = ("not", "contains", "uniqueItems", "$dynamicRef", "$recursiveRef")
CLOSING = ("properties", "patternProperties", "propertyNames")  # an object that names its keys has no others


@dataclass(frozen=True)
class HeldSchema:
    """A schema as a grammar enforces it."""

    schema: dict[str, Any]
    """The schema. All that it matches also matches the original one, except as the notes say."""

    notes: tuple[str, ...]
    """What is left to validation, each note with its field."""


def held_schema(schema: Mapping[str, Any]) -> HeldSchema:
    """Bring a JSON schema into a form that a grammar can enforce.

    Raises:
        SettingsError: It is not a schema, or nothing matches it; the message names the field.
    """
    merger = _Merger(schema)
    found = merger.merged([schema], "")
    whole = {"anyOf": []} if found is False else {} if found is True else dict(found)
    if merger.definitions:
        whole = _without_endless({**whole, "$defs": merger.definitions})
    if problem := fault(whole):
        raise SettingsError(_blamed(whole, problem))
    return HeldSchema(whole, tuple(dict.fromkeys(merger.notes)))


def is_recursive(schema: Mapping[str, Any]) -> bool:
    """True if a part of a JSON schema refers to itself, directly or through others."""
    parts = {"#": schema}
    for key in ("$defs", "definitions"):
        parts |= {f"#/{key}/{name}": part for name, part in schema.get(key, {}).items()}
    refers = {
        name: {each["$ref"] for each in _all_mappings(part) if isinstance(each.get("$ref"), str)}
        for name, part in parts.items()
    }
    for _ in parts:
        refers = {name: found.union(*(refers.get(each, ()) for each in found)) for name, found in refers.items()}
    return any(name in found for name, found in refers.items())


@dataclass
class _Parts:
    """The parts of a schema, all of which a value has to match."""

    flat: list[dict[str, Any]] = field(default_factory=list)
    """Schemas without references and alternatives."""
    choices: list[list[Any]] = field(default_factory=list)
    """Lists of alternatives, one of each of which has to match."""
    refs: list[str] = field(default_factory=list)
    """The references that led to these parts."""
    nothing: bool = False
    """True if one of the parts matches nothing."""


@dataclass
class _Merger:
    """Merges schemas that apply together. Those with a `$ref` among them become a definition, as they may be recursive.

    The `path` of a method is that of the field, for notes and errors.
    """

    root: Mapping[str, Any]
    """The whole schema, into which references point."""
    definitions: dict[str, Any] = field(default_factory=dict)
    """The definitions of the merged schema, by name."""
    notes: list[str] = field(default_factory=list)
    """What is left to validation."""
    names: dict[str, str] = field(default_factory=dict)
    """The name of the definition of some schemas together, by their JSON."""

    def merged(self, schemas: Iterable[Any], path: str) -> Any:
        """Return the schema of what matches all of these: a mapping, True (anything) or False (nothing)."""
        wanted, parts = distinct(schemas), _Parts()
        for each in wanted:
            self._unfold(each, parts, path)
        parts.flat = distinct(parts.flat)
        if not parts.refs or parts.nothing:
            return self._one_of(parts, path)
        key = json.dumps(wanted)
        if key not in self.names:
            name = self.names[key] = f"d{len(self.names)}"
            self.definitions[name] = {}
            self.definitions[name] = self._one_of(parts, path)
        return {"$ref": f"#/$defs/{self.names[key]}"}

    # --- parts that apply together ---

    def _unfold(self, schema: Any, parts: _Parts, path: str) -> None:
        """Add a schema to the parts, its `$ref` and `allOf` resolved.

        Parts are in the order of the schema, which is that of the properties in an answer: its own keywords go where
        its `properties` are.
        """
        if isinstance(schema, bool):
            parts.nothing |= not schema
            return
        if not isinstance(schema, Mapping):
            raise SettingsError(f"{at(path)}{short_repr(schema)} is not a JSON schema: pass a mapping.")
        if path and schema.get("nullable") is True:  # as OpenAPI 3.0 writes it; all of an answer is never null
            parts.choices.append([{**schema, "nullable": False}, {"type": "null"}])
            return
        own = _excluded({key: value for key, value in schema.items() if key in KEYWORDS})
        place = "properties" if "properties" in own else next(iter(own), None)
        for key, value in schema.items():
            if key == place:
                parts.flat.append(own)
            elif key == "$ref" and value not in parts.refs:
                parts.refs.append(value)
                self._unfold(self._resolved(value, path), parts, path)
            elif key == "allOf":
                for each in _list(value, key, path):
                    self._unfold(each, parts, path)
            elif key in ("anyOf", "oneOf"):
                parts.choices.append(_list(value, key, path))
            elif key in ("dependentRequired", "dependentSchemas", "dependencies") and isinstance(value, Mapping):
                parts.choices += [_dependency(name, needs) for name, needs in value.items()]
            elif key == "if":
                parts.choices.append([{"allOf": [value, schema.get("then", True)]}, schema.get("else", True)])
                self.note(path, "that `else` is for what does not match `if`")
            if key in LEFT_OUT and value is not False:
                self.note(path, f"`{key}`")

    def _resolved(self, reference: Any, path: str) -> Any:
        """Return what a `$ref` points to."""
        found: Any = self.root
        try:
            start, *steps = unquote(reference).split("/")
            if start != "#":
                found = next(each for each in _all_mappings(found) if f"#{each.get('$anchor')}" == start)
            for step in steps:
                step = step.replace("~1", "/").replace("~0", "~")
                found = found[int(step)] if isinstance(found, list) else found[step]
        except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError):
            raise SettingsError(
                f"{at(path)}$ref={short_repr(reference)} points to nothing in the schema: define it."
            ) from None
        return found

    def _one_of(self, parts: _Parts, path: str) -> Any:
        """Merge the parts, once for each combination of their alternatives."""
        if parts.nothing:
            return False
        if not parts.choices:
            return self._all_of(parts.flat, path)
        flat, choices = parts.flat, parts.choices
        while math.prod(map(len, choices)) > MAX_ALTERNATIVES and len(choices) > 1:
            *choices, left_out = choices
            flat = [*flat, {"additionalProperties": True}]  # what was left out may name more of them
            self.note(path, f"{len(left_out)} alternatives beside many others")
        options = [self.merged([*flat, *chosen], path) for chosen in itertools.product(*choices)]
        options = distinct(option for option in options if option is not False)
        if len(options) < 2:
            return options[0] if options else False
        return True if True in options else {"anyOf": options}

    def _all_of(self, flat: Sequence[Mapping[str, Any]], path: str) -> Any:
        """Merge parts without references and alternatives into one schema."""
        found = types(flat, path)
        if found == [] or (values := literals(flat, path)) == []:
            return False
        merged: dict[str, Any] = {} if found is None else {"type": found[0] if len(found) == 1 else found}
        if found is None or "object" in found:
            merged |= self._objects(flat, path)
        if found is None or "array" in found:
            merged |= self._arrays(flat, path)
        merged |= strings(flat, path, self.note) if found is None or "string" in found else {}
        if found is None or {"number", "integer"} & {*found}:
            merged |= numbers(flat, path, found is not None and "number" not in found, self.note)
        if values is not None:
            return {**merged, "enum": values}
        refused = [] if "multipleOf" in merged else shorter_numbers(merged)
        return {"anyOf": [merged, {"enum": refused}]} if refused else merged or True

    def note(self, path: str, what: str) -> None:
        """Note what is left to validation."""
        self.notes.append(f"{at(path)}{what}")

    # --- objects ---

    def _objects(self, flat: Sequence[Mapping[str, Any]], path: str) -> dict[str, Any]:
        named = [{**each, **self._by_name(each, path)} for each in flat]
        patterns = dict.fromkeys(key for each in named for key in _mapping(each, "patternProperties", path))
        required = list(
            dict.fromkeys(name for each in flat for name in _list(each.get("required", []), "required", path))
        )
        names = dict.fromkeys(name for each in named for name in _mapping(each, "properties", path))
        others = [each["additionalProperties"] for each in named if "additionalProperties" in each]
        if not others and any(key in each for each in named for key in CLOSING):
            names |= dict.fromkeys(required)
            others = [each["unevaluatedProperties"] for each in flat if "unevaluatedProperties" in each] or [False]
        found: dict[str, Any] = {}
        if names:
            found["properties"] = {n: self.merged(_of_name(named, n), f"{path}.{n}".lstrip(".")) for n in names}
        if patterns:
            found["patternProperties"] = {p: self.merged(_of_pattern(named, p), f"{path}.{p}") for p in patterns}
        if others:
            found["additionalProperties"] = self.merged(others, f"{path}.*".lstrip("."))
        if required:
            found["required"] = required
        return self._counted(self._known_patterns(found, path), flat, path)

    def _by_name(self, schema: Mapping[str, Any], path: str) -> dict[str, Any]:
        """Return keywords that replace `propertyNames`: a property for each name, or one pattern of names."""
        if "propertyNames" not in schema:
            return {}
        keys = self._names(schema["propertyNames"], path)
        others = schema.get("additionalProperties", True)
        if keys is False:
            return {"additionalProperties": False}
        if "enum" in keys:
            known = _mapping(schema, "properties", path)
            names = [name for name in keys["enum"] if isinstance(name, str)]
            return {"properties": {name: known.get(name, others) for name in names}, "additionalProperties": False}
        pattern = _pattern_of(keys)
        if pattern is None or "allOf" in keys or ("pattern" in keys and {"minLength", "maxLength"} & keys.keys()):
            self.note(path, "`propertyNames`")
        if pattern is None:
            return {}
        patterns = {**_mapping(schema, "patternProperties", path), pattern: others}
        return {"patternProperties": patterns, "additionalProperties": False}

    def _names(self, schema: Any, path: str) -> Any:
        """Return the schema of names, a mapping or False, with its references resolved."""
        keys = self.merged([{"type": "string"}, schema], path)
        while isinstance(keys, dict) and "$ref" in keys:
            keys = self.definitions[keys["$ref"].rpartition("/")[2]]
        return keys

    def _known_patterns(self, found: dict[str, Any], path: str) -> dict[str, Any]:
        """Return an object with patterns of names that the engine can express and tell apart.

        If it cannot, any name may have a value of any of the patterns.
        """
        patterns: dict[str, Any] = {}
        for pattern, schema in found.get("patternProperties", {}).items():
            known, exact = expressible(pattern)
            if not exact:
                self.note(path, f"the pattern {pattern!r} of names")
            patterns[known if known is not None else ""] = schema
        if not patterns:
            return found
        distinguished = {"patternProperties": dict.fromkeys(patterns, True), "type": "object"}
        if "" not in patterns and not fault(distinguished):
            return {**found, "patternProperties": patterns}
        self.note(path, "the patterns of names")
        values = [*patterns.values(), found.get("additionalProperties", True)]
        return {**_without(found, "patternProperties"), "additionalProperties": self.merged([{"anyOf": values}], path)}

    def _counted(self, found: dict[str, Any], flat: Sequence[Mapping[str, Any]], path: str) -> dict[str, Any]:
        """Return an object with bounds on the number of its properties, if the engine can count them."""
        limits = counts(flat, path, ("minProperties", max), ("maxProperties", min))
        problem = fault({"type": "object", **_skeleton(found), **limits}) if limits else ""
        if not problem or "nsatisfiable" in problem:
            return {**found, **limits}
        self.note(path, "the number of properties")
        return found

    # --- arrays ---

    def _arrays(self, flat: Sequence[Mapping[str, Any]], path: str) -> dict[str, Any]:
        arrays = [_array(each, path) for each in flat]
        found: dict[str, Any] = counts(flat, path, ("minItems", max), ("maxItems", min))
        first = max((len(prefix) for prefix, _ in arrays), default=0)
        if first:
            found["prefixItems"] = [
                self.merged([p[i] if i < len(p) else rest for p, rest in arrays], f"{path}[{i}]") for i in range(first)
            ]
        if any(rest is not True for _, rest in arrays):
            found["items"] = self.merged([rest for _, rest in arrays], f"{path}[]")
        values = found.get("items", {}).get("enum") if isinstance(found.get("items"), dict) else None
        if values is not None and not first and any(each.get("uniqueItems") is True for each in flat):
            found["maxItems"] = min(found.get("maxItems", len(values)), len(values))
        return found


def _excluded(schema: dict[str, Any]) -> dict[str, Any]:
    """Return keywords with excluded bounds as numbers: draft 4 and OpenAPI 3.0 have a flag beside the bound."""
    for flag, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(schema.get(flag), bool) and schema.pop(flag) and bound in schema:
            schema[flag] = schema.pop(bound)
    return schema


def _dependency(name: str, needs: Any) -> list[Any]:
    """Return the alternatives of a property on which others depend: with all that it needs, or without it."""
    needed = {"required": needs} if isinstance(needs, list) else needs
    return [{"allOf": [{"required": [name]}, needed]}, {"properties": {name: False}}]


def _of_name(parts: Sequence[Mapping[str, Any]], name: str) -> Iterator[Any]:
    """Yield the schemas that the parts have for a property."""
    for part in parts:
        own = [part["properties"][name]] if name in part.get("properties", {}) else []
        own += [each for pattern, each in part.get("patternProperties", {}).items() if _matches(pattern, name)]
        yield from own or ([part["additionalProperties"]] if "additionalProperties" in part else [])


def _of_pattern(parts: Sequence[Mapping[str, Any]], pattern: str) -> Iterator[Any]:
    """Yield the schemas that the parts have for a pattern of names."""
    for part in parts:
        if pattern in part.get("patternProperties", {}):
            yield part["patternProperties"][pattern]
        elif "additionalProperties" in part:
            yield part["additionalProperties"]


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return False


def _pattern_of(keys: Mapping[str, Any]) -> str | None:
    """Return one pattern of names, given their schema; None if it has no condition that is a pattern."""
    if "pattern" in keys:
        return str(keys["pattern"])
    if "minLength" in keys or "maxLength" in keys:
        return f"^[\\s\\S]{{{keys.get('minLength', 0)},{keys.get('maxLength', '')}}}$"
    if "anyOf" in keys:
        options = [_pattern_of(each) for each in keys["anyOf"] if isinstance(each, Mapping)]
        return "|".join(f"(?:{each})" for each in options if each) if options and None not in options else None
    return "^(?:" + "|".join(map(re.escape, keys["enum"])) + ")$" if "enum" in keys else None


def _array(schema: Mapping[str, Any], path: str) -> tuple[list[Any], Any]:
    """Return the schemas of the first items, and that of all others."""
    items = schema.get("items", schema.get("unevaluatedItems", True))
    if isinstance(items, list):  # as drafts before 2020 write it
        return items, schema.get("additionalItems", True)
    return _list(schema.get("prefixItems", []), "prefixItems", path), items


def _skeleton(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object schema with the same keys, whose values may be anything."""
    shape = {key: value for key, value in found.items() if key in ("required", "type")}
    for key in ("properties", "patternProperties"):
        if key in found:
            shape[key] = {name: each is not False for name, each in found[key].items()}
    if "additionalProperties" in found:
        shape["additionalProperties"] = found["additionalProperties"] is not False
    return shape


def _mapping(schema: Mapping[str, Any], key: str, path: str) -> Mapping[str, Any]:
    found = schema.get(key, {})
    if not isinstance(found, Mapping):
        raise SettingsError(f"{at(path)}{key}={short_repr(found)} is not a mapping.")
    return found


def _list(value: Any, key: str, path: str) -> list[Any]:
    if not isinstance(value, list):
        raise SettingsError(f"{at(path)}{key}={short_repr(value)} is not a list.")
    return value


def _without(schema: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in schema.items() if name != key}


def _all_mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        yield value
    for each in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _all_mappings(each)


# --- definitions without a finite value ---


def _without_endless(whole: dict[str, Any]) -> dict[str, Any]:
    """Return the schema without definitions that no finite value matches, as each would contain another one.

    Raises:
        SettingsError: No finite value is left.
    """
    definitions: dict[str, Any] = whole["$defs"]
    ending: set[str] = set()
    while (found := {name for name, each in definitions.items() if _ends(each, ending)}) != ending:
        ending = found
    endless = {f"#/$defs/{name}" for name in definitions.keys() - ending}
    if endless and not _ends(whole, ending):
        raise SettingsError(
            "Unsatisfiable schema: each value would contain another one without end; let what refers to itself be null "
            "or left out."
        )
    return _without_references(whole, endless) if endless else whole


def _without_references(schema: Any, endless: set[str]) -> Any:
    """Return the schema in which nothing matches these references."""
    if isinstance(schema, list):
        return [_without_references(each, endless) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if isinstance(reference := schema.get("$ref"), str) and reference in endless:
        return {"anyOf": []}
    return {key: each if key == "enum" else _without_references(each, endless) for key, each in schema.items()}


def _ends(schema: Any, ending: set[str]) -> bool:
    """True if a finite value matches a schema, given the names of definitions that finite values match."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2] in ending
    if "anyOf" in schema:
        return any(_ends(each, ending) for each in schema["anyOf"])
    kinds = schema.get("type", "null")
    kinds = {kinds} if isinstance(kinds, str) else {*kinds}
    if "enum" in schema or kinds - {"object", "array"}:
        return True
    properties, items = schema.get("properties", {}), [*schema.get("prefixItems", []), schema.get("items", True)]
    needed = {
        "object": [properties.get(name, True) for name in schema.get("required", [])],
        "array": items[: schema.get("minItems", 0)],
    }
    return any(all(_ends(part, ending) for part in needed[kind]) for kind in kinds)


# --- the part of a schema that the engine refuses ---


def _blamed(whole: dict[str, Any], problem: str) -> str:
    """Return the message of an error, which names the field of the innermost part that is refused."""
    path, problem = _deepest(whole, whole.get("$defs", {}), "", problem, [])
    return f"{at(path)}{problem}"


def _deepest(schema: Any, definitions: dict[str, Any], path: str, problem: str, seen: list[str]) -> tuple[str, str]:
    """Return the path of the innermost part that is refused by itself, and why it is."""
    for step, each in _parts_of(schema, definitions, seen):
        found = fault({**each, "$defs": definitions}) if isinstance(each, dict) else ""
        if found:
            return _deepest(each, definitions, f"{path}{step}".lstrip("."), found, seen)
    return path, problem


def _parts_of(schema: Any, definitions: dict[str, Any], seen: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a schema, each with its step in a path; definitions that were seen are left out."""
    for name, each in schema.get("properties", {}).items():
        yield f".{name}", each
    for key, step in (("items", "[]"), ("additionalProperties", ".*")):
        yield step, schema.get(key)
    for each in schema.get("prefixItems", []):
        yield "[]", each
    for each in [*schema.get("anyOf", []), *schema.get("patternProperties", {}).values()]:
        yield "", each
    name = schema.get("$ref", "").rpartition("/")[2]
    if name and name not in seen:
        seen.append(name)
        yield "", definitions[name]
