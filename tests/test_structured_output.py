"""Structured output is whole, or said not to be: stop strings, options with `include_raw`, forms, streams."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, Literal

import pytest
import scripted
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, HttpUrl, NaiveDatetime
from told import THEN, as_told, call, dumps

from cards_integrations import CardsLLM, ChatCards
from cards_integrations.decoding import Cards, FixedLength
from cards_integrations.errors import SettingsError
from cards_integrations.langchain.convert import tool_schemas as langchain_tools
from cards_integrations.llama_index.convert import tool_schemas as llama_index_tools
from cards_integrations.rewards import LengthReward

TEXT = PromptTemplate("{text}")


class Note(BaseModel):
    """A note."""

    title: str
    body: str = ""


class Sum(BaseModel):
    """A sum."""

    total: int


class Part(BaseModel):
    size: int
    name: str


class Machine(BaseModel):
    number: int = Field(7, alias="no")
    tags: list[str] = ["none"]
    parts: list[Part] = []
    main: Part | None = None


NOTE = {"title": "User: guide", "body": "Read it."}
MACHINE = {
    "no": 12345, "tags": ["x", "yy"], "parts": [{"size": 10, "name": "a"}, {"size": 200, "name": "bb"}],
    "main": {"size": 33, "name": "cc"},
}  # fmt: skip


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with scripted.scripted(tmp_path_factory.mktemp("model"), as_told) as options:
        yield {**options, "reward": None, "decoding": "sampling", "temperature": 0, "seed": 7}


@pytest.fixture(scope="module")
def chat(options: dict[str, Any]) -> ChatCards:
    return ChatCards(**options)


@pytest.fixture(scope="module")
def llm(options: dict[str, Any]) -> CardsLLM:
    return CardsLLM(**options)


# --- stop strings ---


@pytest.mark.parametrize("stop", ["User:", "\n", "}"])
def test_stop_strings_end_nothing_within_a_schema_or_a_call(chat: ChatCards, llm: CardsLLM, stop: str) -> None:
    asked, called = dumps(NOTE), call("Note", **NOTE)
    assert chat.with_structured_output(Note, stop=[stop]).invoke(asked) == Note(**NOTE)
    assert chat.with_structured_output(Note, method="function_calling", stop=[stop]).invoke(called) == Note(**NOTE)
    assert chat.bind_tools([Note], tool_choice="any", stop=[stop]).invoke(called).tool_calls[0]["args"] == NOTE
    assert llm.structured_predict(Note, TEXT, llm_kwargs={"stop": [stop]}, text=asked) == Note(**NOTE)
    answer = llm.align(asked, response_format=Note, stop=[stop])
    assert (answer.text, answer.finish_reason) == (asked, "stop")


def test_stop_strings_end_what_is_beside_a_call(chat: ChatCards) -> None:
    called = call("Note", **NOTE)
    bound = chat.bind_tools([Note])
    found = bound.invoke(f"I write it. {called} END and more", stop=["User:", "END"])
    assert [each["args"] for each in found.tool_calls] == [NOTE]
    assert found.response_metadata["finish_reason"] == "stop"
    assert "more" not in found.content
    lines = bound.invoke(called, stop=["\n"])
    assert [each["args"] for each in lines.tool_calls] == [NOTE]
    before = bound.invoke(f"I write. END {called}", stop=["END"])
    assert (before.content, before.tool_calls) == ("I write. ", [])


def test_a_stream_with_stop_strings_has_the_whole_call(chat: ChatCards) -> None:
    first, *rest = chat.bind_tools([Note]).stream(call("Note", **NOTE), stop=["User:", "body"])
    assert sum(rest, first).tool_calls[0]["args"] == NOTE


# --- LangChain ---


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
async def test_include_raw_takes_the_options_of_a_call(chat: ChatCards, method: Any) -> None:
    form = chat.with_structured_output(Note, method=method, include_raw=True)
    asked = call("Note", **NOTE) if method == "function_calling" else dumps(NOTE)
    for found in (form.invoke(asked), await form.ainvoke(asked), form.batch([asked])[0]):
        assert (found["parsed"], found["parsing_error"]) == (Note(**NOTE), None)
    cut = [form.invoke(asked, max_tokens=4), await form.ainvoke(asked, max_tokens=4)]
    for found in cut:
        assert found["raw"].usage_metadata["output_tokens"] <= 4
        assert found["parsed"] is None
        assert found["parsing_error"] is not None


async def test_include_raw_streams_the_message_before_the_object(chat: ChatCards) -> None:
    form = chat.with_structured_output(Note, include_raw=True)
    for pieces in ([*form.stream(dumps(NOTE), seed=3)], [each async for each in form.astream(dumps(NOTE), seed=3)]):
        assert len(pieces) > 2
        assert all(piece.keys() == {"raw"} for piece in pieces[:-1])
        whole = pieces[0]
        for piece in pieces[1:]:
            whole = whole + piece
        assert whole["raw"].content == dumps(NOTE)
        assert whole["parsed"] == Note(**NOTE)


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def test_an_agent_fills_in_one_form(chat: ChatCards) -> None:
    twice = call("Sum", total=3) + "\n" + call("Sum", total=4)
    agent: Any = create_agent(chat, [], response_format=ToolStrategy(Sum))
    assert agent.invoke({"messages": [("user", twice)]}, {"recursion_limit": 3})["structured_response"] == Sum(total=3)
    agent = create_agent(chat, [add], response_format=ToolStrategy(Sum | Note))
    asked = call("add", a=1, b=2) + THEN + call("Note", **NOTE) + "\n" + call("Sum", total=3)
    assert agent.invoke({"messages": [("user", asked)]})["structured_response"] == Note(**NOTE)


@pytest.mark.parametrize("response_format", [Sum, ProviderStrategy(Sum), ProviderStrategy(Sum, strict=True)])
def test_an_agent_answers_by_the_provider(chat: ChatCards, response_format: Any) -> None:
    agent: Any = create_agent(chat, [add], response_format=response_format)
    asked = call("add", a=1, b=2) + THEN + dumps({"total": 3})
    assert agent.invoke({"messages": [("user", asked)]})["structured_response"] == Sum(total=3)


def function(name: str, **field: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"x": field}}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


def test_a_tool_that_cannot_be_held_is_refused_when_it_is_given_and_harms_no_other(chat: ChatCards) -> None:
    good, bad = function("good", type="integer"), function("bad", type="widget")
    for given in ({"tool_choice": "any"}, {"strict": True}, {"response_format": Sum}):
        with pytest.raises(SettingsError, match=r"tool 'bad'.*field 'x'.*widget"):
            chat.bind_tools([good, bad], **given)
    named = chat.bind_tools([good, bad], tool_choice="good")
    assert named.invoke(call("good", x=1)).tool_calls[0]["args"] == {"x": 1}
    free = chat.bind_tools([good, bad])
    assert [each["name"] for each in free.invoke(call("bad", x=1)).tool_calls] == ["bad"]


@pytest.mark.parametrize(
    "field",
    [
        {"type": "string", "format": "uri-reference"}, {"type": "string", "format": "path"},
        {"type": "array", "uniqueItems": True}, {"type": "string", "pattern": r"^(?!b)a\b"}, {"not": {"type": "null"}},
        {"type": "number", "multipleOf": 1234567}, {"oneOf": [{"type": "string"}, {"minLength": 2}]},
        {"type": "object", "propertyNames": {"pattern": "^(?=a)"}},
    ],
)  # fmt: skip
def test_what_no_grammar_holds_harms_no_tool(chat: ChatCards, field: dict[str, Any]) -> None:
    bound = chat.bind_tools([function("good", type="integer"), function("other", **field)], tool_choice="any")
    assert bound.invoke(call("good", x=1)).tool_calls[0]["args"] == {"x": 1}


def test_a_schema_that_cannot_be_held_is_refused_when_it_is_given(chat: ChatCards, llm: CardsLLM) -> None:
    class Never(BaseModel):
        x: str = Field(min_length=5, max_length=3)

    with pytest.raises(SettingsError, match="field 'x'"):
        chat.with_structured_output(Never)
    with pytest.raises(SettingsError, match="field 'x'"):
        chat.with_structured_output(Never, method="function_calling")
    with pytest.raises(SettingsError, match="field 'x'"):
        llm.as_structured_llm(Never)


# --- LlamaIndex ---


@pytest.mark.parametrize(
    "own", [{"tool_choice": "required"}, {"tool_required": True}, {"allow_parallel_tool_calls": False}]
)
async def test_options_of_tools_say_nothing_where_there_are_none(llm: CardsLLM, own: dict[str, Any]) -> None:
    asked, messages = dumps(NOTE), [ChatMessage(content=dumps(NOTE))]
    structured = llm.as_structured_llm(Note)
    found: list[Any] = [
        llm.structured_predict(Note, TEXT, llm_kwargs=own, text=asked),
        await llm.astructured_predict(Note, TEXT, llm_kwargs=own, text=asked),
        list(llm.stream_structured_predict(Note, TEXT, llm_kwargs=own, text=asked))[-1],
        structured.chat(messages, **own).raw,
        (await structured.achat(messages, **own)).raw,
    ]
    assert found == [Note(**NOTE)] * 5


def has(after: Any, before: Any) -> bool:
    """True if a value has all that an earlier one had: a text may have grown, and so may a list."""
    if before is None:
        return True
    if isinstance(before, dict):
        return isinstance(after, dict) and all(has(after.get(key), value) for key, value in before.items())
    if isinstance(before, list):
        return isinstance(after, list) and len(after) >= len(before) and all(map(has, after, before))
    return after.startswith(before) if isinstance(before, str) else after == before


@pytest.mark.parametrize("length", [1, 2, 3])
async def test_streamed_objects_never_go_back(llm: CardsLLM, length: int) -> None:
    by_length = Cards(target_reward=1.0, beta=1.0, max_rejections=1, boundary=FixedLength(length=length))
    own = {"decoding": by_length, "reward": LengthReward(target=40)}
    seen: list[Any] = list(llm.stream_structured_predict(Machine, TEXT, llm_kwargs=own, text=dumps(MACHINE)))
    assert seen[-1] == Machine.model_validate(MACHINE)
    dumped = [each.model_dump() for each in seen]
    assert [(a, b) for a, b in pairwise(dumped) if not has(b, a)] == []
    assert seen[0].tags is None  # not the default of what is not there yet
    assert any(each.main is not None and each.main.name is None for each in seen[:-1])  # a part of an object
    again = [
        each async for each in await llm.astream_structured_predict(Machine, TEXT, llm_kwargs=own, text=dumps(MACHINE))
    ]
    assert [each.model_dump() for each in again] == dumped


class Circle(BaseModel):
    kind: Literal["circle"]
    radius: int = 1


class Square(BaseModel):
    kind: Literal["square"]
    side: Part | None = None


Shape = Annotated[Circle | Square, Field(discriminator="kind")]


class Drawing(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    number: int = Field(validation_alias=AliasChoices("no", "number"))
    shape: Shape
    more: list[Shape] | None = None
    named: dict[str, Shape] = {}
    pair: tuple[int, Shape] | None = None


SQUARE = {"kind": "square", "side": {"size": 1, "name": "s"}}
DRAWING = {"no": 1, "shape": SQUARE, "more": [SQUARE], "named": {"x": SQUARE}, "pair": [1, SQUARE]}


def test_streamed_objects_know_their_classes_among_others(llm: CardsLLM) -> None:
    by_length = Cards(target_reward=1.0, beta=1.0, max_rejections=1, boundary=FixedLength(length=2))
    own = {"decoding": by_length, "reward": LengthReward(target=40)}
    seen: list[Any] = list(llm.stream_structured_predict(Drawing, TEXT, llm_kwargs=own, text=dumps(DRAWING)))
    assert seen[-1] == Drawing.model_validate(DRAWING)
    for last in (seen[-2], seen[-1]):
        squares = [last.shape, last.more[0], last.named["x"], last.pair[1]]
        assert {type(each).__name__.removeprefix("Flexible") for each in squares} == {"Square"}
        assert [each.side.name for each in squares] == ["s"] * 4
    assert {each.number for each in seen} <= {None, 1}
    assert not any(isinstance(each.shape, BaseModel) and hasattr(each.shape, "radius") for each in seen)


# --- tools of classes ---


def test_tools_say_what_their_classes_take(chat: ChatCards) -> None:
    class Visit(BaseModel):
        """Visit a page."""

        url: HttpUrl
        when: NaiveDatetime

    @tool
    def visit(url: HttpUrl, when: NaiveDatetime) -> str:
        """Visit a page."""
        return str(url)

    def visit_page(url: HttpUrl, when: NaiveDatetime) -> str:
        """Visit a page."""
        return str(url)

    described = [
        *langchain_tools([Visit, visit]),
        *llama_index_tools([FunctionTool.from_defaults(visit_page, fn_schema=Visit)]),
    ]
    for each in described:
        fields = each["function"]["parameters"]["properties"]
        assert fields["url"]["pattern"] == "^(?:http|https):"
        assert fields["when"]["pattern"] == "(?:^|[Tt])[0-9:.]+$"
    assert langchain_tools([Note, add]) == [convert_to_openai_tool(Note), convert_to_openai_tool(add)]
