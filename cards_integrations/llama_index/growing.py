"""Objects of a pydantic class while their JSON is still being written."""

from __future__ import annotations

from functools import lru_cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from llama_index.core.base.llms.types import ChatResponse
from llama_index.core.program.utils import FlexibleModel, create_flexible_model
from pydantic import AliasChoices, BaseModel
from pydantic_core import from_json

from cards_integrations.llama_index.convert import parse_response

ARRAYS = (list, set, frozenset, tuple)
flexible_model = lru_cache(maxsize=256)(create_flexible_model)


class GrowingObject:
    """The object that an answer's JSON describes so far. Each has all that the one before it had.

    The last is a validated object of the class. Before that, missing fields are None, whatever their defaults, and
    values are as in the JSON.
    """

    def __init__(self, output_cls: type[BaseModel]) -> None:
        self.output_cls = output_cls
        self.values: Any = {}

    def add(self, response: ChatResponse) -> Any:
        """Return the object after this response.

        Raises:
            AnswerCut: `max_tokens` cut the answer.
        """
        if response.raw:
            return parse_response(self.output_cls, response)
        self.values = _values(response.message.content or "", self.values)
        is_root = "root" in self.output_cls.model_fields and not isinstance(self.values, dict)
        return _object(self.output_cls, {"root": self.values} if is_root else self.values)


def _values(text: str, before: Any) -> Any:
    """Return the values in JSON that may end anywhere, except a number at its end, which may get more digits."""
    try:
        return from_json(text.rstrip("0123456789.eE+-"), allow_partial="trailing-strings")
    except ValueError:
        return before


def _object(cls: type[BaseModel], values: Any) -> FlexibleModel:
    names = {_key(name, field): name for name, field in cls.model_fields.items()}
    found = {names.get(key, key): value for key, value in values.items()}
    known = {name: _value(field.annotation, found[name]) for name, field in cls.model_fields.items() if name in found}
    return flexible_model(cls).model_construct(**{**dict.fromkeys(cls.model_fields), **found, **known})


def _key(name: str, field: Any) -> str:
    """Return the name of a field in JSON."""
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        alias = next((each for each in alias.choices if isinstance(each, str)), None)
    return alias if isinstance(alias, str) else field.alias or name


def _value(kind: Any, value: Any) -> Any:
    """Return a value with its mappings replaced by objects, where the type tells their class."""
    kinds = _alternatives(kind)
    if isinstance(value, list):
        items = next((get_args(each) for each in kinds if get_origin(each) in ARRAYS), ())
        items = tuple(each for each in items if each is not Ellipsis)
        return [_value(items[min(i, len(items) - 1)], item) for i, item in enumerate(value)] if items else value
    if isinstance(value, dict):
        classes = [each for each in kinds if isinstance(each, type) and issubclass(each, BaseModel)]
        for cls in classes:
            if value.keys() <= _keys(cls) and (len(classes) == 1 or _has_literals(cls, value)):
                return _object(cls, value)
        values = next((get_args(each)[1] for each in kinds if get_origin(each) is dict), Any)
        return {key: _value(values, item) for key, item in value.items()}
    return value


def _alternatives(kind: Any) -> list[Any]:
    """Return the types of a union, or a single type."""
    if get_origin(kind) is Annotated:
        return _alternatives(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [each for option in get_args(kind) for each in _alternatives(option)]
    return [kind]


def _has_literals(cls: type[BaseModel], value: dict[str, Any]) -> bool:
    """True if all literal fields, by which classes of a union are told apart, have the values of this class."""
    fields = [(_key(name, each), each.annotation) for name, each in cls.model_fields.items()]
    return all(value.get(key) in get_args(kind) for key, kind in fields if get_origin(kind) is Literal)


def _keys(cls: type[BaseModel]) -> set[str]:
    return {_key(name, field) for name, field in cls.model_fields.items()}
