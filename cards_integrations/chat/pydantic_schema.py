"""JSON schemas of pydantic classes that say more of what the class takes than pydantic's own."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ByteSize
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

WHOLE = "^-?(?:0|[1-9][0-9]{0,300})$"
TEXT_KEYS = {  # what the keys of a mapping look like as text
    "int": WHOLE,
    "float": r"^-?(?:0|[1-9][0-9]{0,300})(?:\.[0-9]{1,300})?$",
    "decimal": r"^-?[0-9]{1,20}(?:\.[0-9]{1,20})?$",
    "bool": "^(?:true|false)$",
}
COMPLEX = r"^-?[0-9]{1,30}(?:\.[0-9]{1,30})?(?:[+-][0-9]{1,30}(?:\.[0-9]{1,30})?j)?$"
BYTE_SIZE = r"^[0-9]{1,12}(?:\.[0-9]{1,3})? ?(?:[kKMGTPE]i?)?[bB]$|^[0-9]{1,18}$"


def pydantic_schema(cls: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a pydantic class; its own where the class makes it itself."""
    if getattr(cls.model_json_schema, "__func__", None) is not BaseModel.model_json_schema.__func__:  # type: ignore[attr-defined]
        return cls.model_json_schema()
    return cls.model_json_schema(schema_generator=PreciseJsonSchema)


def is_more_precise(cls: type[BaseModel]) -> bool:
    """True if `pydantic_schema` says more than pydantic's own schema of a class."""
    return pydantic_schema(cls) != cls.model_json_schema()


class PreciseJsonSchema(GenerateJsonSchema):
    """Adds patterns and bounds for what pydantic checks without telling in the schema."""

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default", "skipped-discriminator"}  # noqa: RUF012

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
        places, digits, bounds = schema.get("decimal_places"), schema.get("max_digits"), _bounds(schema)
        whole = 15 if digits is None else digits - (places or 0)  # digits before the point
        number: JsonSchemaValue = {"type": "number" if digits is None or places else "integer"}
        number |= {"exclusiveMinimum": -(10**whole), "exclusiveMaximum": 10**whole, **bounds}  # so it has no exponent
        if "multiple_of" in schema or places:
            number["multipleOf"] = float(schema.get("multiple_of", f"1e-{places}"))
        if bounds or "multiple_of" in schema:
            return number
        fraction = "" if digits == whole else rf"(?:\.[0-9]{{1,{places or 20}}})?"
        text = f"^-?(?:0|[1-9][0-9]{{0,{(digits or 30) - (places or 0) - 1}}}){fraction}$"
        return {"anyOf": [number, {"type": "string", "pattern": text}]}

    def complex_schema(self, schema: Any) -> JsonSchemaValue:
        return {"type": "string", "pattern": COMPLEX}

    def url_schema(self, schema: Any) -> JsonSchemaValue:
        return _with_schemes(super().url_schema(schema), schema)

    def multi_host_url_schema(self, schema: Any) -> JsonSchemaValue:
        return _with_schemes(super().multi_host_url_schema(schema), schema)

    def dict_schema(self, schema: Any) -> JsonSchemaValue:
        found = super().dict_schema(schema)
        pattern = TEXT_KEYS.get(schema.get("keys_schema", {}).get("type"))
        return found if pattern is None else {**found, "propertyNames": {"pattern": pattern}}

    def function_after_schema(self, schema: Any) -> JsonSchemaValue:
        if getattr(schema["function"]["function"], "__func__", None) is ByteSize._validate.__func__:  # type: ignore[attr-defined]
            return {"anyOf": [{"type": "string", "pattern": BYTE_SIZE}, {"type": "integer", "minimum": 0}]}
        return super().function_after_schema(schema)


def _also(found: JsonSchemaValue, pattern: str) -> JsonSchemaValue:
    return {**found, "allOf": [{"pattern": pattern}]} if "pattern" in found else {**found, "pattern": pattern}


def _with_zone(found: JsonSchemaValue, schema: Any) -> JsonSchemaValue:
    """The schema of a time that has to have a zone, or must not have one."""
    match schema.get("tz_constraint"):
        case "naive":
            return {**found, "pattern": "(?:^|[Tt])[0-9:.]+$"}
        case "aware":
            return {**found, "pattern": "(?:[Zz]|[+-][0-9:]+)$"}
    return found


def _with_schemes(found: JsonSchemaValue, schema: Any) -> JsonSchemaValue:
    schemes = schema.get("allowed_schemes")
    return {**found, "pattern": f"^(?:{'|'.join(schemes).replace('+', r'[+]')}):"} if schemes else found


def _bounds(schema: Any) -> JsonSchemaValue:
    names = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
    return {names[key]: float(schema[key]) for key in names if key in schema}
