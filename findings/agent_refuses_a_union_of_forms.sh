#!/usr/bin/env bash
# Whether `create_agent` takes a union as `response_format` depends on what the model's profile says of itself.
#
# langchain 1.4.7, langchain-core 1.7.2; a scripted chat model.
# Expected: `response_format=Cat | Dog` works, or is refused, for every chat model alike.
# Seen: without a profile it becomes a tool for each class. With `structured_output: True` in the profile, which says that
#   the model can do more, the provider's strategy is chosen, which knows no unions: ValueError. `ToolStrategy(Cat | Dog)`
#   works with both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "langchain==1.4.7" "langchain-core==1.7.2" "langgraph==1.2.22"
"$work/venv/bin/python" - <<'PY'
from importlib.metadata import version

from langchain.agents import create_agent
from langchain.agents.structured_output import ToolStrategy
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolCall
from pydantic import BaseModel


class Cat(BaseModel):
    """A cat."""

    name: str


class Dog(BaseModel):
    """A dog."""

    name: str


class Scripted(GenericFakeChatModel):
    def bind_tools(self, tools, **options):
        return self


def run(profile, form):
    said = AIMessage("", tool_calls=[ToolCall(id="1", name="Dog", args={"name": "Rex"})])
    agent = create_agent(Scripted(messages=iter([said]), profile=profile), [], response_format=form)
    return agent.invoke({"messages": [HumanMessage("Which pet?")]})["structured_response"]


print("langchain", version("langchain"))
able = {"structured_output": True}
for profile, form in ((None, Cat | Dog), (None, ToolStrategy(Cat | Dog)), (able, ToolStrategy(Cat | Dog))):
    assert run(profile, form) == Dog(name="Rex"), "changed: this used to work"
try:
    print("with a profile that says structured_output:", run(able, Cat | Dog))
except ValueError as error:
    print("with a profile that says structured_output:", type(error).__name__, error)
else:
    raise SystemExit("changed: a union used to be refused for a model that can do more")
PY
