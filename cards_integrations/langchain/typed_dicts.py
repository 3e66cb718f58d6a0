"""JSON schemas of typed dicts, by pydantic.

LangChain's own let no value be None, know no keys that may be missing, and take no pydantic classes within.
"""

from __future__ import annotations

from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Literal, NotRequired, Required, Union, get_args, get_origin

from pydantic import PydanticUserError, TypeAdapter
from pydantic.json_schema import JsonSchemaValue
from typing_extensions import ReadOnly, TypedDict, get_type_hints, is_typeddict

from cards_integrations.chat.pydantic_schema import PreciseJsonSchema

QUALIFIERS = (Required, NotRequired, ReadOnly)
"""What stands around the type of a key."""
JSON_VALUES = (str, int, float, list, dict, type(None))


def typed_dict_schema(cls: Any) -> dict[str, Any]:
    """Return the schema of a typed dict, of `typing` or of `typing_extensions`."""
    try:
        adapter = TypeAdapter(cls)
    except PydanticUserError:  # before Python 3.12 pydantic takes none of `typing`
        adapter = TypeAdapter(_of_extensions(cls, {}))
    return adapter.json_schema(schema_generator=TypedDictSchema)


class TypedDictSchema(PreciseJsonSchema):
    """Adds what LangChain reads in `Annotated`: a default or `...`, and then a description. Keys have no titles."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def typed_dict_schema(self, schema: Any) -> JsonSchemaValue:
        found = super().typed_dict_schema(schema)
        for name, hint in get_type_hints(schema["cls"], include_extras=True).items():
            default, description = (*_annotations(hint), ..., ...)[:2]
            if isinstance(description, str):
                found["properties"][name] = {**found["properties"][name], "description": description}
            if isinstance(default, JSON_VALUES) and name in found.get("required", ()):
                found["required"].remove(name)
        return found


def _annotations(hint: Any) -> tuple[Any, ...]:
    """Return what stands in an `Annotated` beside the type, whatever is around it."""
    while get_origin(hint) in QUALIFIERS:
        (hint,) = get_args(hint)
    return hint.__metadata__ if get_origin(hint) is Annotated else ()


def _of_extensions(hint: Any, known: dict[Any, Any]) -> Any:
    """Return the type with typed dicts of `typing_extensions` in place of others; `known` are those made so far."""
    if is_typeddict(hint):
        if hint not in known:
            hints = get_type_hints(hint, include_extras=True)
            make: Any = TypedDict
            made = make(hint.__name__, dict.fromkeys(hints, Any))
            known[hint], made.__doc__ = made, hint.__doc__  # which may refer to itself
            made.__annotations__ |= {name: _of_extensions(_qualified(hint, name, hints[name]), known) for name in hints}
        return known[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return Annotated[_of_extensions(args[0], known), *hint.__metadata__]
    if origin in QUALIFIERS:
        return origin[_of_extensions(args[0], known)]
    if not args or origin in (Literal, Callable):
        return hint
    return (Union if origin is UnionType else origin)[tuple(_of_extensions(each, known) for each in args)]


def _qualified(cls: Any, name: str, hint: Any) -> Any:
    """Return the type of a key, which says whether it may be missing."""
    inner = hint
    while get_origin(inner) in (Annotated, ReadOnly):
        inner = get_args(inner)[0]
    says = get_origin(inner) in QUALIFIERS or name not in cls.__optional_keys__
    return hint if says else NotRequired[hint]
