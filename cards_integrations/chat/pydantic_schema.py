"""JSON schemas of pydantic classes that say more precisely than pydantic's own what the class accepts."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ByteSize
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from cards_integrations.errors import SettingsError

WHOLE = "^-?(?:0|[1-9][0-9]{0,300})$"
NATURAL = "^(?:0|[1-9][0-9]{0,300})$"
POSITIVE = "^[1-9][0-9]{0,300}$"
NEGATIVE = "^-[1-9][0-9]{0,300}$"
MAX_NAMES = 200  # integer keys that a schema lists; more of them get a pattern
MAX_PLACES = 8  # digits after the point of a decimal with bounded digits
TEXT_KEYS = {  # patterns of the keys of a mapping, by their type
    "float": r"^-?(?:0|[1-9][0-9]{0,300})(?:\.[0-9]{1,300})?$",
    "decimal": r"^-?[0-9]{1,20}(?:\.[0-9]{1,20})?$",
    "bool": "^(?:true|false)$",
}
COMPLEX = r"^-?[0-9]{1,30}(?:\.[0-9]{1,30})?(?:[+-][0-9]{1,30}(?:\.[0-9]{1,30})?j)?$"
BYTE_SIZE = r"^[0-9]{1,12}(?:\.[0-9]{1,3})? ?(?:[kKMGTPE]i?)?[bB]$|^[0-9]{1,18}$"


def pydantic_schema(cls: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of a pydantic class; its own if the class overrides how it is made.

    Raises:
        SettingsError: A field of the class, such as a function, has no JSON.
    """
    try:
        return cls.model_json_schema(schema_generator=PreciseJsonSchema)
    except PydanticInvalidForJsonSchema as error:
        raise SettingsError(
            f"{cls.__name__} has a field without a JSON schema, which no answer can fill in; leave it out, or give it "
            f"another type: {error.message}."
        ) from error
    except TypeError:  # a method of its own that takes no generator
        return cls.model_json_schema()


def is_more_precise(cls: type[BaseModel]) -> bool:
    """True if `pydantic_schema` says more than pydantic's own schema of a class."""
    return pydantic_schema(cls) != cls.model_json_schema()


class PreciseJsonSchema(GenerateJsonSchema):
    """Adds patterns and bounds for what pydantic checks but does not write into the schema."""

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default", "skipped-discriminator"}  # noqa: RUF012

    def model_field_schema(self, schema: Any) -> JsonSchemaValue:
        paths = schema.get("validation_alias")
        by_name = self._config.populate_by_name or self._config.validate_by_name
        if isinstance(paths, list) and not by_name and all(len(path) > 1 for path in paths):
            raise SettingsError(
                f"A field is read from {paths[0]} by AliasPath, which pydantic's JSON schema does not say: give it a "
                "plain alias, or populate_by_name=True."
            )
        return super().model_field_schema(schema)

    def datetime_schema(self, schema: Any) -> JsonSchemaValue:
        return _with_zone(super().datetime_schema(schema), schema)

    def time_schema(self, schema: Any) -> JsonSchemaValue:
        return _with_zone(super().time_schema(schema), schema)

    def str_schema(self, schema: Any) -> JsonSchemaValue:
        found = super().str_schema(schema)
        if schema.get("strip_whitespace") and schema.get("min_length"):
            return _also(found, r"^\S(?:[\s\S]*\S)?$")
        return found

    def bytes_schema(self, schema: Any) -> JsonSchemaValue:
        found = super().bytes_schema(schema)
        kind = self._config.val_json_bytes if hasattr(self._config, "val_json_bytes") else "utf8"
        if kind == "base64":
            return {"type": "string", "format": "base64url"}
        if kind == "hex":
            return {"type": "string", "pattern": "^(?:[0-9a-f]{2})*$"}
        return _also(found, "^[\x00-\x7f]*$") if "max_length" in schema else found  # of bytes, not characters

    def decimal_schema(self, schema: Any) -> JsonSchemaValue:
        bounds = _bounds(schema)
        shapes = _digits(schema.get("max_digits"), schema.get("decimal_places"))
        found = [_number(whole, places, bounds, schema.get("multiple_of")) for whole, places in shapes]
        if not bounds and "multiple_of" not in schema:
            found += [{"type": "string", "pattern": _digits_pattern(whole, places)} for whole, places in shapes]
        return found[0] if len(found) == 1 else {"anyOf": found}

    def complex_schema(self, schema: Any) -> JsonSchemaValue:
        return {"type": "string", "pattern": COMPLEX}

    def url_schema(self, schema: Any) -> JsonSchemaValue:
        return _with_schemes(super().url_schema(schema), schema)

    def multi_host_url_schema(self, schema: Any) -> JsonSchemaValue:
        return _with_schemes(super().multi_host_url_schema(schema), schema)

    def dict_schema(self, schema: Any) -> JsonSchemaValue:
        return _with_names(super().dict_schema(schema), schema)

    def ordered_dict_schema(self, schema: Any) -> JsonSchemaValue:
        return _with_names(super().ordered_dict_schema(schema), schema)

    def counter_schema(self, schema: Any) -> JsonSchemaValue:
        return _with_names(super().counter_schema(schema), schema)

    def function_after_schema(self, schema: Any) -> JsonSchemaValue:
        if getattr(schema["function"]["function"], "__func__", None) is ByteSize._validate.__func__:  # type: ignore[attr-defined]
            return {"anyOf": [{"type": "string", "pattern": BYTE_SIZE}, {"type": "integer", "minimum": 0}]}
        return super().function_after_schema(schema)


