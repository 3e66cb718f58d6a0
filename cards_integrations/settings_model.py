"""The base of all settings classes: what is wrong with them is told in one line, by its path and with near matches."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ValidationError, model_validator
from pydantic_core import ErrorDetails

from cards_integrations.errors import Problem, SettingsError, nearest, short_repr


class SettingsModel(BaseModel):
    """Settings whose constructor and `model_validate` raise `SettingsError` where pydantic raises `ValidationError`."""

    quotes_values: ClassVar[bool] = True
    """False if a value may hold a key, which no error must show."""
    elsewhere: ClassVar[Mapping[str, str]] = {}
    """How to write settings that users look for here and that belong somewhere else, by name."""

    def __init__(self, /, *args: Any, **values: Any) -> None:
        if args:
            raise _by_position(type(self), args[0])
        with _one_line(type(self)):
            super().__init__(**values)

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # nested settings need not call it

    @classmethod
    def model_validate(cls, obj: Any, **how: Any) -> Self:
        """Make the settings from a dict, as pydantic does.

        Raises:
            SettingsError: They cannot be used as given.
        """
        with _one_line(cls):
            return super().model_validate(obj, **how)

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **how: Any) -> Self:
        """Make the settings from JSON, as pydantic does.

        Raises:
            SettingsError: They cannot be used as given.
        """
        with _one_line(cls):
            return super().model_validate_json(json_data, **how)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        if isinstance(values, dict) and cls.model_config.get("extra") == "forbid":
            aliases = {field.alias for field in cls.model_fields.values()}
            unknown = [str(name) for name in values if name not in cls.model_fields and name not in aliases]
            if unknown:
                raise _settings_error([cls._unknown(name) for name in unknown])
        return values

    @classmethod
    def _unknown(cls, name: str) -> Problem:
        known = sorted(cls.model_fields)
        near = nearest(name, known, cls.elsewhere)
        return Problem((name,), f"{cls.__name__} has no such setting.{near} Known: {', '.join(known)}.")


def validation_message(error: ValidationError) -> str:
    """Return all errors of a validation in one line, each with its setting."""
    return str(_settings_error(_problems(error)))


@contextmanager
def _one_line(cls: type[SettingsModel]) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise _settings_error(_problems(error, cls.quotes_values)) from None


def _by_position(cls: type[SettingsModel], value: Any) -> SettingsError:
    """The error for a value without a name: most are meant for what has to be given, for a model, or come first."""
    names = [name for name in cls.model_fields if name not in ("kind", "method")] or ["name"]
    names.sort(key=lambda name: (not cls.model_fields[name].is_required(), name != "model"))
    name = names[0]
    shown = short_repr(value) if cls.quotes_values else "..."
    return SettingsError(f"{cls.__name__} takes its settings by name, such as {cls.__name__}({name}={shown}).")


def _settings_error(problems: list[Problem]) -> SettingsError:
    error = SettingsError("; ".join(map(str, problems)))
    error.problems = tuple(problems)
    return error


def _problems(error: ValidationError, quotes_values: bool = True) -> list[Problem]:
    found = [problem for details in error.errors(include_url=False) for problem in _found(details, quotes_values)]
    found = [problem for problem in found if not any(_is_within(other.where, problem.where) for other in found)]
    by_place: dict[tuple[str, str], Problem] = {}  # what the types of a union say is one problem
    for problem in found:
        place = problem.path, problem.value
        before = by_place.get(place)
        by_place[place] = replace(before, what=f"{before.what}; or: {problem.what}") if before else problem
    return [*by_place.values()]


def _is_within(path: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    """True if it leads further into the same settings: a list of bad parts is told to be too short, too."""
    return len(path) > len(outer) and path[: len(outer)] == outer


def _found(details: ErrorDetails, quotes_values: bool) -> list[Problem]:
    """Our own words if there are any, otherwise pydantic's."""
    where, context = details["loc"], details.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, SettingsError):
        return [problem.inside(where) for problem in cause.problems or (Problem((), str(cause)),)]
    value, said = details["input"], details["msg"].removeprefix("Value error, ")
    if details["type"] == "union_tag_invalid":
        tag, known = context["tag"], context["expected_tags"]
        shown = f"={short_repr(tag)}" if quotes_values else ""
        return [Problem(where, f"must be one of {known}{_near(tag, known)}", shown)]
    if details["type"] in ("model_type", "model_attributes_type"):
        said = f"pass {context.get('class_name', 'a settings object')} or a mapping of its settings."
    if details["type"] == "literal_error":
        said += _near(value, context["expected"])
    quoted = isinstance(value, (int, float)) or (quotes_values and isinstance(value, str))  # a mapping may hold a key
    return [Problem(where, said, f"={short_repr(value)}" if quoted else "")]


def _near(value: Any, expected: str) -> str:
    """Which of the quoted names is like what was given."""
    return f".{near}" if isinstance(value, str) and (near := nearest(value, re.findall(r"'([^']*)'", expected))) else ""
