"""`RewardMiddleware`: the answers of agents are scored, sent back and flagged, whoever writes them."""

from __future__ import annotations

import asyncio
from typing import Any

import faces
import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy
from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.messages.tool import invalid_tool_call
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import BaseModel

from cards_integrations.errors import RewardError, SettingsError
from cards_integrations.langchain.middleware import InvalidCallsAnswered, RewardMiddleware
from cards_integrations.rewards import FunctionReward, GroundednessReward, LengthReward, MinReward, PatternReward

SHORT = LengthReward(target=3)  # 0.0 with three words at most, below 0.0 with more
PASSES, BAD, WORSE = "just three words", "these are four words", "and these here are six words"


class Scripted(FakeMessagesListChatModel):
    """Says one after the other, and notes what it was told; `calls` for each tool that it is given."""

    told: list[Any]

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Any:
        self.told.append([(each.type, each.content) for each in messages])
        return super()._generate(messages, *args, **kwargs)

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self


def scripted(*texts: Any) -> Scripted:
    return Scripted(responses=[AIMessage(text) if isinstance(text, str) else text for text in texts], told=[])


def middleware(reward: Any = SHORT, threshold: float = 0.0, **settings: Any) -> RewardMiddleware:
    return RewardMiddleware(reward, threshold=threshold, llm=faces.chat_cards(), **settings)


def run(agent: Any, how: str = "sync", text: str = "Why?", **config: Any) -> list[BaseMessage]:
    asked = {"messages": [HumanMessage(text)]}
    found = agent.invoke(asked, **config) if how == "sync" else asyncio.run(agent.ainvoke(asked, **config))
    messages: list[BaseMessage] = found["messages"]
    return messages


def verdict(message: BaseMessage) -> Any:
    return message.response_metadata["cards_reward"]


@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_good_answer_is_an_answer(how: str) -> None:
    model = scripted(PASSES)
    messages = run(create_agent(model, middleware=[middleware()]), how)
    assert [message.type for message in messages] == ["human", "ai"]
    assert verdict(messages[-1]) == {
        "name": "length 3 words", "score": 0.0, "threshold": 0.0, "passed": True, "retries": 0
    }  # fmt: skip


@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_bad_one_is_sent_back_with_what_fell_short(how: str) -> None:
    model = scripted(WORSE, BAD, PASSES)
    messages = run(create_agent(model, middleware=[middleware()]), how)
    assert [message.content for message in messages if message.type == "ai"] == [WORSE, BAD, PASSES]
    assert [verdict(message)["retries"] for message in messages if message.type == "ai"] == [0, 1, 2]
    assert verdict(messages[-1])["passed"]
    assert len(model.told) == 3
    kind, text = model.told[1][-1]
    assert kind == "human"
    assert text.startswith("Your answer is not good enough: length 3 words gave it -1, and 0 is needed. Write")


@pytest.mark.parametrize(("answers", "best"), [((WORSE, BAD, WORSE), BAD), ((BAD, BAD.upper(), WORSE), BAD)])
def test_if_none_is_good_the_best_is_last(answers: tuple[str, ...], best: str) -> None:
    model = scripted(*answers, PASSES)
    messages = run(create_agent(model, middleware=[middleware()]))
    assert len(model.told) == 3
    assert messages[-1].content == best
    assert verdict(messages[-1]) == {
        "name": "length 3 words", "score": pytest.approx(-1 / 3), "threshold": 0.0, "passed": False, "retries": 2
    }  # fmt: skip
    assert len({message.id for message in messages}) == len(messages)


def test_a_call_that_cannot_be_read_is_no_best_answer() -> None:
    broken = AIMessage("", invalid_tool_calls=[invalid_tool_call(id="1", name="f", args="{", error="not JSON")])
    shortest = FunctionReward(function=lambda prompt, answers: [-float(len(answer)) for answer in answers])
    both = [InvalidCallsAnswered(), middleware(shortest, threshold=1.0, max_retries=1)]
    messages = run(create_agent(scripted(broken, BAD, PASSES), middleware=both))
    assert messages[-1].content == BAD
    assert not verdict(messages[-1])["passed"]


def test_it_may_only_flag() -> None:
    model = scripted(BAD, PASSES)
    messages = run(create_agent(model, middleware=[middleware(on_low="flag")]))
    assert [message.content for message in messages[1:]] == [BAD]
    assert verdict(messages[-1])["passed"] is False
    assert len(model.told) == 1