def _also(found: JsonSchemaValue, pattern: str) -> JsonSchemaValue:
    """Return a schema with one more pattern that has to match."""
    return {**found, "allOf": [{"pattern": pattern}]} if "pattern" in found else {**found, "pattern": pattern}


def _with_zone(found: JsonSchemaValue, schema: Any) -> JsonSchemaValue:
    """Return the schema of a time with its constraint: it must have a zone, or must not have one."""
    match schema.get("tz_constraint"):
        case "naive":
            return {**found, "pattern": "(?:^|[Tt])[0-9:.]+$"}
        case "aware":
            return {**found, "pattern": "(?:[Zz]|[+-][0-9:]+)$"}
    return found


def _with_schemes(found: JsonSchemaValue, schema: Any) -> JsonSchemaValue:
    schemes = schema.get("allowed_schemes")
    return {**found, "pattern": f"^(?:{'|'.join(schemes).replace('+', r'[+]')}):"} if schemes else found


def _with_names(found: JsonSchemaValue, schema: Any) -> JsonSchemaValue:
    """Return the schema of a mapping with the form of its keys as text."""
    names = _names(schema.get("keys_schema", {}))
    return found if names is None else {**found, "propertyNames": names}


def _names(schema: Any) -> JsonSchemaValue | None:
    """Return the schema of keys as text; None if pydantic's own schema has it."""
    match schema.get("type"):
        case "literal":
            return {"enum": [each for each in schema["expected"] if isinstance(each, str)]}
        case "enum":
            values = [member.value for member in schema["members"]]
            read = (str, {"int": int, "float": float}.get(schema.get("sub_type"), str))
            return {"enum": [str(value) for value in values if isinstance(value, read)]}
        case "int":
            return _whole_names(schema)
        case "nullable":
            return _names(schema["schema"])
        case "union":
            choices = [_names(each[0] if isinstance(each, tuple) else each) for each in schema["choices"]]
            return None if None in choices else {"anyOf": choices}
        case "tuple" | "list":
            return {"enum": []}  # JSON has no such keys
    pattern = TEXT_KEYS.get(schema.get("type"))
    return None if pattern is None else {"pattern": pattern}


def _whole_names(schema: Any) -> JsonSchemaValue:
    """Return the schema of integers as text: a list of them if they are few, else a pattern that fixes their sign."""
    low = max(schema.get("ge", -math.inf), schema.get("gt", -math.inf) + 1)
    high = min(schema.get("le", math.inf), schema.get("lt", math.inf) - 1)
    if high - low < MAX_NAMES:
        return {"enum": [str(value) for value in range(low, high + 1)]}
    return {"pattern": POSITIVE if low > 0 else NEGATIVE if high < 0 else NATURAL if low == 0 else WHOLE}


def _digits(digits: int | None, places: int | None) -> list[tuple[int, int | None]]:
    """Return how many digits a decimal may have before and after its point: pairs, one of which has to fit."""
    if digits is None:
        return [(15, places)]
    if places is not None:
        return [(digits - places, places)]
    return [(digits - each, each) for each in range(min(digits, MAX_PLACES) + 1)]


def _number(whole: int, places: int | None, bounds: JsonSchemaValue, multiple_of: Any) -> JsonSchemaValue:
    """Return the schema of a number with at most so many digits before and after its point."""
    found: JsonSchemaValue = {"type": "integer" if places == 0 else "number"}
    found |= {"exclusiveMinimum": -(10**whole), "exclusiveMaximum": 10**whole, **bounds}  # so it has no exponent
    if multiple_of is not None or places:
        found["multipleOf"] = float(f"1e-{places}" if multiple_of is None else multiple_of)
    return found


def _digits_pattern(whole: int, places: int | None) -> str:
    """Return the pattern of a decimal as text, with at most so many digits before and after its point."""
    before = f"(?:0|[1-9][0-9]{{0,{whole - 1}}})" if whole else "0"
    after = "" if places == 0 else rf"(?:\.[0-9]{{1,{places or 20}}})" + ("?" if whole else "")
    return f"^-?{before}{after}$"


def _bounds(schema: Any) -> JsonSchemaValue:
    names = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
    return {names[key]: float(schema[key]) for key in names if key in schema}
