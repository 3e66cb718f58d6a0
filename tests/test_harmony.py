"""gpt-oss's channels: an answer in one, a call in another, thoughts in a third; the model chooses, or tool_choice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from scripted import ScriptedLanguageModel

from cards_integrations import CardsLLM
from cards_integrations.decoding import BestOfN
from cards_integrations.engine import EngineSettings
from cards_integrations.models.base import Candidate
from cards_integrations.models.local import language_model as local
from cards_integrations.rewards import FunctionReward

SPECIAL = ["<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"]
TEMPLATE = (
    "{% set ns = namespace(name='') %}"
    "{% if tools %}<|start|>developer<|message|>namespace functions { "
    "{% for t in tools %}{{ t.function | tojson }}{% endfor %} }<|end|>{% endif %}"
    "{% for m in messages %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}{% set ns.name = call.name %}"  # the first alone
    "<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>"
    "{{ call.arguments | tojson }}<|call|>"
    "{% elif m.role == 'tool' %}<|start|>functions.{{ ns.name }} to=assistant<|channel|>commentary<|message|>"
    "{{ m.content | tojson }}<|end|>"
    "{% elif m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
THOUGHTS, ANSWER = "I need to add to=functions.add or not.", "It is 42."
CALL = ' to=functions.add <|constrain|>json<|message|>{"a": 17, "b": 25}'
FINAL, COMMENTARY = "<|channel|>final<|message|>", "<|channel|>commentary"
SEEN: list[str] = []


def add(a: int, b: int) -> int:
    """Add two integers."""
    return a + b


def say(text: str) -> str:
    """Say something."""
    return text


def function(name: str, **kinds: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in kinds.items()}
    parameters = {"type": "object", "properties": properties, "required": list(kinds), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [function("add", a="integer", b="integer"), function("say", text="string")]


def reading(prompt: Any, answers: list[str]) -> list[float]:
    """A reward that notes what it reads."""
    SEEN.extend(answers)
    return [0.0] * len(answers)


class Harmonious(ScriptedLanguageModel):
    """Thinks, then calls `add` unless it has a result; it writes each channel in its own phase."""

    wants = "calls"

    def _next(self, candidate: Candidate) -> int:
        before = self.chat.tokenizer.decode(candidate.context.prompt_ids)
        turn = before.rpartition("<|start|>assistant")[2]
        thought = before.endswith("<|end|><|start|>assistant") and THOUGHTS in before[-100:]
        answers = self.wants == "answers" or "to=assistant" in before
        if turn == "<|channel|>analysis<|message|>":
            text = f"{THOUGHTS}<|end|>"
        elif turn == FINAL:
            text = ANSWER
        elif turn == COMMENTARY:
            text = f"{CALL}<|call|>"
        else:
            marks = f"{FINAL}{ANSWER}" if answers else f"{COMMENTARY}{CALL}<|call|>"
            text = marks if thought or self.wants == "off" else "<|channel|>analysis<|message|>"
        self.script = lambda _: text
        return super()._next(candidate)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    tokenizer = tiny.byte_pairs(THOUGHTS + ANSWER + CALL + "commentary final analysis", 600)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.eos_token = "<|return|>"
    tokenizer.chat_template = TEMPLATE
    model = tiny.causal(vocab_size=len(tokenizer), max_position_embeddings=4096)
    ends = [tokenizer.convert_tokens_to_ids(mark) for mark in ("<|return|>", "<|call|>")]
    model.generation_config.eos_token_id = model.config.eos_token_id = ends
    return tiny.save(tmp_path_factory.mktemp("harmony"), model, tokenizer)


@pytest.fixture
def llm(path: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[CardsLLM]:
    kind = type("OneHarmonious", (Harmonious,), {"wants": getattr(request, "param", "calls")})
    monkeypatch.setattr(local, "LocalLanguageModel", kind)
    SEEN.clear()
    engine = EngineSettings(dtype="float32")
    options: dict[str, Any] = {"reward": FunctionReward(function=reading), "decoding": BestOfN(n=2), "max_tokens": 64}
    with CardsLLM(model=path, engine=engine, seed=1, **options) as llm:
        yield llm


def before(llm: CardsLLM, answer: Any) -> str:
    return str(llm._engine({}).loaded().chat.tokenizer.decode(answer.prompt_ids))


@pytest.mark.parametrize("thinking", [None, "off"])
@pytest.mark.parametrize("llm", ["calls"], indirect=True)
def test_a_call_in_the_commentary_channel_is_read(llm: CardsLLM, thinking: Any) -> None:
    if thinking == "off":
        llm._engine({}).loaded().wants = "off"  # type: ignore[attr-defined]
    answer = llm.align("17 + 25?", tools=TOOLS, thinking=thinking)
    [call] = answer.tool_calls
    assert (call.name, call.arguments) == ("add", {"a": 17, "b": 25})
    assert (answer.text, answer.content, answer.finish_reason) == (CALL, "", "stop")
    thoughts = "" if thinking else f"<|channel|>analysis<|message|>{THOUGHTS}<|end|><|start|>assistant"
    assert before(llm, answer).endswith(f"<|end|><|start|>assistant{thoughts}{COMMENTARY}")


@pytest.mark.parametrize("llm", ["answers"], indirect=True)
def test_an_answer_is_in_the_final_channel_and_no_mark_is_part_of_it(llm: CardsLLM) -> None:
    for options in ({}, {"tools": TOOLS}, {"tools": [{**TOOLS[0], "strict": True}]}):
        answer = llm.align("17 + 25?", **options)
        assert (answer.text, answer.content, answer.thoughts, answer.tool_calls) == (ANSWER, ANSWER, THOUGHTS, ())
        assert before(llm, answer).endswith(FINAL)
    assert set(SEEN) == {ANSWER}


@pytest.mark.parametrize("llm", ["answers"], indirect=True)
@pytest.mark.parametrize(("choice", "name"), [("any", "add"), ("add", "add"), ("say", "say")])
def test_a_call_that_is_asked_for_is_written_whatever_the_model_wants(llm: CardsLLM, choice: str, name: str) -> None:
    answer = llm.align("17 + 25?", tools=TOOLS, tool_choice=choice)
    [call] = answer.tool_calls
    assert call.name == name
    assert set(call.arguments) == set(TOOLS[name == "say"]["function"]["parameters"]["properties"])


@pytest.mark.parametrize("llm", ["answers"], indirect=True)
def test_json_beside_tools_is_in_the_final_channel(llm: CardsLLM) -> None:
    schema = {"type": "object", "properties": {"n": {"const": 42}}, "required": ["n"], "additionalProperties": False}
    answer = llm.align("17 + 25?", tools=TOOLS, response_format=schema)
    assert (json.loads(answer.text), answer.tool_calls) == ({"n": 42}, ())


def test_a_schema_that_no_grammar_holds_harms_no_call(llm: CardsLLM) -> None:
    bad = function("bad")
    bad["function"]["parameters"] = {"type": "object", "properties": {"x": {"allOf": [{"type": "string"}, False]}}}
    bad["function"]["parameters"]["required"] = ["x"]
    [call] = llm.align("17 + 25?", tools=[bad, *TOOLS]).tool_calls
    assert (call.name, call.arguments) == ("add", {"a": 17, "b": 25})


def test_history_is_written_as_the_template_has_it(llm: CardsLLM) -> None:
    called = [{"name": "add", "args": {"a": 1, "b": n}, "id": f"call{n}"} for n in (2, 3)]
    history = [
        HumanMessage("1 + 2? 1 + 3?"),
        AIMessage("", tool_calls=called, additional_kwargs={"reasoning_content": "Both."}),
        *(ToolMessage(str(1 + n), tool_call_id=f"call{n}") for n in (2, 3)),
    ]
    message = llm.as_langchain().bind_tools([add, say]).invoke(history)
    assert (message.content, message.tool_calls) == (ANSWER, [])
    text = (
        llm._engine({})
        .loaded()
        .chat.prompt(
            [
                {"role": "user", "content": "1 + 2? 1 + 3?"},
                {"role": "assistant", "content": "", "tool_calls": [_as_openai(call) for call in called]},
                *({"role": "tool", "content": str(1 + n), "tool_call_id": f"call{n}", "name": "add"} for n in (2, 3)),
            ]
        )[0]
    )
    parts = [
        f'<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{{"a": 1, "b": {n}}}<|call|>'
        f'<|start|>functions.add to=assistant<|channel|>commentary<|message|>"{1 + n}"<|end|>'
        for n in (2, 3)
    ]  # fmt: skip
    assert text.endswith("".join(parts) + "<|start|>assistant")


def _as_openai(call: dict[str, Any]) -> dict[str, Any]:
    return {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["args"]}}


def test_an_agent_calls_and_then_answers(llm: CardsLLM) -> None:
    found = create_agent(llm.as_langchain(), [add]).invoke({"messages": [HumanMessage("17 + 25?")]})["messages"]
    assert [type(message).__name__ for message in found] == ["HumanMessage", "AIMessage", "ToolMessage", "AIMessage"]
    assert found[2].content == "42"
    assert found[3].content == ANSWER


def test_streams_tell_calls_and_no_marks(llm: CardsLLM) -> None:
    chunks = list(llm.as_langchain().bind_tools([add]).stream("17 + 25?"))
    whole = sum(chunks[1:], chunks[0])
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [("add", {"a": 17, "b": 25})]
    assert whole.text == ""
    assert whole.additional_kwargs["reasoning_content"] == THOUGHTS
