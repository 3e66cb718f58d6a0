#!/usr/bin/env bash
# `stream_structured_predict` streams empty objects where the model's calls are in `ToolCallBlock`s.
#
# llama-index-core 0.14.25; its mock of a model that calls functions.
# Expected: the last object of the stream is the one that `structured_predict` gives for the same call.
# Seen: `process_streaming_objects` asks the LLM for its calls only if the message has them in
#   `additional_kwargs["tool_calls"]`. A call in a `ToolCallBlock`, where LLMs put it now (that of
#   llama-index-llms-anthropic 0.12.3, when it streams, puts it nowhere else), is taken for an empty text: every object
#   of the stream has None in all its fields and is not of the class that was asked for. Nothing is raised or logged.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "llama-index-core==0.14.25"
"$work/venv/bin/python" - <<'PY'
from importlib.metadata import version

from llama_index.core import PromptTemplate
from llama_index.core.base.llms.types import ToolCallBlock
from llama_index.core.llms import ChatMessage
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.llms.mock import MockFunctionCallingLLM
from pydantic import BaseModel


class Weather(BaseModel):
    """The weather of a city."""

    city: str
    degrees: int


def in_a_block(arguments):
    call = ToolCallBlock(tool_call_id="1", tool_name="Weather", tool_kwargs=arguments)
    return ChatMessage(role="assistant", blocks=[call])


def in_additional_kwargs(arguments):
    call = ToolSelection(tool_id="1", tool_name="Weather", tool_kwargs=arguments)
    return ChatMessage(role="assistant", additional_kwargs={"tool_calls": [call]})


print("llama-index-core", version("llama-index-core"))
PROMPT, PARTS = PromptTemplate("The weather in Oslo?"), ({"city": "Oslo"}, {"city": "Oslo", "degrees": 7})
streamed = {}
for message in (in_additional_kwargs, in_a_block):
    at_once = MockFunctionCallingLLM(response_generator=lambda messages, **_: message(PARTS[-1]))
    in_parts = MockFunctionCallingLLM(response_generator=lambda messages, **_: (message(part) for part in PARTS))
    whole = at_once.structured_predict(Weather, PROMPT)
    streamed[message] = list(in_parts.stream_structured_predict(Weather, PROMPT))
    print(f"{message.__name__}: at once {whole!r}, streamed {streamed[message]}")
    assert whole == Weather(city="Oslo", degrees=7), "changed: both used to work at once"
assert streamed[in_additional_kwargs][-1] == Weather(city="Oslo", degrees=7), "changed: these used to be streamed"
assert len(streamed[in_a_block]) == len(PARTS), "changed: the number of objects"
for found in streamed[in_a_block]:
    assert not isinstance(found, Weather) and not any(found.model_dump().values()), "changed: blocks used to be missed"
PY
