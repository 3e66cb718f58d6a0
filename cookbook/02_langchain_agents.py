# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 02 · Aligned answers in LangChain: chains, tools, agents
#
# `CardsLLM` is a Runnable, so it can be used wherever a chat model can. What is new is that every answer is guided by a
# reward while it is written, and comes with that reward.

# %%
from cards_integrations import CardsLLM

llm = CardsLLM(reward="sentiment", max_tokens=40, seed=1)

# %% [markdown]
# ## A chain

# %%
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

chain = ChatPromptTemplate.from_template("Write one sentence about {topic}.") | llm | StrOutputParser()
for topic, text in zip(topics := ["rain", "Mondays"], chain.batch([{"topic": topic} for topic in topics]), strict=True):
    print(f"{topic}: {text}")

# %% [markdown]
# The message itself carries its cost and its reward:

# %%
message = llm.invoke("How was the concert?")
print(message.content)
print(message.usage_metadata)
print({name: message.response_metadata["cards"][name] for name in ("reward", "log_likelihood", "seed")})

# %% [markdown]
# ## Structured output
#
# Every draft, kept or rejected, is held to the schema, so a model of 135M parameters gives a valid object. (It does not
# give a *sensible* one: grammar makes the form right, and only that.)

# %%
from typing import Literal

from pydantic import BaseModel, Field


class Review(BaseModel):
    """A review of a restaurant."""

    dish: Literal["Margherita", "Marinara", "Calzone"]
    stars: int = Field(ge=1, le=5)
    verdict: str = Field(max_length=80)


llm.with_structured_output(Review).invoke("Review the pizza place at the corner.", max_tokens=80)

# %% [markdown]
# ## Tools
#
# `tool_choice="any"` (or a tool's name) is enforced. With "auto" the model decides, and so small a model rarely does.

# %%
from langchain_core.tools import tool


@tool
def add(a: int, b: int) -> int:
    """Add two integers."""
    return a + b


REPORTS = {
    "Lisbon": "It is 31 degrees in Lisbon, and a storm comes in the evening.",
    "Oslo": "It is 4 degrees in Oslo, with fog until noon.",
    "Quito": "It is 19 degrees in Quito, with some rain.",
}


@tool
def weather(city: Literal["Lisbon", "Oslo", "Quito"]) -> str:
    """The weather in a city."""
    return REPORTS[city]


forced = llm.bind_tools([add, weather], tool_choice="any", parallel_tool_calls=False)
for question in ("What is 17 plus 25?", "How is the weather in Lisbon?"):
    print(forced.invoke(question, max_tokens=64).tool_calls)

# %% [markdown]
# ## An agent whose answer stays with what the tool said
#
# The loop of an agent: call, read the result, answer. The first model call is made to use a tool. The second writes the answer, and
# there small models go wrong: they have read the result, and still say something else. `GroundednessReward` scores how far the
# result supports the answer, while it is written. (With a larger model leave the calls to "auto" and use
# `langchain.agents.create_agent(llm, tools)`.)

# %%
import re

from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode

from cards_integrations.decoding import Cards
from cards_integrations.rewards import GroundednessReward

grounded = llm.bind(reward=GroundednessReward(), decoding=Cards(), max_tokens=32)


def asked(question, result):
    return f"The weather service says: {result}\n\n{question} Answer in one sentence."


def ask(state: MessagesState):
    return {"messages": [forced.invoke(state["messages"], max_tokens=64)]}


def answer(state: MessagesState):
    question, result = state["messages"][0].content, state["messages"][-1].content
    return {"messages": [grounded.invoke(asked(question, result), context=[result])]}


graph = StateGraph(MessagesState)
graph.add_node("ask", ask)
graph.add_node("tools", ToolNode([add, weather]))
graph.add_node("answer", answer)
graph.add_edge(START, "ask")
graph.add_edge("ask", "tools")
graph.add_edge("tools", "answer")
agent = graph.compile()

for message in agent.invoke({"messages": [("user", "How is the weather in Oslo?")]})["messages"]:
    message.pretty_print()

# %% [markdown]
# Does it help, or was that luck? Four answers for each city, plain and grounded, and in how many of them is the right temperature.
# (135M parameters still write odd English; what they say is what the tool said more often.)

# %%
plain = llm.bind(decoding="sampling", max_tokens=32)
for name, model in (("plain", plain), ("grounded", grounded)):
    right = 0
    for city, report in REPORTS.items():
        prompt = asked(f"How is the weather in {city}?", report)
        for seed in range(4):
            told = model.invoke(prompt, seed=seed, **({"context": [report]} if model is grounded else {})).content
            right += re.findall("[0-9]+", report)[0] in re.findall("[0-9]+", told)
    print(f"{name:9} {right} of 12")

# %% [markdown]
# ## Watching an answer grow
#
# Each kept segment is an event, with all its candidates. Callbacks and `astream_events` see it.

# %%
from langchain_core.callbacks import BaseCallbackHandler


class Watcher(BaseCallbackHandler):
    def on_custom_event(self, name, data, **kwargs):
        if name == "cards_segment":
            print(f"{len(data['drafts'])} drafts, reward {data['reward']:.2f}: {data['text']!r}")


llm.invoke("How was the concert?", {"callbacks": [Watcher()]}, decoding=Cards()).content

# %%
llm.close()
