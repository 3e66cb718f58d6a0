#!/usr/bin/env bash
# With `output_version="v1"`, the first tool call of a stream becomes a part of the text block before it.
#
# langchain-core 1.7.2; a chat model that streams a text and then a call, whose chunks it numbers from 0.
# Expected: the sum of the chunks has the content blocks that `invoke` has: a text, and a call.
# Seen: `BaseChatModel` numbers the blocks of texts from 0 as well, and chunks add up blocks with one number: one block is
#   left, a text with the name and the arguments of the call. `tool_calls` is right, and nothing is raised. With "v0" both
#   have two blocks.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "langchain-core==1.7.2"
LANGSMITH_TRACING=false "$work/venv/bin/python" - <<'PY'
from functools import reduce
from importlib.metadata import version
from operator import add

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

print("langchain-core", version("langchain-core"))
TEXT, CALL = "Let me add them.", {"name": "add", "args": {"a": 1}, "id": "1"}


class Adds(BaseChatModel):
    @property
    def _llm_type(self):
        return "adds"

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        return ChatResult(generations=[ChatGeneration(message=AIMessage(TEXT, tool_calls=[CALL]))])

    def _stream(self, messages, stop=None, run_manager=None, **kwargs):
        call = tool_call_chunk(name="add", args='{"a": 1}', id="1", index=0)
        yield ChatGenerationChunk(message=AIMessageChunk(TEXT))
        yield ChatGenerationChunk(message=AIMessageChunk("", tool_call_chunks=[call]))


kinds = {}
for form in ("v0", "v1"):
    model = Adds(output_version=form)
    answers = {"invoke": model.invoke("1 + 1?"), "stream": reduce(add, model.stream("1 + 1?"))}
    for how, answer in answers.items():
        assert [call["args"] for call in answer.tool_calls] == [CALL["args"]]
        kinds[form, how] = [block["type"] for block in answer.content_blocks]
        print(form, how, answer.content_blocks)
assert kinds["v0", "invoke"] == kinds["v0", "stream"] == kinds["v1", "invoke"] == ["text", "tool_call"]
assert kinds["v1", "stream"] == ["text"], "changed: the call used to be merged into the text"
PY
