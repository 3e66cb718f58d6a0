"""JSON schemas as grammars: parts that hold together, closed objects, patterns and formats that pydantic takes."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import tiny

from cards_integrations.chat.grammar import Grammar, GrammarTokenizer
from cards_integrations.chat.patterns import expressible
from cards_integrations.chat.response_format import as_response_format
from cards_integrations.chat.schema import held_schema
from cards_integrations.errors import ModelError, SettingsError

DIGIT, WORD = {"type": "integer", "minimum": 0, "maximum": 9}, {"type": "string", "maxLength": 5}
BASE = {"type": "object", "properties": {"id": DIGIT}, "required": ["id"]}
CAR = {"properties": {"wheels": DIGIT}, "required": ["wheels"]}
BOAT = {"properties": {"sails": DIGIT}, "required": ["sails"]}


@pytest.fixture(scope="module")
def grammars() -> GrammarTokenizer:
    tokenizer = tiny.byte_pairs()
    return GrammarTokenizer(tokenizer, len(tokenizer), {tokenizer.eos_token_id})


def takes(grammars: GrammarTokenizer, schema: dict[str, Any], value: Any) -> bool:
    matcher = grammars.matcher(Grammar.json_schema(schema))
    try:
        for token in grammars.tokenizer.tokenize_str(json.dumps(value, ensure_ascii=False)):
            matcher.take(token)
    except ModelError:
        return False
    return matcher.complete or bool(grammars.allowed([matcher])[0][grammars.eos[0]])


TOGETHER: dict[str, tuple[dict[str, Any], list[Any], list[Any]]] = {
    "a base and variants": (
        {**BASE, "anyOf": [CAR, BOAT]},
        [{"id": 1, "wheels": 4}, {"id": 1, "sails": 2}],
        [{"id": 1}, {"wheels": 4}, {"id": 1, "wheels": 4, "more": 1}],
    ),
    "two unions": (
        {"type": "object", "anyOf": [CAR, BOAT], "oneOf": [BASE, {"properties": {"name": WORD}, "required": ["name"]}]},
        [{"wheels": 4, "id": 1}, {"sails": 2, "name": "x"}],
        [{"wheels": 4}, {"sails": 2, "wheels": 1, "name": "x"}],
    ),
    "a class and its base": (
        {"$defs": {"Base": BASE}, "allOf": [{"$ref": "#/$defs/Base"}, {"type": "object", **CAR}]},
        [{"id": 1, "wheels": 4}],
        [{"id": 1}, {"id": 1, "wheels": 4, "x": 1}],
    ),
    "a reference beside properties": (
        {"$defs": {"Base": BASE}, "$ref": "#/$defs/Base", "properties": {"n": DIGIT}, "required": ["n"]},
        [{"id": 1, "n": 2}],
        [{"id": 1}, {"n": 1}],
    ),
    "variants of an open object": (
        {**BASE, "additionalProperties": {"type": "boolean"}, "anyOf": [CAR, {}]},
        [{"id": 1, "x": True}],
        [{"id": 1, "x": 2}],
    ),
    "one property in several parts": (
        {"type": "object", "properties": {"a": {"type": "integer"}}, "allOf": [{"properties": {"a": {"maximum": 3}}}],
         "required": ["a"]},
        [{"a": 3}, {"a": -1}],
        [{"a": 4}, {"a": "x"}],
    ),
    "nested parts": (
        {"type": "object", "required": ["a"], "properties": {"a": BASE}, "allOf": [{"properties": {"a": CAR}}]},
        [{"a": {"id": 1, "wheels": 2}}],
        [{"a": {"id": 1}}],
    ),
    "a recursion of two parts": (
        {"$defs": {"Node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}, "allOf": [
            {"properties": {"v": DIGIT}, "required": ["v"]}]}}, "$ref": "#/$defs/Node"},
        [{"v": 1}, {"next": {"next": {"v": 3}, "v": 2}, "v": 1}],
        [{"next": {"v": 1}}],
    ),
    "a reference to the whole": (
        {**BASE, "properties": {"id": DIGIT, "c": {"type": "array", "items": {"$ref": "#"}}}},
        [{"id": 1, "c": [{"id": 2, "c": []}]}],
        [{"id": 1, "c": [{}]}],
    ),
    "a required name that nothing describes": (
        {"type": "object", "properties": {"a": DIGIT, "b": DIGIT}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        [{"a": 1}, {"b": 1}, {"a": 1, "b": 1}],
        [{}],
    ),
    "a dependency": (
        {"type": "object", "properties": {"a": DIGIT, "b": DIGIT}, "dependentRequired": {"a": ["b"]}},
        [{}, {"b": 1}, {"a": 1, "b": 1}],
        [{"a": 1}],
    ),
    "a condition": (
        {"type": "object", "properties": {"a": DIGIT}, "if": {"required": ["a"]}, "then": CAR, "else": BOAT},
        [{"a": 1, "wheels": 2}, {"sails": 2}],
        [{}],
    ),
    "open by unevaluatedProperties": ({**BASE, "unevaluatedProperties": True}, [{"id": 1, "x": [2]}], [{"x": 1}]),
    "names by an enumeration": (
        {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": DIGIT},
        [{}, {"a": 1}, {"a": 1, "b": 2}],
        [{"c": 1}, {"a": "x"}],
    ),
    "names by a reference": (
        {"$defs": {"K": {"enum": ["a"]}}, "type": "object", "propertyNames": {"$ref": "#/$defs/K"}},
        [{"a": [1]}],
        [{"b": 1}],
    ),
    "names by length": ({"type": "object", "propertyNames": {"minLength": 2}}, [{"ab": 1}], [{"a": 1}]),
    "names by format": (
        {"type": "object", "propertyNames": {"format": "date"}, "additionalProperties": DIGIT},
        [{"2024-02-29": 1}],
        [{"2023-02-29": 1}, {"x": 1}],
    ),
    "names by a pattern": (
        {"type": "object", "patternProperties": {"^[a-z]+$": DIGIT}},
        [{"ab": 1}],
        [{"A": 1}, {"ab": "x"}],
    ),
    "patterns beside properties": (
        {"type": "object", "properties": {"a1": WORD}, "patternProperties": {"^b": DIGIT, "^c": WORD}},
        [{"a1": "x", "b": 1, "c": "y"}],
        [{"d": 1}, {"b": "x"}],
    ),
    "patterns that overlap": (
        {"type": "object", "patternProperties": {"^a": DIGIT, "b$": WORD}},
        [{"a": 1}, {"xb": "y"}],
        [{"a": [1]}],
    ),
    "tuples of older drafts": (
        {"type": "array", "items": [DIGIT, WORD], "additionalItems": False},
        [[1, "x"]],
        [["x", 1], [1, "x", 2]],
    ),
    "integers in several parts": ({"type": "number", "allOf": [{"type": "integer"}], "minimum": 2.5}, [3], [2, 3.5]),
    "a set of an enumeration": (
        {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True},
        [[1, 2]],
        [[1, 2, 1]],
    ),
    "64 bits": ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, [0, -(2**62), 2**62], [2**64]),
    "a bound that no float has": ({"type": "integer", "exclusiveMinimum": 2**60}, [2**61], [2**60]),
    "no items but the first": (
        {"type": "array", "prefixItems": [DIGIT], "unevaluatedItems": False},
        [[1], []],
        [[1, 2]],
    ),
    "excluded bounds by a flag": (
        {"type": "integer", "minimum": 0, "exclusiveMinimum": True, "maximum": 5, "exclusiveMaximum": False},
        [1, 5],
        [0, 6],
    ),
    "no length that matters": ({"type": "string", "maxLength": 2**53 - 1, "minLength": 1}, ["x"], [""]),
    "lengths that are written as floats": (
        {"type": "array", "items": {"type": "string", "maxLength": 2.0}, "maxItems": 1.0},
        [["ab"], []],
        [["abc"], ["a", "b"]],
    ),
    "null by a flag": (
        {"$defs": {"Base": {**BASE, "nullable": True}}, "type": "object", "nullable": True, "required": ["a", "b", "c"],
         "properties": {"a": {**WORD, "nullable": True}, "b": {"enum": ["x"], "nullable": True},
                        "c": {"$ref": "#/$defs/Base"}, "d": {**DIGIT, "nullable": False}}},
        [{"a": None, "b": None, "c": None}, {"a": "w", "b": "x", "c": {"id": 1}, "d": 1}],
        [None, {"a": 1, "b": None, "c": None}, {"a": None, "b": None, "c": None, "d": None}],
    ),
    "bounds within a whole number": (
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5},
        [0.25, 0.0001, 0.49],
        [0, 0.5, 1],
    ),
    "bounds below a whole number": ({"type": "number", "minimum": 1.5, "exclusiveMaximum": 2}, [1.5, 1.75], [2, 1.25]),
    "a bound of several decimals": (
        {"type": ["number", "null"], "minimum": -0.95, "maximum": 2.125},
        [None, -0.9, -0.95, 0, 2, 2.1, 2.12, 2.125, 2.124],
        [2.13, 2.126, -0.96, "2.1", 2.2],
    ),
    "an excluded bound of several decimals": (
        {"type": "number", "exclusiveMinimum": 0.25, "exclusiveMaximum": 0.99},
        [0.9, 0.98, 0.26, 0.3],
        [0.99, 0.2, 0.25, 1],
    ),
    "a literal of parts": ({"allOf": [{"enum": ["a", "b"]}, {"enum": ["b", "c"]}]}, ["b"], ["a", "c"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TOGETHER)
def test_what_holds_together_is_merged(grammars: GrammarTokenizer, name: str) -> None:
    schema, right, wrong = TOGETHER[name]
    assert [value for value in right if not takes(grammars, schema, value)] == []
    assert [value for value in wrong if takes(grammars, schema, value)] == []


STRINGS = {
    "date": (["2024-02-29", "2000-02-29", "0001-01-01"], ["2023-02-29", "1900-02-29", "0000-01-01", "2024-04-31"]),
    "time": (["23:59:59", "10:00:00.123Z", "10:00:00+02:00"], ["24:00:00", "10:00:60"]),
    "date-time": (["2024-01-01T10:00:00", "2024-02-29T10:00:00Z"], ["2024-05-05T10:10:60Z", "2023-02-29T10:00:00Z"]),
    "uuid": (["3f2b8c1e-8d5a-4a39-9b57-0d6f5b1f2a10"], ["3f2b8c1e"]),
    "uuid4": (["3f2b8c1e-8d5a-4a39-9b57-0d6f5b1f2a10"], ["3f2b8c1e-8d5a-1a39-9b57-0d6f5b1f2a10"]),
    "ipv4network": (["10.0.0.0/8", "1.2.3.4", "192.168.4.0/22"], ["10.0.0.1/8", "192.168.1.0/22"]),
    "ipv6network": (["fe80::/10", "2001:db8::/32", "::1/128"], ["fe90::/9", "2001:db8::1/32"]),
    "ipvanyaddress": (["10.0.0.1", "::1", "1:2:3:4:5:6:7:8"], ["10.0.0.256", "1:2"]),
    "uri": (["https://example.org/a?b=c#d", "mailto:a@b.cd", "file:///etc/hosts"], ["example.org", "http://"]),
    "email": (["a.b@example.org"], ["a@b", "@example.org"]),
    "duration": (["P1DT2H", "PT1.5S", "P2W"], ["P", "PT", "1D"]),
    "base64": (["YWJj", "YQ==", ""], ["YWJ", "YR=="]),
    "path": (["notes.txt", "/a b"], []),
    "widget": (["anything"], []),
}


@pytest.mark.parametrize("name", STRINGS)
def test_formats_are_what_python_takes(grammars: GrammarTokenizer, name: str) -> None:
    right, wrong = STRINGS[name]
    assert [text for text in right if not takes(grammars, {"type": "string", "format": name}, text)] == []
    assert [text for text in wrong if takes(grammars, {"type": "string", "format": name}, text)] == []


@pytest.mark.parametrize(
    ("pattern", "known", "exact"),
    [
        ("^[a-z]+$", "^[a-z]+$", True),
        (r"^\bab\b$", "^ab$", False),
        (r"^(?=a[(]b)(?!c(d))[^]e]+(?<!f)$", "^[^]e]+$", False),
        (r"\Aab\Z", "^ab$", True),
        (r"^[\b(?=]+$", None, False),  # within a class they are members, and one that the engine does not know
        (r"(a)\1", None, False),
    ],
)
def test_patterns_without_conditions(pattern: str, known: str | None, exact: bool) -> None:
    assert expressible(pattern) == (known, exact)


@pytest.mark.parametrize(
    ("schema", "left"),
    [
        ({"pattern": r"^a\b"}, "pattern"),
        ({"format": "widget"}, "format 'widget'"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "number", "multipleOf": 123456789}, "multipleOf=123456789"),
        ({"not": {"const": 1}}, "not"),
        ({"type": "array", "contains": {"const": 1}}, "contains"),
        ({"type": "object", "properties": {"b": {}, "c": {}}, "minProperties": 2}, "number of properties"),
        ({"type": "number", "minimum": -1e300}, "bounds"),
    ],
)
def test_what_is_left_to_validation_is_noted_with_its_field(
    caplog: pytest.LogCaptureFixture, schema: dict[str, Any], left: str
) -> None:
    whole = {"type": "object", "properties": {"a": schema}, "title": left}
    [note] = held_schema(whole).notes
    assert note.startswith("field 'a': ")
    assert left in note
    with caplog.at_level(logging.INFO, "cards_integrations"):
        Grammar.json_schema(whole)
    assert note in caplog.text


ENDLESS = {"type": "object", "properties": {"next": {"$ref": "#/$defs/A"}}, "required": ["next"]}
ENDLESS_LIST = {"type": "array", "items": {"$ref": "#/$defs/A"}, "minItems": 1}


@pytest.mark.parametrize("endless", [ENDLESS, ENDLESS_LIST])
def test_what_would_contain_itself_without_end(grammars: GrammarTokenizer, endless: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="another one without end"):
        Grammar.json_schema({"$defs": {"A": endless}, "$ref": "#/$defs/A"})
    optional = {"$defs": {"A": endless}, "type": "object", "properties": {"a": {"$ref": "#/$defs/A"}, "b": DIGIT}}
    assert takes(grammars, optional, {"b": 1})
    either = {"$defs": {"A": {"anyOf": [endless, {"type": "null"}]}}, "$ref": "#/$defs/A"}
    assert takes(grammars, either, None)
    assert takes(grammars, either, {"next": {"next": None}} if endless is ENDLESS else [[None]])


def test_too_many_alternatives_leave_an_object_open(grammars: GrammarTokenizer) -> None:
    unions = [
        {"anyOf": [{"properties": {f"{name}{i}": DIGIT}, "required": [f"{name}{i}"]} for i in range(9)]}
        for name in "abc"
    ]
    schema = {"type": "object", "allOf": unions}
    assert takes(grammars, schema, {"a0": 1, "b0": 1, "c0": 1})
    assert not takes(grammars, schema, {"a0": 1})


SCHEMA = {"type": "object", "properties": {"team": WORD}, "required": ["team"]}


@pytest.mark.parametrize(
    "value",
    [
        {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}},
        {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True},
        {"type": "json_schema", "schema": SCHEMA},
        {"type": "json_object", "schema": SCHEMA},
        SCHEMA,
    ],
)
def test_forms_of_a_response_format(value: dict[str, Any]) -> None:
    found = as_response_format(value)
    assert found is not None
    assert found.schema == SCHEMA


@pytest.mark.parametrize("value", [{"type": "json_object"}, {"type": "json_object", "schema": None}])
def test_any_object(value: dict[str, Any]) -> None:
    assert as_response_format(value).schema is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "value",
    [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "a"}},
        {"type": "json_object", "value": SCHEMA},
        {"type": "json_object", "schema": 3},
        {"type": "json_schema", "json_schema": SCHEMA},
    ],
)
def test_a_form_without_its_schema_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="response_format"):
        as_response_format(value)
