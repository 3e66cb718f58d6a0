"""Decision models of LangChain: rewards that answer questions, and answers that are rewards."""

from __future__ import annotations

import math
from typing import Any

import faces
import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage

from cards_integrations.decoding import BestOfN
from cards_integrations.errors import RewardError, SettingsError
from cards_integrations.rewards import FunctionReward, LengthReward, MinReward, as_reward

decisions = pytest.importorskip(
    "cards_integrations.langchain.decisions", reason="langchain-core 1.8 has decision models", exc_type=ImportError
)
core = pytest.importorskip("langchain_core.decisions")

CHOICE = {"red": "a b c", "green": None, "blue": {"of": "the sky"}}
SHOWN = ["red: a b c", "green", 'blue: {"of": "the sky"}']


def softmax(values: list[float]) -> list[float]:
    weights = [math.exp(value) for value in values]
    return [weight / sum(weights) for weight in weights]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def model(reward: Any = None, **settings: Any) -> Any:
    llm = settings.pop("llm", None) or faces.chat_cards()
    return decisions.RewardDecisionModel(reward=reward or faces.options()["reward"], llm=llm, **settings)


# --- a reward that answers questions ---


@pytest.mark.parametrize("how", ["sync", "async", "batch"])
async def test_probabilities_are_the_softmax_of_the_rewards(how: str) -> None:
    """Each option is an answer to instructions and state; the reward is a classifier."""
    asking, llm = model(), faces.cards_llm()
    questions = {
        "colour": core.Choice(instructions="Which?", criteria=CHOICE),
        "good": core.Noul(instructions="Is it?", criteria={"true": "fine"}),
        "level": core.Score(instructions="How?", criteria=["bad", "fair", "good"]),
    }
    request = {"state": "the sky", "questions": questions}
    if how == "sync":
        found = asking.invoke(request)
    else:
        found = await asking.ainvoke(request) if how == "async" else asking.batch([request])[0]
    p = softmax(llm.score("Which?\n\nthe sky", SHOWN))
    assert found.choices["colour"].probabilities == pytest.approx(dict(zip(CHOICE, p, strict=True)))
    assert found.choices["colour"].choice == max(CHOICE, key=lambda label: p[list(CHOICE).index(label)])
    assert found.choices["colour"].confidence == pytest.approx(max(p))
    yes, _ = softmax(llm.score("Is it?\n\nthe sky", ["yes: fine", "no"]))
    assert found.nouls["good"].noul == pytest.approx(yes)
    p = softmax(llm.score("How?\n\nthe sky", ["bad", "fair", "good"]))
    assert found.scores["level"].score == pytest.approx(p[1] + 2 * p[2])
    assert found.scores["level"].legend == {0: "bad", 1: "fair", 2: "good"}
    assert found.model == asking.reward.name


def test_temperature_format_and_scale() -> None:
    question = {"a": core.Choice(instructions="Which?", criteria={"one": None, "one two": None})}
    for settings, temperature in (({"temperature": 0.1}, 0.1), ({}, 0.2), ({"temperature": 5}, 5)):
        reward = LengthReward(target=2, scale=(0.0, 0.2))
        found = model(reward, **settings).invoke({"state": "w", "questions": question}).choices["a"]
        assert found.choice == "one two"
        assert found.confidence == pytest.approx(sigmoid(0.5 / temperature))
    seen: list[str] = []

    def note(prompt: str, texts: list[str]) -> list[float]:
        seen.append(prompt)
        return [0.0 for _ in texts]

    talk = [HumanMessage("Hi"), AIMessage("Hello")]
    asking = model(FunctionReward(function=note), prompt_format="<{state}>")
    asking.invoke({"state": "{instructions}", "questions": question})
    asking.invoke({"state": talk, "questions": question})
    asking.invoke({"state": {"messages": talk[:1], "n": 1}, "questions": question})
    assert seen[0] == "<{instructions}>"
    assert seen[1].startswith("<User: Hi\nAssistant: Hello")
    assert '"content": "Hi"' in seen[2]


