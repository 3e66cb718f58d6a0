#!/usr/bin/env bash
# `predict_and_call(error_on_no_tool_call=False)` raises a KeyError where the model calls a tool that is not there.
#
# llama-index-core 0.14.25; its mock of a model that calls functions.
# Expected: what the argument promises, and what `predict_and_call` does where there is no call or where a tool raises: a
#   response that says so. Its own agents tell the model "Tool ... not found".
# Seen: KeyError with nothing but the name, with and without parallel calls; `error_on_no_tool_call` makes no difference.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "llama-index-core==0.14.25"
"$work/venv/bin/python" - <<'PY'
from importlib.metadata import version

from llama_index.core.llms.llm import ToolSelection
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.tools import FunctionTool

CALLS = {"none": [], "raises": ["raises"], "unknown": ["get_wether"]}


class Scripted(MockFunctionCallingLLM):
    said: str

    def get_tool_calls_from_response(self, response, error_on_no_tool_call=True, **options):
        return [ToolSelection(tool_id="1", tool_name=name, tool_kwargs={"city": "Oslo"}) for name in CALLS[self.said]]


def raises(city: str) -> str:
    """The weather of a city."""
    raise OSError("no connection")


def run(said, parallel):
    tools = [FunctionTool.from_defaults(raises)]
    try:
        found = Scripted(said=said).predict_and_call(
            tools, "Weather?", error_on_no_tool_call=False, allow_parallel_tool_calls=parallel
        )
        return f"a response: {str(found)[:40]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


print("llama-index-core", version("llama-index-core"))
for said in CALLS:
    found = {run(said, parallel) for parallel in (True, False)}
    print(f"{said}: {found}")
    wanted = "KeyError: 'get_wether'" if said == "unknown" else "a response"
    assert all(each.startswith(wanted) for each in found), "changed"
PY
