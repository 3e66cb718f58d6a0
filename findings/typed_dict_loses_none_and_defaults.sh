#!/usr/bin/env bash
# A typed dict as a tool: a key that may be None may not be null in the schema, and marks or classes in it break it.
#
# langchain-core 1.7.2, pydantic 2.14.3, Python 3.11 or newer.
# Expected: `convert_to_openai_tool` describes a typed dict as pydantic's TypeAdapter does. The same keys in a pydantic
#   class give `anyOf` with null for `str | None`, and a class of pydantic 2 as an object.
# Seen: the dict becomes a class of pydantic 1 on the way. `Optional[str]` is a string that is required: a model that is
#   held to the schema has to invent one. A field that is a pydantic 2 class raises, and so does `NotRequired`.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "langchain-core==1.7.2" "pydantic==2.14.3"
"$work/venv/bin/python" - <<'PY'
import json
from importlib.metadata import version
from typing import Optional

from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel, TypeAdapter
from typing_extensions import NotRequired, TypedDict


class Place(BaseModel):
    """A place."""

    city: str


class Person(TypedDict):
    """A person."""

    name: str
    nickname: Optional[str]


class Resident(TypedDict):
    """A person with a place."""

    place: Place


class Guest(TypedDict):
    """A person with a table."""

    name: str
    table: NotRequired[int]


class Same(BaseModel):
    """A person."""

    name: str
    nickname: Optional[str]


def parameters(of: type) -> dict:
    return convert_to_openai_tool(of)["function"]["parameters"]


print("langchain-core", version("langchain-core"))
nickname = {"of a class": parameters(Same), "by pydantic": TypeAdapter(Person).json_schema(), "of a dict": parameters(Person)}
for what, schema in nickname.items():
    print(f"nickname, {what}:", json.dumps(schema["properties"]["nickname"]), "required:", schema["required"])
can_be_null = {what: "null" in json.dumps(schema["properties"]["nickname"]) for what, schema in nickname.items()}
assert can_be_null == {"of a class": True, "by pydantic": True, "of a dict": False}, "changed: None used to be lost"
assert "nickname" in nickname["of a dict"]["required"], "changed: the key used to be required"
for of in (Resident, Guest):
    TypeAdapter(of).json_schema()
    try:
        print(of.__name__, parameters(of))
    except Exception as error:
        print(f"{of.__name__}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
    else:
        raise SystemExit(f"changed: {of.__name__} used to be refused")
PY