def test_the_state_itself_is_scored() -> None:
    seen: list[tuple[str, list[str]]] = []

    def vowels(prompt: str, texts: list[str]) -> list[float]:
        seen.append((prompt, texts))
        return [float(sum(text.count(vowel) for vowel in "aeiou")) for text in texts]

    asking = model(FunctionReward(function=vowels), reads="state", threshold=2.0, temperature=4.0)
    question = {"a": core.Noul(instructions="Is it good?")}
    states: dict[str, Any] = {
        "talk": [HumanMessage("Hi"), AIMessage("aaaaaa")],
        "ours": {"message": "Hi", "answer": "aaaaaa"},
        "tool": {"messages": [HumanMessage("Hi")], "tool_call": {"name": "aaa"}},
        "text": "aaaaaa",
    }
    found = {
        name: asking.invoke({"state": each, "questions": question}).nouls["a"].noul for name, each in states.items()
    }
    assert found["talk"] == found["ours"] == found["text"] == pytest.approx(sigmoid(1.0))
    assert seen[:2] == [("Hi", ["aaaaaa"])] * 2
    assert seen[2][1] == ['{"tool_call": {"name": "aaa"}}']
    assert "Hi" in seen[2][0]
    assert seen[3] == ("Is it good?", ["aaaaaa"])


def test_questions_that_a_reward_cannot_answer() -> None:
    box = {"a": core.Box(instructions="Where?")}
    with pytest.raises(SettingsError, match="cannot answer a Box"):
        model().invoke({"state": "w", "questions": box})
    choice = {"a": core.Choice(instructions="Which?", criteria=CHOICE)}
    with pytest.raises(SettingsError, match="reads='state' has one score, which cannot answer a Choice"):
        model(reads="state").invoke({"state": "w", "questions": choice})
    with pytest.raises(SettingsError, match=r"temprature: .* Did you mean 'temperature'"):
        model(temprature=1)


# --- it drives LangChain's middleware ---


def near(prompt: str, texts: list[str]) -> list[float]:
    """How many words of the question are in the text."""
    return [float(len({*prompt.lower().split()} & {*text.lower().split()})) for text in texts]


async def test_it_routes_an_agent() -> None:
    routing = pytest.importorskip("langchain.agents.middleware.model_router", reason="langchain 1.5 has the router")
    from langchain.agents import create_agent

    router = routing.ModelRouterMiddleware(
        choices={
            "small": routing.ModelChoice(FakeListChatModel(responses=["small"]), "say hello and small talk"),
            "large": routing.ModelChoice(FakeListChatModel(responses=["large"]), "prove a theorem"),
        },
        instructions="Choose.",
        classifier=model(FunctionReward(function=near), prompt_format="{state}"),
    )
    agent = create_agent(FakeListChatModel(responses=["neither"]), middleware=[router])
    for text, expected in (("Please prove a lemma", "large"), ("I say hello", "small")):
        asked: Any = {"messages": [HumanMessage(text)]}
        for answer in (agent.invoke(asked), await agent.ainvoke(asked)):
            assert answer["messages"][-1].content == expected
            assert answer["model_route"].choice == expected


def risk(prompt: str, texts: list[str]) -> list[float]:
    return [5.0 if "secret" in text else -5.0 for text in texts]


def test_it_blocks_the_calls_of_an_agent() -> None:
    guarding = pytest.importorskip("langchain.agents.middleware.auto_mode", reason="langchain 1.5 has auto mode")
    from langchain.agents import create_agent
    from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel

    deleted = []

    def delete(name: str) -> str:
        """Delete a file."""
        deleted.append(name)
        return "done"

    class Calling(FakeMessagesListChatModel):
        def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
            return self

    guard = model(FunctionReward(function=risk), reads="state")
    calls = [{"name": "delete", "args": {"name": name}, "id": name} for name in ("secret", "notes")]
    agent = create_agent(
        Calling(responses=[AIMessage("", tool_calls=calls), AIMessage("done")]),
        [delete],
        middleware=[guarding.AutoModeMiddleware(tools=["delete"], classifier=guard)],
    )
    found = agent.invoke({"messages": [HumanMessage("Tidy up")]})
    assert deleted == ["notes"]
    assert "classified as risky" in next(each.content for each in found["messages"] if each.type == "tool")


# --- a decision model that rewards ---


