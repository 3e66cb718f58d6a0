#!/usr/bin/env bash
# `convert_to_openai_function` keeps only the name of a titled JSON schema that has no `properties` at its root.
#
# langchain-core 1.7.2, pydantic 2.14.3.
# Expected: a class and the JSON schema that it gives make the same function. The docstring takes "a JSON schema with
#   top-level `title` key", and unions, maps and references are as valid at the root as an object with properties.
# Seen: for the class the union or the map becomes the parameters. For its schema they go, without an error or a
#   warning: what is left is a name and a description, which a provider reads as a function without parameters. With
#   `strict=True` it is a KeyError: 'parameters'. `convert_to_openai_tool` does the same.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "langchain-core==1.7.2" "pydantic==2.14.3"
"$work/venv/bin/python" - <<'PY'
import json
from importlib.metadata import version

from langchain_core.utils.function_calling import convert_to_openai_function, convert_to_openai_tool
from pydantic import BaseModel, RootModel


class Cat(BaseModel):
    """A cat."""

    lives: int


class Dog(BaseModel):
    """A dog."""

    tricks: list[str]


class Pet(RootModel[Cat | Dog]):
    """A cat or a dog."""


class Prices(RootModel[dict[str, float]]):
    """A price for each article."""


REFERENCE = {"title": "Owner", "$ref": "#/$defs/Person", "$defs": {"Person": {"type": "object", "properties": {}}}}
print("langchain-core", version("langchain-core"))
kept = convert_to_openai_function(Cat.model_json_schema())
print("a schema with properties:", json.dumps(kept))
assert kept["parameters"]["properties"]["lives"]["type"] == "integer", "changed: properties used to be kept"
for cls, key in ((Pet, "anyOf"), (Prices, "additionalProperties")):
    schema = cls.model_json_schema()
    of_class, of_schema = convert_to_openai_function(cls), convert_to_openai_function(schema)
    print(f"{cls.__name__}, the class: ", json.dumps(of_class))
    print(f"{cls.__name__}, its schema:", json.dumps(of_schema))
    assert key in schema and key in of_class["parameters"], "changed: the class used to keep its form"
    assert of_schema == {"name": cls.__name__, "description": cls.__doc__}, "changed: the form used to be dropped"
    assert convert_to_openai_tool(schema)["function"] == of_schema, "changed: tools used to be made the same way"
print("a schema that is a reference:", json.dumps(convert_to_openai_function(REFERENCE)))
assert convert_to_openai_function(REFERENCE) == {"name": "Owner"}, "changed: the reference used to be dropped"
try:
    print("strict:", convert_to_openai_function(Prices.model_json_schema(), strict=True))
except KeyError as error:
    print("strict: KeyError", error)
else:
    raise SystemExit("changed: strict used to fail")
PY