def test_the_parts_of_a_composite_are_told() -> None:
    parts = [LengthReward(target=3, scale=(0.0, 1.0)), PatternReward(wanted=["words"], scale=(0.0, 1.0))]
    model = scripted("nothing of the kind here at all", PASSES)
    run(create_agent(model, middleware=[middleware(MinReward(rewards=parts), -0.5)]))
    told = model.told[1][-1][1]
    assert "length 3 words: -1.33. " in told
    assert "pattern" in told
    model = scripted(BAD, PASSES)
    run(create_agent(model, middleware=[middleware(feedback="{score} < {threshold}: {unknown}")]))
    assert model.told[1][-1][1] == "-0.333 < 0: {unknown}"


@pytest.mark.parametrize("how", ["sync", "async"])
def test_an_answer_is_grounded_in_what_the_tools_returned(how: str) -> None:
    """Calls are no answers; the context of the reward is what the tools said."""

    def look_up(word: str) -> str:
        """Look a word up."""
        return f"{word} is a town."

    call = AIMessage("", tool_calls=[{"name": "look_up", "args": {"word": "Ulm"}, "id": "1"}])
    reward = GroundednessReward()
    model = scripted(call, "Ulm is a town.")
    messages = run(create_agent(model, [look_up], middleware=[middleware(reward, -1e9)]), how, "What is Ulm?")
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai"]
    assert "cards_reward" not in messages[1].response_metadata
    llm = faces.cards_llm()
    [expected] = llm.score("What is Ulm?", ["Ulm is a town."], reward, context="Ulm is a town.")
    assert verdict(messages[-1])["score"] == pytest.approx(expected, abs=1e-5)
    given = middleware(reward, -1e9, context=["Ulm is old."])
    messages = run(create_agent(scripted("Ulm is a town."), middleware=[given]), how, "What is Ulm?")
    [expected] = llm.score("What is Ulm?", ["Ulm is a town."], reward, context="Ulm is old.")
    assert verdict(messages[-1])["score"] == pytest.approx(expected, abs=1e-5)


def test_each_question_has_its_own_retries() -> None:
    """What was sent back before, in the same conversation, does not count."""
    seen: list[str] = []

    def note(prompt: str, texts: list[str]) -> list[float]:
        seen.append(prompt)
        return [1.0 if text == PASSES else 0.0 for text in texts]

    model = scripted(BAD, BAD, BAD, BAD, PASSES)
    reward = FunctionReward(function=note)
    agent = create_agent(model, middleware=[middleware(reward, 1.0, max_retries=1)], checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "1"}}
    assert verdict(run(agent, config=config)[-1])["retries"] == 1
    assert len(model.told) == 2
    messages = run(agent, text="And why?", config=config)
    assert len(model.told) == 4
    assert (verdict(messages[-1])["passed"], verdict(messages[-1])["retries"]) == (False, 1)
    assert seen[:2] == ["Why?"] * 2
    assert seen[2:] == [f"User: Why?\nAssistant: {BAD}\nUser: And why?\nAssistant:"] * 2


def test_the_agent_s_model_may_be_ours() -> None:
    """A tiny model's answers, in the same engine as the reward."""
    llm = faces.chat_cards()
    guard = RewardMiddleware(SHORT, threshold=1.0, max_retries=1, llm=llm)
    messages = run(create_agent(llm, middleware=[guard]))
    assert [message.type for message in messages] == ["human", "ai", "human", "ai"]
    [score] = faces.cards_llm().score("Why?", [messages[1].text], SHORT)
    assert verdict(messages[1])["score"] == score
    assert "cards" in messages[-1].response_metadata
    assert verdict(messages[-1])["score"] == max(verdict(messages[1])["score"], verdict(messages[-1])["score"])


class Word(BaseModel):
    word: str


def test_the_object_of_an_answer_is_that_of_its_text() -> None:
    model = scripted('{"word": "one"}', '{"word": "one two three four five"}')
    agent = create_agent(
        model, response_format=ProviderStrategy(Word), middleware=[middleware(threshold=1.0, max_retries=1)]
    )
    found = agent.invoke({"messages": [HumanMessage("Why?")]})
    assert found["structured_response"] == Word.model_validate_json(found["messages"][-1].content)


def test_an_error_of_the_reward_ends_the_agent() -> None:
    def broken(prompt: str, texts: list[str]) -> list[float]:
        raise ValueError("no idea")

    with pytest.raises(RewardError, match="no idea"):
        run(create_agent(scripted(BAD), middleware=[middleware(FunctionReward(function=broken))]))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"reward": "relevanse"}, "Did you mean 'relevance'"),
        ({"on_low": "retyr"}, "on_low='retyr'"),
        ({"max_retries": -1}, "max_retries=-1"),
        ({"context": 3}, "context=3"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        RewardMiddleware(**{"reward": SHORT, "threshold": 0.0, **settings})