class Counting(core.BaseDecisionModel):  # type: ignore[misc, name-defined, unused-ignore]
    """p(yes) grows with the length of what it is told."""

    model: str = "counting"
    seen: list[Any]
    fails_at: str = "nothing"

    @property
    def _provider(self) -> str:
        return "test"

    def _classify(self, state: Any, questions: Any) -> Any:
        self.seen.append((state, questions))
        text = state if isinstance(state, str) else state["answer"]
        if self.fails_at in text:
            raise RuntimeError("the provider is down")
        [(name, question)] = questions.items()
        p = len(text) / 1000
        by_type: dict[str, dict[str, Any]] = {
            "noul": {"noul": p}, "choice": {"choice": "a", "probabilities": {"a": p, "b": 1 - p}, "confidence": p},
            "score": {"score": 3 * p, "legend": {}, "probabilities": {}, "confidence": p},
        }  # fmt: skip
        answer = {"type": question.type, **by_type[question.type]}
        usage = {"input_tokens": len(text), "output_tokens": 1}
        return core.ClassifierResponse(model="counting", answers={name: answer}, usage=usage)


OPTIONS = {"type": "choice", "instructions": "Which?", "criteria": {"a": None, "b": "other"}, "wanted": "b"}


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Is it true?", lambda p: math.log(p / (1 - p))),
        (OPTIONS, lambda p: math.log((1 - p) / p)),
        ({"type": "score", "instructions": "How?", "criteria": ["bad", "good"]}, lambda p: 3 * p),
    ],
)
def test_an_answer_is_a_reward(question: Any, expected: Any) -> None:
    counting = Counting(seen=[])
    reward = decisions.DecisionReward(model=counting, question=question)
    texts = ["a", "two words"]
    found = faces.cards_llm().score("Hello", texts, reward, context="a fact")
    assert found == pytest.approx([expected(len(text) / 1000) for text in texts])
    states = [{"message": "Hello", "answer": text, "context": ["a fact"]} for text in texts]
    assert sorted((state["answer"], state) for state, _ in counting.seen) == [(each["answer"], each) for each in states]
    asked = counting.seen[0][1]["answer"].model_dump()
    assert asked["instructions"] == (question if isinstance(question, str) else question["instructions"])


def test_it_guides() -> None:
    """The best of several by the decision model, alone and as a part."""
    counting = Counting(seen=[])
    reward = decisions.DecisionReward(model=counting, prompt_format="{prompt}: {response}", scale=(0.0, 1.0))
    for guide in (reward, MinReward(rewards=[reward, LengthReward(target=10**6, scale=(0.0, 1e-9))])):
        answer = faces.cards_llm(reward=guide, decoding=BestOfN(n=4)).align("Hello", seed=1)
        [kept] = answer.segments
        longest = max(draft.reward for draft in kept.drafts if draft.reward is not None)
        assert answer.reward == longest
    assert counting.seen[0][0].startswith("Hello: ")


async def test_a_failing_request_harms_no_other() -> None:
    llm = faces.cards_llm(decoding=BestOfN(n=2))
    good = decisions.DecisionReward(model=Counting(seen=[]))
    bad = decisions.DecisionReward(model=Counting(seen=[], fails_at=""))
    expected = llm.align("Hello", reward=good, seed=3)
    with pytest.raises(RewardError, match=r"decision counting.*the provider is down"):
        await llm.aalign("Hello", reward=bad, seed=3)
    assert (await llm.aalign("Hello", reward=good, seed=3)).text == expected.text


def test_what_is_paid() -> None:
    reward = decisions.DecisionReward(model=Counting(seen=[]))
    usage = faces.cards_llm(reward=reward, decoding=BestOfN(n=3)).align("Hello", seed=1).usage
    assert usage.rm_forwards == 3
    assert usage.rm_tokens > 0


def test_both_ways_at_once() -> None:
    """A reward as a decision model as a reward gives back the reward, less the threshold."""
    llm = faces.chat_cards()
    inner = model(LengthReward(target=3), llm=llm, reads="state", threshold=-1.0)
    outer = decisions.DecisionReward(model=inner)
    texts = ["one", "one two three", "one two three four"]
    cards = faces.cards_llm()
    plain = cards.score("Hello", texts, LengthReward(target=3))
    assert cards.score("Hello", texts, outer) == pytest.approx([score + 1.0 for score in plain])


def test_settings_that_are_refused() -> None:
    with pytest.raises(SettingsError, match="model"):
        decisions.DecisionReward(model="gpt")
    with pytest.raises(SettingsError, match=r"must contain \{response\}"):
        decisions.DecisionReward(model=Counting(seen=[]), prompt_format="{prompt}")
    with pytest.raises(SettingsError, match=r"The reward\.kind 'decision' is not known"):
        as_reward({"kind": "decision"})
