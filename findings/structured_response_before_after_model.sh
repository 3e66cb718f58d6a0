#!/usr/bin/env bash
# With `ProviderStrategy`, an agent's structured response is read before `after_model` middleware sees the message.
#
# langchain 1.4.7, langchain-core 1.7.2, langgraph 1.2.22; a scripted chat model.
# Expected: where middleware replaces the final message in `after_model`, as guardrails and correcting hooks do, the
#   structured response is parsed from the message that the agent returns.
# Seen: it is parsed inside the model step, from the message that was replaced. The agent's last message says 7 degrees,
#   and `structured_response` 70. A message that middleware takes back because it is invalid leaves its object, too.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "langchain==1.4.7" "langchain-core==1.7.2" "langgraph==1.2.22"
"$work/venv/bin/python" - <<'PY'
from importlib.metadata import version

from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain.agents.structured_output import ProviderStrategy
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage
from pydantic import BaseModel


class Weather(BaseModel):
    city: str
    degrees: int


class Scripted(GenericFakeChatModel):
    """Answers as a provider with JSON schemas does."""

    def bind(self, **options):
        return self

    def bind_tools(self, tools, **options):
        return self


class Replaces(AgentMiddleware):
    def __init__(self, content):
        super().__init__()
        self.content = content

    def after_model(self, state, runtime):
        return {"messages": [AIMessage(self.content, id=state["messages"][-1].id)]}


def run(content):
    model = Scripted(messages=iter([AIMessage('{"city": "Oslo", "degrees": 70}')]))
    agent = create_agent(model, [], response_format=ProviderStrategy(Weather), middleware=[Replaces(content)])
    return agent.invoke({"messages": [HumanMessage("How warm is it in Oslo?")]})


print("langchain", version("langchain"))
for content in ('{"city": "Oslo", "degrees": 7}', "I would rather not say."):
    found = run(content)
    assert found["messages"][-1].content == content, "changed: the message used to be replaced"
    print("last message:", content, "| structured_response:", found["structured_response"])
    assert found["structured_response"] == Weather(city="Oslo", degrees=70), "changed: it used to be the first one's"
PY
