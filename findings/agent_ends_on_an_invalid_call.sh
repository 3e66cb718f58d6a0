#!/usr/bin/env bash
# A turn whose only tool call is invalid ends a LangChain agent without a word, and the model is not told.
#
# langchain 1.4.7, langchain-core 1.7.2, langgraph 1.2.22; a scripted chat model.
# Expected: as for a tool that is not there or raises, the agent answers the call with an error, and the model goes on.
# Seen: `create_agent` looks at `tool_calls` only. A message with nothing but `invalid_tool_calls` (JSON that does not
#   parse) is taken for the final answer: the run ends with an empty text, and the model is asked once.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "langchain==1.4.7" "langchain-core==1.7.2" "langgraph==1.2.22"
"$work/venv/bin/python" - <<'PY'
from importlib.metadata import version

from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolCall


class Scripted(GenericFakeChatModel):
    def bind_tools(self, tools, **options):
        return self


def get_weather(city: str) -> str:
    """The weather of a city."""
    return "sunny"


def run(first):
    model = Scripted(messages=iter([first, AIMessage("It is sunny in Oslo.")]))
    question = HumanMessage("How is the weather in Oslo?")
    return create_agent(model, [get_weather]).invoke({"messages": [question]})["messages"]


print("langchain", version("langchain"))
broken = {"type": "invalid_tool_call", "id": "1", "name": "get_weather", "args": '{"city": "Oslo"', "error": "not JSON"}
unknown = ToolCall(id="1", name="get_wether", args={"city": "Oslo"})
told, ended = run(AIMessage("", tool_calls=[unknown])), run(AIMessage("", invalid_tool_calls=[broken]))
print("a tool that is not there:", [(type(m).__name__, m.content[:60]) for m in told])
print("a call that is no JSON:  ", [(type(m).__name__, m.content[:60]) for m in ended])
assert told[-1].content == "It is sunny in Oslo.", "changed: unknown tools used to be reported to the model"
assert len(ended) == 2 and ended[-1].content == "", "changed: an invalid call used to end the agent"
PY
