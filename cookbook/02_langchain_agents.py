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
from pydantic import BaseModel, Field


class Review(BaseModel):
    """A review of a restaurant."""

    dish: str = Field(max_length=40)
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


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"It is sunny in {city}."


forced = llm.bind_tools([add, weather], tool_choice="any", parallel_tool_calls=False)
forced.invoke("What is 17 plus 25?", max_tokens=64).tool_calls

# %% [markdown]
# ## A LangGraph agent
#
# The loop of an agent: call, read the result, answer. The first model call is made to use a tool, the second to answer in
# words; with a larger model leave both to "auto" and use `langchain.agents.create_agent(llm, tools)`.

# %%
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode


def ask(state: MessagesState):
    return {"messages": [forced.invoke(state["messages"], max_tokens=64)]}


def answer(state: MessagesState):
    return {"messages": [llm.invoke(state["messages"])]}


graph = StateGraph(MessagesState)
graph.add_node("ask", ask)
graph.add_node("tools", ToolNode([add, weather]))
graph.add_node("answer", answer)
graph.add_edge(START, "ask")
graph.add_edge("ask", "tools")
graph.add_edge("tools", "answer")
agent = graph.compile()

for message in agent.invoke({"messages": [("user", "How is the weather in Lisbon?")]})["messages"]:
    message.pretty_print()

# %% [markdown]
# ## Watching an answer grow
#
# Each kept segment is an event, with all its drafts. Callbacks and `astream_events` see it.

# %%
from langchain_core.callbacks import BaseCallbackHandler


class Watcher(BaseCallbackHandler):
    def on_custom_event(self, name, data, **kwargs):
        if name == "cards_segment":
            print(f"{len(data['drafts'])} drafts, reward {data['reward']:.2f}: {data['text']!r}")


llm.invoke("How was the concert?", {"callbacks": [Watcher()]})

# %%
llm.close()
