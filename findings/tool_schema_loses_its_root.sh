#!/usr/bin/env bash
# A tool whose arguments are a recursive class is offered to the model without arguments, and cannot be called by it.
#
# llama-index-core 0.14.25; its mock of a model that calls functions.
# Expected: the schema that a model sees is that of `fn_schema`, and `call_tool` calls the tool as `tool(...)` does.
# Seen: `ToolMetadata.get_parameters_dict` keeps five keys of the root: type, properties, required, definitions, $defs.
#   The schema of a class that refers to itself is a `$ref` into `$defs`: the `$ref` goes, and a schema that admits
#   everything is left. `call_tool` then looks for its properties and answers "Encountered error: 'properties'", so
#   `structured_predict` of such a class always raises, whatever the model said. `additionalProperties: false`, which a
#   class with extra="forbid" asks for, and which strict modes need, goes as well.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "llama-index-core==0.14.25"
"$work/venv/bin/python" - <<'PY'
import json
from importlib.metadata import version

from llama_index.core import PromptTemplate
from llama_index.core.base.llms.types import ToolCallBlock
from llama_index.core.llms import ChatMessage
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.tools import FunctionTool
from llama_index.core.tools.calling import call_tool
from pydantic import BaseModel, ConfigDict


class Folder(BaseModel):
    """A folder."""

    name: str
    folders: list["Folder"] = []


class Tree(BaseModel):
    """Folders, one level down from the root."""

    model_config = ConfigDict(extra="forbid")
    root: Folder


def count(**arguments):
    """The number of folders."""
    return str(json.dumps(arguments).count("name"))


def predict(cls, arguments):
    call = ToolCallBlock(tool_call_id="1", tool_name=cls.__name__, tool_kwargs=arguments)
    llm = MockFunctionCallingLLM(response_generator=lambda messages, **_: ChatMessage(role="assistant", blocks=[call]))
    try:
        return llm.structured_predict(cls, PromptTemplate("Which folders?"))
    except ValueError as error:
        return error


FOLDER = {"name": "home", "folders": [{"name": "mail"}]}
print("llama-index-core", version("llama-index-core"))
for cls, arguments in ((Folder, FOLDER), (Tree, {"root": FOLDER})):
    tool = FunctionTool.from_defaults(count, fn_schema=cls)
    whole, seen = cls.model_json_schema(), tool.metadata.get_parameters_dict()
    direct, called, predicted = tool(**arguments), call_tool(tool, arguments), predict(cls, arguments)
    print(f"{cls.__name__}: keys of the schema {sorted(whole)}, of what a model sees {sorted(seen)}")
    print(f"  called directly: {direct.content!r}; by call_tool: {called.content!r}")
    print(f"  structured_predict: {predicted!r}")
    assert direct.content == "2", "changed: a direct call used to work"
    if cls is Folder:
        assert "$ref" in whole and set(seen) == {"$defs"}, "changed: the reference used to go"
        assert called.is_error and called.content.endswith("error: 'properties'"), "changed: call_tool used to fail"
        assert isinstance(predicted, ValueError), "changed: structured_predict used to raise"
    else:
        assert whole["additionalProperties"] is False, "changed: the schema of the class"
        assert "additionalProperties" not in seen, "changed: additionalProperties used to go"
        assert called.content == "2" and isinstance(predicted, Tree), "changed: a class with a root used to work"
PY
