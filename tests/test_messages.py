"""What callers of both frameworks say of messages, tools and formats, and what the core makes of it."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Required

import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    HumanMessageChunk,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.messages.utils import convert_to_messages
from langchain_core.tools import StructuredTool, tool
from llama_index.core.base.llms.types import ChatMessage as LlamaIndexMessage
from llama_index.core.base.llms.types import (
    CitableBlock,
    DocumentBlock,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.tools import FunctionTool, ToolMetadata
from pydantic import AliasChoices, AliasPath, BaseModel, ConfigDict, Field, RootModel, create_model
from pydantic.v1 import BaseModel as OldBaseModel
from typing_extensions import TypedDict

from cards_integrations.chat.grammar import Grammar
from cards_integrations.chat.message import Message
from cards_integrations.chat.response_format import ResponseFormat, as_response_format
from cards_integrations.chat.schema import held_schema
from cards_integrations.chat.template import FormattedPrompt
from cards_integrations.chat.tools import Tools, as_tools
from cards_integrations.decoding import Sampling
from cards_integrations.errors import PromptError, SettingsError
from cards_integrations.langchain import convert
from cards_integrations.langchain.chat_model import ChatCards
from cards_integrations.langchain.convert import convert_options, json_schema
from cards_integrations.llama_index.convert import describe_tools
from cards_integrations.llm import as_prompt
from cards_integrations.settings import Options


def kind(value: object) -> str:
    """A name that is the same in every process, for the ids of tests."""
    return str(getattr(value, "__name__", type(value).__name__))


def as_chat(messages: list[Any]) -> list[Message]:
    prompt = as_prompt(messages)
    assert isinstance(prompt, list)
    return prompt


def call(call_id: str | None, name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": call_id, "function": {"name": name, "arguments": arguments}}


ARGUMENTS = {"city": "Köln", "days": [1, {"x": None}]}
SAID = {"role": "assistant", "content": "One moment.", "tool_calls": [call("id1", "get_weather", ARGUMENTS)]}
RESULT = {"role": "tool", "content": "sunny", "tool_call_id": "id1", "name": "get_weather"}

# --- calls ---

OPENAI = {"id": "id1", "type": "function", "function": {"name": "get_weather", "arguments": json.dumps(ARGUMENTS)}}
LANGCHAIN = tool_call(id="id1", name="get_weather", args=ARGUMENTS)
TOOL_CALL: Any = {**LANGCHAIN, "type": "tool_call"}
BLOCK = ToolCallBlock(tool_call_id="id1", tool_name="get_weather", tool_kwargs=ARGUMENTS)


@pytest.mark.parametrize(
    "message",
    [
        AIMessage("One moment.", tool_calls=[LANGCHAIN]),
        AIMessage([{"type": "text", "text": "One moment."}], tool_calls=[LANGCHAIN]),
        AIMessage(
            ["One ", {"type": "text", "text": "moment."},
             {"type": "tool_use", "id": "id1", "name": "get_weather", "input": ARGUMENTS}],
            tool_calls=[LANGCHAIN],
        ),
        AIMessage(content_blocks=[{"type": "text", "text": "One moment."}, TOOL_CALL]),
        AIMessage([{"type": "text", "text": "One moment."}, TOOL_CALL]),
        AIMessage(["One moment.", {"type": "tool_use", "id": "id1", "name": "get_weather", "input": ARGUMENTS}]),
        {"role": "assistant", "content": [
            {"type": "text", "text": "One moment."},
            {"type": "function_call", "call_id": "id1", "name": "get_weather", "arguments": json.dumps(ARGUMENTS)},
        ]},
        AIMessage("One moment.", additional_kwargs={"tool_calls": [OPENAI]}),
        LlamaIndexMessage(role=MessageRole.ASSISTANT, blocks=[TextBlock(text="One moment."), BLOCK]),
        LlamaIndexMessage(
            role=MessageRole.ASSISTANT,
            blocks=[ThinkingBlock(content=""), TextBlock(text="One "), TextBlock(text="moment."), BLOCK],
        ),
        LlamaIndexMessage(
            role=MessageRole.ASSISTANT,
            blocks=[
                TextBlock(text="One moment."),
                ToolCallBlock(tool_call_id="id1", tool_name="get_weather", tool_kwargs=json.dumps(ARGUMENTS)),
            ],
        ),
        {"role": "assistant", "content": "One moment.", "tool_calls": [OPENAI]},
        {"role": "assistant", "content": [{"type": "text", "text": "One moment."}], "tool_calls": [OPENAI]},
        {"role": "ai", "content": "One moment.", "tool_calls": [LANGCHAIN]},
        SAID,
    ],
)  # fmt: skip
def test_calls_of_every_form(message: Any) -> None:
    [found] = as_chat([message])
    assert found == SAID
    assert list(found["tool_calls"][0]["function"]["arguments"]) == ["city", "days"]  # in their order


def test_chunks_of_a_stream_are_messages() -> None:
    chunks = [
        AIMessageChunk(content="One "),
        AIMessageChunk(content="moment."),
        AIMessageChunk(
            content="", tool_call_chunks=[tool_call_chunk(id="id1", name="get_weather", args=None, index=0)]
        ),
        AIMessageChunk(content="", tool_call_chunks=[tool_call_chunk(args=json.dumps(ARGUMENTS), index=0)]),
    ]
    assert as_prompt([sum(chunks[1:], chunks[0])]) == [SAID]
    assert as_prompt([HumanMessageChunk(content="Hi.")]) == [{"role": "user", "content": "Hi."}]


@pytest.mark.parametrize(
    "message",
    [
        AIMessage("", tool_calls=[LANGCHAIN]),
        AIMessage([], tool_calls=[LANGCHAIN]),
        LlamaIndexMessage(role=MessageRole.ASSISTANT, content=None, blocks=[BLOCK]),
        {"role": "assistant", "content": None, "tool_calls": [OPENAI]},
        {"role": "assistant", "content": "", "tool_calls": [OPENAI]},
        {"role": "assistant", "tool_calls": [OPENAI]},
        {"role": "assistant", "tool_calls": [LANGCHAIN]},
    ],
)
def test_calls_without_a_word(message: Any) -> None:
    assert as_prompt([message]) == [{**SAID, "content": ""}]


def test_several_calls_keep_their_order() -> None:
    calls = [tool_call(id=f"id{i}", name=f"f{i}", args={"i": i}) for i in range(3)]
    blocks = [ToolCallBlock(tool_call_id=f"id{i}", tool_name=f"f{i}", tool_kwargs={"i": i}) for i in range(3)]
    expected = [call(f"id{i}", f"f{i}", {"i": i}) for i in range(3)]
    assert as_chat([AIMessage("", tool_calls=calls)])[0]["tool_calls"] == expected
    assert as_chat([LlamaIndexMessage(role="assistant", blocks=blocks)])[0]["tool_calls"] == expected
    assert as_chat([{"role": "assistant", "tool_calls": calls}])[0]["tool_calls"] == expected


@pytest.mark.parametrize("message", [AIMessage("Hi."), AIMessage("Hi.", tool_calls=[]), ("ai", "Hi.")])
def test_no_calls_are_no_key(message: Any) -> None:
    assert as_prompt([message]) == [{"role": "assistant", "content": "Hi."}]
    assert as_prompt([{"role": "assistant", "content": "Hi.", "tool_calls": None}]) == as_prompt([message])
    assert as_prompt([{"role": "assistant", "content": "Hi.", "tool_calls": []}]) == as_prompt([message])


@pytest.mark.parametrize("arguments", ["{city: Köln", "Köln", "{'city': 1}"])
def test_arguments_that_are_no_json_are_said_as_well_as_it_can_be(arguments: str) -> None:
    broken = {"id": "id1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    block = ToolCallBlock(tool_call_id="id1", tool_name="f", tool_kwargs=arguments)
    expected = [call("id1", "f", {"input": arguments})]
    assert as_chat([{"role": "assistant", "tool_calls": [broken]}])[0]["tool_calls"] == expected
    assert as_chat([LlamaIndexMessage(role="assistant", blocks=[block])])[0]["tool_calls"] == expected


def test_an_empty_string_is_no_arguments() -> None:
    found = {"id": "id1", "type": "function", "function": {"name": "now", "arguments": ""}}
    assert as_chat([{"role": "assistant", "tool_calls": [found]}])[0]["tool_calls"] == [call("id1", "now", {})]


def test_the_prompt_is_a_copy() -> None:
    given = {"role": "tool", "content": "sunny", "tool_call_id": "id1"}
    assert as_chat([SAID, given])[1]["name"] == "get_weather"
    assert "name" not in given


def test_invalid_calls_are_part_of_the_history() -> None:
    wrong = invalid_tool_call(id="id1", name="get_weather", args="{city", error="not JSON")
    found = as_chat([AIMessage("", invalid_tool_calls=[wrong]), ToolMessage("not JSON", tool_call_id="id1")])
    assert found[0]["tool_calls"] == [call("id1", "get_weather", {"input": "{city"})]
    assert found[1]["name"] == "get_weather"


def test_invalid_calls_beside_valid_ones() -> None:
    wrong = invalid_tool_call(id="id2", name="f", args="{city", error="not JSON")
    [found] = as_chat([AIMessage("One moment.", tool_calls=[LANGCHAIN], invalid_tool_calls=[wrong])])
    assert found["content"] == "One moment."
    assert found["tool_calls"][0] == SAID["tool_calls"][0]


# --- results ---


@pytest.mark.parametrize(
    "message",
    [
        ToolMessage("sunny", tool_call_id="id1"),
        ToolMessage("sunny", tool_call_id="id1", name="get_weather"),
        ToolMessage("sunny", tool_call_id="id1", artifact={"not": "said"}),
        ToolMessage([{"type": "text", "text": "sunny"}, ""], tool_call_id="id1"),
        LlamaIndexMessage(role=MessageRole.TOOL, content="sunny", additional_kwargs={"tool_call_id": "id1"}),
        LlamaIndexMessage(
            role=MessageRole.TOOL,
            blocks=[TextBlock(text="sunny"), TextBlock(text="")],
            additional_kwargs={"tool_call_id": "id1", "name": "get_weather"},
        ),
        {"role": "tool", "content": "sunny", "tool_call_id": "id1"},
        {"role": "tool", "content": "sunny", "tool_call_id": "id1", "name": "get_weather", "more": 1},
    ],
)
def test_results_of_every_form(message: Any) -> None:
    assert as_prompt([SAID, message]) == [SAID, RESULT]


def test_a_result_that_is_an_error_is_told() -> None:
    message = ToolMessage("ValueError: no such city", tool_call_id="id1", status="error")
    assert as_chat([SAID, message])[1] == {**RESULT, "content": "ValueError: no such city"}


@pytest.mark.parametrize(
    "message",
    [
        FunctionMessage(content="sunny", name="get_weather"),
        {"role": "function", "name": "get_weather", "content": "sunny"},
        LlamaIndexMessage(role=MessageRole.FUNCTION, content="sunny", additional_kwargs={"name": "get_weather"}),
    ],
)
def test_results_of_functions(message: Any) -> None:
    [_, found] = as_chat([SAID, message])
    assert (found["role"], found["name"], found["content"]) == ("tool", "get_weather", "sunny")
    assert found.get("tool_call_id") is None


def test_names_of_results_are_found_by_their_ids() -> None:
    calls = [tool_call(id=f"id{i}", name=f"f{i}", args={}) for i in range(3)]
    results = [ToolMessage(f"r{i}", tool_call_id=f"id{i}") for i in (2, 0, 1)]
    own = ToolMessage("r", tool_call_id="id0", name="own")
    found = as_chat([HumanMessage("Go."), AIMessage("", tool_calls=calls), *results, own])
    assert [message["name"] for message in found[2:]] == ["f2", "f0", "f1", "own"]


@pytest.mark.parametrize("call_id", [None, "id9", ""])
def test_results_of_no_call_have_a_name_too(call_id: str | None) -> None:
    [_, found] = as_chat([SAID, {"role": "tool", "content": "sunny", "tool_call_id": call_id}])
    assert found["name"] == "tool"


def test_an_empty_result_stays() -> None:
    found = as_chat([SAID, ToolMessage("", tool_call_id="id1")])
    assert found == [SAID, {**RESULT, "content": ""}]


def test_ids_that_are_used_again_in_a_later_turn() -> None:
    found = as_chat(
        [
            AIMessage("", tool_calls=[tool_call(id="0", name="first", args={})]),
            ToolMessage("a", tool_call_id="0"),
            AIMessage("", tool_calls=[tool_call(id="0", name="second", args={})]),
            ToolMessage("b", tool_call_id="0"),
        ]
    )
    assert [message["name"] for message in found[1::2]] == ["first", "second"]


# --- other messages ---


@pytest.mark.parametrize(
    ("message", "role"),
    [
        (HumanMessage("x"), "user"),
        (SystemMessage("x"), "system"),
        (ChatMessage(content="x", role="developer"), "system"),
        (LlamaIndexMessage(role="model", content="x"), "assistant"),
        (LlamaIndexMessage(role="chatbot", content="x"), "assistant"),
        (("human", "x"), "user"),
        (("developer", [{"type": "text", "text": "x"}]), "system"),
        ({"role": "model", "content": ["x"]}, "assistant"),
    ],
)
def test_roles(message: Any, role: str) -> None:
    assert as_prompt([message]) == [{"role": role, "content": "x"}]


@pytest.mark.parametrize("kind", [
    "reasoning", "thinking", "redacted_thinking", "tool_use", "input_json_delta", "server_tool_call",
    "server_tool_result", "web_search_tool_result", "web_search_call", "mcp_call",
])  # fmt: skip
def test_parts_that_are_not_said(kind: str) -> None:
    [found] = as_chat([AIMessage([{"type": kind, "text": "y", "thinking": "y"}, {"type": "text", "text": "x"}])])
    assert found["content"] == "x"


@pytest.mark.parametrize(
    ("block", "text"),
    [
        ({"type": "file", "source_type": "text", "text": "Read.", "mime_type": "text/plain"}, "Read."),
        ({"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "Read."}}, "Read."),
        ({"type": "document", "title": "A", "source": {"type": "content", "content": "Read."}}, "A\nRead."),
        ({"type": "search_result", "source": "u", "title": "A", "content": [{"type": "text", "text": "Read."}]},
         "A\nu\nRead."),
        ({"type": "guard_content", "guard_content": {"text": "Read."}}, "Read."),
        ({"type": "text-plain", "mime_type": "text/plain", "base64": "UmVhZC4="}, "Read."),
        ({"type": "file", "mime_type": "text/markdown", "base64": "UmVhZC4="}, "Read."),
        ({"type": "json", "json": {"café": [1, None]}}, '{"café": [1, null]}'),
        ({"type": "custom_tool_call_output", "output": "Read."}, "Read."),
        ({"type": "function_call_output", "output": [{"type": "input_text", "text": "Read."}]}, "Read."),
        ({"cachePoint": {"type": "default"}}, ""),
        ({"type": "web_fetch_tool_result", "tool_use_id": "1", "content": {}}, ""),
        ({"type": "reasoning_content", "reasoning_content": {"text": "Hm."}}, ""),
    ],
)  # fmt: skip
def test_blocks_that_hold_text(block: dict[str, Any], text: str) -> None:
    content: list[Any] = [block, {"type": "text", "text": "!"}]
    for message in (
        HumanMessage(content),
        ToolMessage(content, tool_call_id="1"),
        {"role": "user", "content": content},
    ):
        assert as_chat([message])[0]["content"] == (f"{text}\n!" if text else "!")
    thoughts = as_chat([AIMessage(content)])[0].get("reasoning_content")
    assert thoughts == ("Hm." if block.get("type") == "reasoning_content" else None)


def test_a_file_that_is_no_base64_is_refused() -> None:
    with pytest.raises(PromptError, match="base64"):
        as_chat([HumanMessage([{"type": "file", "mime_type": "text/plain", "base64": "UmVhZC4"}])])


@pytest.mark.parametrize(
    "form",
    [
        lambda role, texts: {"role": role, "content": [{"type": "text", "text": text} for text in texts]},
        lambda role, texts: (role, list(texts)),
        lambda role, texts: convert_to_messages([(role, list(texts))])[0],
        lambda role, texts: LlamaIndexMessage(role=role, blocks=[TextBlock(text=text) for text in texts]),
    ],
)
def test_texts_of_blocks_run_on_in_answers_only(form: Any) -> None:
    for role in ("system", "user"):
        assert as_chat([form(role, ["Snow fell.", "", "Who fell?"])])[0]["content"] == "Snow fell.\nWho fell?"
    assert as_chat([form("assistant", ["Snow", " fell."])])[0]["content"] == "Snow fell."


def test_results_of_several_parts_are_lines() -> None:
    texts = ["row 1", "row 2"]
    for message in (
        ToolMessage([{"type": "text", "text": text} for text in texts], tool_call_id="1"),
        LlamaIndexMessage(role="tool", blocks=[TextBlock(text=text) for text in texts]),
    ):
        assert as_chat([message])[0]["content"] == "row 1\nrow 2"


def test_a_document_of_llama_index_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Café.", "utf-8")
    assert as_chat([LlamaIndexMessage(blocks=[DocumentBlock(path=tmp_path / "notes.txt")])])[0]["content"] == "Café."
    (tmp_path / "notes.zip").write_bytes(b"PK")
    with pytest.raises(PromptError, match="document"):
        as_chat([LlamaIndexMessage(blocks=[DocumentBlock(path=tmp_path / "notes.zip")])])


def test_a_citable_block_says_whence_it_is() -> None:
    block = CitableBlock(title="A", source="u", content=[TextBlock(text="Read."), TextBlock(text="More.")])
    assert as_chat([LlamaIndexMessage(blocks=[block])])[0]["content"] == "A\nu\nRead.\nMore."


def test_a_document_of_llama_index_may_be_text() -> None:
    message = LlamaIndexMessage(blocks=[DocumentBlock(data="Café.".encode(), document_mimetype="text/plain")])
    assert as_chat([message]) == [{"role": "user", "content": "Café."}]
    with pytest.raises(PromptError, match="document"):
        as_chat([LlamaIndexMessage(blocks=[DocumentBlock(data=b"%PDF", document_mimetype="application/pdf")])])


@pytest.mark.parametrize(
    "form",
    [
        lambda role, content: {"role": role, "content": content},
        lambda role, content: convert_to_messages([(role, content)])[0],
    ],
)
def test_results_within_a_message_of_the_user(form: Any) -> None:
    use = {"type": "tool_use", "id": "id1", "name": "get_weather", "input": ARGUMENTS}
    results = [
        {"type": "tool_result", "tool_use_id": "id1", "content": "sunny"},
        {"type": "tool_result", "tool_use_id": "id2", "content": [{"type": "text", "text": "rainy"}]},
    ]
    said = [{"type": "text", "text": "And now?"}]
    calls = form("assistant", [use, {**use, "id": "id2"}])
    found = as_chat([calls, form("user", [*results, *said])])
    assert [(each["role"], each["content"]) for each in found[1:]] == [
        ("tool", "sunny"), ("tool", "rainy"), ("user", "And now?"),
    ]  # fmt: skip
    assert [each["tool_call_id"] for each in found[1:3]] == ["id1", "id2"]
    assert {each["name"] for each in found[1:3]} == {"get_weather"}
    assert len(as_chat([calls, form("user", results)])) == 3


@pytest.mark.parametrize(
    "message",
    [
        AIMessage("", additional_kwargs={"refusal": "I would rather not."}),
        AIMessage([], additional_kwargs={"refusal": "I would rather not."}),
        AIMessage([{"type": "refusal", "refusal": "I would rather not."}]),
        AIMessage([{"type": "non_standard", "value": {"type": "refusal", "refusal": "I would rather not."}}]),
        AIMessage("I would rather not.", additional_kwargs={"refusal": None}),
        LlamaIndexMessage(role="assistant", blocks=[], additional_kwargs={"refusal": "I would rather not."}),
        {"role": "assistant", "content": None, "refusal": "I would rather not."},
        {"role": "assistant", "refusal": "I would rather not."},
        {"role": "assistant", "content": "I would rather not.", "refusal": "I would rather not."},
    ],
)
def test_a_refusal_is_text(message: Any) -> None:
    assert as_chat([message]) == [{"role": "assistant", "content": "I would rather not."}]


CALLED = {"name": "get_weather", "arguments": json.dumps(ARGUMENTS)}


@pytest.mark.parametrize(
    "message",
    [
        AIMessage("", additional_kwargs={"function_call": CALLED}),
        {"role": "assistant", "content": None, "function_call": CALLED},
        {"role": "assistant", "function_call": CALLED},
    ],
)
def test_a_call_in_the_older_form(message: Any) -> None:
    found = as_chat([message, FunctionMessage(name="get_weather", content="sunny")])
    assert found == [
        {"role": "assistant", "content": "", "tool_calls": [call(None, "get_weather", ARGUMENTS)]},
        {"role": "tool", "content": "sunny", "name": "get_weather"},
    ]


@pytest.mark.parametrize("given", [{"refusal": 5}, {"refusal": ""}, {"function_call": None}])
def test_nothing_instead_of_a_content(given: dict[str, Any]) -> None:
    assert as_chat([{"role": "assistant", "content": "x", **given}]) == [{"role": "assistant", "content": "x"}]
    with pytest.raises(PromptError):
        as_prompt([{"role": "assistant", "content": None, **given}])


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "empty"),
        ("", "empty"),
        ([HumanMessage("")], "empty"),
        ([{"role": "assistant", "content": None}], "empty"),
        ([{"role": "assistant", "content": "", "tool_calls": []}], "empty"),
        ([{"role": "assistant"}], "Not a message"),
        ([{"role": "assistant", "tool_calls": []}], "Not a message"),
        ([{"content": "x"}], "Not a message"),
        ([5], "Not a message: int"),
        ([("a", "b", "c")], "Not a message"),
        ([{"role": "robot", "content": "x"}], "'robot' is not known"),
        ([("robot", "x")], "'robot' is not known"),
        ([{"role": "user", "content": 5}], "not int"),
        ([HumanMessage([{"type": "image_url", "image_url": {"url": "x"}}])], "'image_url' is not supported"),
        ([ToolMessage([{"type": "image", "url": "x"}], tool_call_id="a")], "'image' is not supported"),
        ([LlamaIndexMessage(role="user", blocks=[ImageBlock(image=b"x")])], "'image' is not supported"),
        (5, "not int"),
        ([AIMessage([{"type": "non_standard", "value": {"type": "image", "url": "x"}}])], "'image' is not supported"),
        ([AIMessage([{"type": "non_standard", "value": 5}])], "'non_standard' is not supported"),
        ([{"role": "assistant", "function_call": "get_weather"}], "Not a tool call"),
        ([{"role": "assistant", "tool_calls": ["get_weather"]}], "Not a tool call"),
        ([{"role": "assistant", "tool_calls": [{"name": "f"}]}], "Not a tool call"),
        ([{"role": "assistant", "tool_calls": [{"args": {}}]}], "Not a tool call"),
        ([{"role": "assistant", "tool_calls": [{"function": None}]}], "Not a tool call"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}], "Not a tool call"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}], "Not a tool call"),
        ([{"role": "assistant", "tool_calls": [None]}], "Not a tool call"),
        ([{"role": "assistant", "tool_calls": {"name": "f", "args": {}}}], "Not a tool call"),
    ],
)
def test_what_is_no_message(messages: Any, error: str) -> None:
    with pytest.raises(PromptError, match=error):
        as_prompt(messages)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "tool_calls": 5},
        {"role": ["user"], "content": "x"},
        {"role": "assistant", "tool_calls": [{"id": ["a"], "name": "f", "args": {}}]},
        {"role": "assistant", "tool_calls": [{"id": "a", "name": None, "args": {}}]},
    ],
)
def test_what_is_no_message_either(message: Any) -> None:
    with pytest.raises(PromptError):
        as_prompt([message])


@pytest.mark.parametrize("arguments", [None, [1], "[1]", "null", "3"])
def test_arguments_that_are_no_object(arguments: Any) -> None:
    """An error, or said as well as it can be."""
    message = {"role": "assistant", "tool_calls": [{"id": "a", "name": "f", "args": arguments}]}
    with suppress(PromptError):
        assert isinstance(as_chat([message])[0]["tool_calls"][0]["function"]["arguments"], dict)


# --- tools ---


def tool_schemas(tools: Any, strict: bool | None = None) -> list[dict[str, Any]]:
    """Of the tools of either framework, as `CardsLLM` takes them."""
    return convert.tool_schemas(describe_tools(tools), strict)


def get_weather(city: str, days: int = 1) -> str:
    """Tell the weather.

    Args:
        city: where
        days: for how long
    """
    return f"sunny in {city}"


class Weather(BaseModel):
    """Tell the weather."""

    city: str = Field(description="where")
    days: int = 1


class OldWeather(OldBaseModel):
    """Tell the weather."""

    city: str
    days: int = 1


class TypedWeather(TypedDict):
    """Tell the weather."""

    city: Annotated[str, ..., "where"]
    days: int


class QualifiedWeather(TypedDict, total=False):
    """Tell the weather."""

    city: Required[str]
    days: NotRequired[int]


class Color(Enum):
    """Paint."""

    red = "red"


class Node(BaseModel):
    """Tell the weather."""

    value: int
    children: list[Node] = []


@dataclass
class Order:
    """Pay.

    Args:
        amount: how much
    """

    amount: Decimal
    parts: list[Order] = dataclasses.field(default_factory=list)


def pay(amount: Decimal, whole: Order) -> str:
    """Pay.

    Args:
        amount: how much
    """
    return str(amount)


class Leg(TypedDict):
    """A part of a trip."""

    to: Annotated[NotRequired[str], ..., "where to"]


class Trip(TypedDict, total=False):
    """A trip."""

    legs: Required[Annotated[list[Leg], ..., "in order"]]
    note: Required[Annotated[str | None, None, "or nothing"]]
    days: int


PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
DESCRIBED = {"name": "get_weather", "description": "Tell the weather.", "parameters": PARAMETERS}
FUNCTION = {"type": "function", "function": DESCRIBED}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (get_weather, "get_weather"),
        (Weather, "Weather"),
        (OldWeather, "OldWeather"),
        (TypedWeather, "TypedWeather"),
        (tool(get_weather), "get_weather"),
        (StructuredTool.from_function(get_weather, name="weather"), "weather"),
        (FunctionTool.from_defaults(get_weather), "get_weather"),
        (FunctionTool.from_defaults(get_weather, name="weather", description="Tell the weather."), "weather"),
        (FUNCTION, "get_weather"),
        (DESCRIBED, "get_weather"),
        ({"title": "get_weather", "description": "Tell the weather.", **PARAMETERS}, "get_weather"),
        ({"name": "get_weather", "description": "Tell the weather.", "input_schema": PARAMETERS}, "get_weather"),
        ({"name": "get_weather", "description": "Tell the weather.", "inputSchema": PARAMETERS}, "get_weather"),
        ({"name": "get_weather", "description": "Tell the weather.", "schema": PARAMETERS}, "get_weather"),
        (QualifiedWeather, "QualifiedWeather"),
    ],
    ids=kind,
)
def test_tools_of_every_kind(given: Any, name: str) -> None:
    [found] = tool_schemas([given])
    assert found["type"] == "function"
    assert found["function"]["name"] == name
    assert "Tell the weather" in found["function"]["description"]
    parameters = found["function"]["parameters"]
    assert parameters["type"] == "object"
    assert list(parameters["properties"]) == ["city", "days"]
    assert parameters["properties"]["city"]["type"] == "string"
    assert parameters["properties"]["days"]["type"] == "integer"
    assert "city" in parameters["required"]
    json.dumps(found)
    assert as_tools([found]).names == [name]  # type: ignore[union-attr]


WITHOUT_PROPERTIES: list[dict[str, Any]] = [
    {"anyOf": [PARAMETERS, {"type": "object", "properties": {"zip": {"type": "integer"}}}]},
    {"$ref": "#/$defs/Weather", "$defs": {"Weather": PARAMETERS}},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"allOf": [PARAMETERS]},
]


@pytest.mark.parametrize("schema", WITHOUT_PROPERTIES)
def test_schemas_without_properties_are_whole(schema: dict[str, Any]) -> None:
    titled = {"title": "Weather", "description": "Tell the weather.", **schema}
    [found] = tool_schemas([titled])
    assert found["function"] == {"name": "Weather", "description": "Tell the weather.", "parameters": schema}
    assert json_schema(titled) == titled
    assert json_schema(schema) == schema


@pytest.mark.parametrize(
    "given",
    [
        Node,
        Node.model_json_schema() | {"title": "Node"},
        StructuredTool(name="node", description="Tell.", args_schema=Node),
        StructuredTool(name="node", description="Tell.", args_schema=Node.model_json_schema()),
        FunctionTool(lambda **node: "", ToolMetadata(description="Tell.", name="node", fn_schema=Node)),
    ],
    ids=kind,
)
def test_a_recursive_schema_is_held_at_every_level(given: Any) -> None:
    [found] = tool_schemas([given])
    held = held_schema(found["function"]["parameters"]).schema
    assert all({"$ref": ref["$ref"]} == ref for ref in _items(held))
    assert _items(held)


def _items(schema: Any) -> list[Any]:
    """What the items of all arrays in a schema are."""
    parts = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    own = [schema["items"]] if isinstance(schema, dict) and "items" in schema else []
    return own + [each for part in parts for each in _items(part)]


@pytest.mark.parametrize("given", [Order, pay, tool(pay)], ids=kind)
def test_functions_and_dataclasses_are_as_precise_as_tools(given: Any) -> None:
    [found] = tool_schemas([given])
    amount = found["function"]["parameters"]["properties"]["amount"]
    assert [each["type"] for each in amount["anyOf"]] == ["number", "string"]
    assert re.fullmatch(amount["anyOf"][1]["pattern"], "2.50")
    assert not re.fullmatch(amount["anyOf"][1]["pattern"], "two")
    assert "Pay." in found["function"]["description"]
    assert all({"$ref": ref["$ref"]} == ref for ref in _items(held_schema(found["function"]["parameters"]).schema))
    assert _items(found["function"]["parameters"])


def test_typed_dicts_keep_their_descriptions_and_defaults() -> None:
    found = json_schema(Trip)
    properties = {**found["properties"], **found["$defs"]["Leg"]["properties"]}
    described = {name: each.get("description") for name, each in properties.items()}
    assert described == {"legs": "in order", "note": "or nothing", "days": None, "to": "where to"}
    assert found["required"] == ["legs"]
    assert not found["$defs"]["Leg"].get("required")


def _typed_dict_of(typed_dict: Any) -> Any:
    """A typed dict of `typing` or of `typing_extensions`, with others within."""
    part: Any = typed_dict("Part", {"size": Required[int], "parts": Any}, total=False)
    part.__annotations__["parts"] = list[part]
    fields: dict[str, Any] = {
        "name": Annotated[str, ..., "as written"], "nick": str | None, "age": int | None, "node": Node,
        "amount": Decimal, "part": part | None, "by_name": dict[str, part], "kind": Literal["a", "b"],
        "level": Annotated[int, Field(ge=1, le=5)], "days": NotRequired[Annotated[int, ..., "at most"]],
    }  # fmt: skip
    return typed_dict("Whole", fields)


def test_typed_dicts_are_as_precise_as_pydantic_classes() -> None:
    found, same = (json_schema(_typed_dict_of(each)) for each in (typing.TypedDict, TypedDict))
    assert found == same
    properties, null = found["properties"], {"type": "null"}
    assert found["required"] == [name for name in properties if name != "days"]
    assert [properties[name]["anyOf"][1] for name in ("nick", "age", "part")] == [null] * 3
    assert [properties[name].get("description") for name in ("name", "days")] == ["as written", "at most"]
    assert (properties["level"]["minimum"], properties["level"]["maximum"]) == (1, 5)
    assert properties["amount"]["anyOf"][1]["pattern"]
    part = found["$defs"]["Part"]
    assert (part["required"], part["properties"]["parts"]["items"]) == (["size"], {"$ref": "#/$defs/Part"})
    ResponseFormat(found)  # and a grammar holds it


def test_what_pydantic_reads_by_a_path_is_refused() -> None:
    city = (str, Field(validation_alias=AliasPath("address", "city")))
    with pytest.raises(SettingsError, match="AliasPath"):
        json_schema(create_model("Home", city=city))
    by_name = create_model("Home", __config__=ConfigDict(populate_by_name=True), city=city)
    assert "city" in json_schema(by_name)["properties"]
    choice = create_model("Home", city=(str, Field(validation_alias=AliasChoices(AliasPath("a", 0), "town"))))
    assert "town" in json_schema(choice)["properties"]


@pytest.mark.parametrize("ask", [json_schema, as_response_format, lambda cls: tool_schemas([cls])])
def test_a_field_without_a_schema_is_refused_by_our_name(ask: Callable[[Any], Any]) -> None:
    with pytest.raises(SettingsError, match="Home has a field without a JSON schema"):
        ask(create_model("Home", door=(Callable[[], int], ...)))


def test_a_tool_that_takes_more_than_its_properties() -> None:
    class Open(BaseModel):
        """Any fields."""

        model_config = ConfigDict(extra="allow")
        city: str

    of_llama_index = FunctionTool(lambda **fields: "", ToolMetadata(description="Any.", name="o", fn_schema=Open))
    for given in (Open, of_llama_index):
        [found] = tool_schemas([given])
        assert found["function"]["parameters"]["additionalProperties"] is True


def test_arguments_are_an_object() -> None:
    class Cities(RootModel[list[str]]):
        """Cities."""

    with pytest.raises(SettingsError, match="'Cities': its parameters are of the type 'array'"):
        as_tools(tool_schemas([Cities]))


def test_no_tools() -> None:
    assert tool_schemas(None) == tool_schemas([]) == []
    assert as_tools(None) is None
    assert as_tools([], "auto") is None
    assert as_tools([], "none") is None


NO_TOOLS = [5, None, "get_weather", {"function": "x"}, {}, {"type": "object"}, object(), object, Color, StructuredTool]


@pytest.mark.parametrize("bad", NO_TOOLS)
def test_what_is_no_tool(bad: Any) -> None:
    with pytest.raises(SettingsError, match="cannot be described as a function"):
        tool_schemas([FUNCTION, bad])


@pytest.mark.parametrize("given", [get_weather, Weather, TypedWeather, tool(get_weather)], ids=kind)
def test_strict_tools(given: Any) -> None:
    [found] = tool_schemas([given], strict=True)
    assert found["function"]["strict"] is True
    assert as_tools([found]).strict  # type: ignore[union-attr]
    assert not as_tools(tool_schemas([given])).strict  # type: ignore[union-attr]


@pytest.mark.parametrize("given", [FUNCTION, FunctionTool.from_defaults(get_weather)], ids=["dict", "LlamaIndex"])
def test_strict_tools_that_are_in_openai_form(given: Any) -> None:
    assert as_tools(tool_schemas([given], strict=True)).strict  # type: ignore[union-attr]


def test_arguments_of_a_call_are_converted() -> None:
    given = {"tools": [get_weather], "max_tokens": 5}
    found = convert_options(given)
    assert found["max_tokens"] == 5
    assert found["tools"][0]["function"]["name"] == "get_weather"
    assert given["tools"] == [get_weather]
    assert convert_options({"tools": []}) == {"tools": []}
    assert convert_options({}) == {}


@pytest.mark.parametrize(
    "given",
    [
        Weather, Weather.model_json_schema(), OldWeather, TypedWeather, QualifiedWeather, PARAMETERS, DESCRIBED,
        FUNCTION, {"name": "get_weather", "schema": PARAMETERS}, {"name": "get_weather", "inputSchema": PARAMETERS},
        {"type": "json_schema", "json_schema": {"name": "get_weather", "schema": PARAMETERS, "strict": True}},
        {"type": "json_schema", "name": "get_weather", "schema": PARAMETERS},
        {"type": "function", **DESCRIBED}, {"name": "get_weather", **PARAMETERS},
    ],
    ids=kind,
)  # fmt: skip
def test_json_schemas_of_every_kind(given: Any) -> None:
    found = json_schema(given)
    assert found["type"] == "object"
    assert list(found["properties"]) == ["city", "days"]


@pytest.mark.parametrize("bad", [Weather | None, list[Weather], int, {}, {"x": 1}], ids=str)
def test_what_is_no_schema(bad: Any) -> None:
    with pytest.raises(SettingsError, match=r"schema: .* cannot be described"):
        json_schema(bad)


# --- which of them may be called ---

SCHEMAS = [FUNCTION, {"type": "function", "function": {"name": "add"}}]


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        (None, "auto"),
        ("auto", "auto"),
        ("any", "any"),
        ("required", "any"),
        (True, "any"),
        ("add", "add"),
        ({"type": "function", "function": {"name": "add"}}, "add"),
        ({"type": "function", "name": "add"}, "add"),
        ({"type": "tool", "name": "add"}, "add"),
        ({"name": "add"}, "add"),
        ({"type": "any"}, "any"),
        ({"type": "auto"}, "auto"),
        ({"type": "required"}, "any"),
    ],
)
def test_choices(choice: Any, found: str) -> None:
    tools = as_tools(SCHEMAS, choice)
    assert isinstance(tools, Tools)
    assert tools.choice == found
    assert tools.forced == (found != "auto")
    assert [function["name"] for function in tools.allowed] == (["add"] if found == "add" else ["get_weather", "add"])
    assert tools.several == (found != "add")
    assert tools.names == ["get_weather", "add"]
    one = as_tools(SCHEMAS, choice, parallel=False)
    assert one is not None
    assert not one.several


ADD = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(
    ("choice", "forced"),
    [
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [ADD]}}, True),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [ADD]}}, False),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]}, True),
    ],
)
def test_a_choice_among_some(choice: Any, forced: bool) -> None:
    tools = as_tools(SCHEMAS, choice)
    assert tools is not None
    assert (tools.names, tools.forced, tools.several) == (["add"], forced, True)


@pytest.mark.parametrize("choice", ["none", False])
def test_no_choice(choice: Any) -> None:
    assert as_tools(SCHEMAS, choice) is None
    assert as_tools(None, choice) is None


@pytest.mark.parametrize(
    ("schemas", "choice", "error"),
    [
        (SCHEMAS, "subtract", "'subtract': there is no such tool, only get_weather, add"),
        (SCHEMAS, {"type": "tool", "name": "subtract"}, "no such tool"),
        (SCHEMAS, {"type": "function"}, "no such tool"),
        (SCHEMAS, {"type": "allowed_tools", "tools": [{"name": "subtract"}]}, "'subtract': there is no such tool"),
        (SCHEMAS, {"type": "allowed_tools", "allowed_tools": {"mode": "maybe", "tools": [ADD]}}, '"required" as the'),
        (SCHEMAS, {"type": "allowed_tools", "allowed_tools": 5}, 'name "tools"'),
        (SCHEMAS, {"type": "allowed_tools"}, 'name "tools"'),
        (SCHEMAS, 3, "no such tool"),
        (SCHEMAS, ["add"], "no such tool"),
        (SCHEMAS, "", "no such tool"),
        (None, "any", "needs tools="),
        ([], "add", "needs tools="),
        ([], True, "needs tools="),
        ([5], None, "not a function"),
        ([{"type": "function", "function": {}}], None, "not a function"),
        ([{"type": "function", "function": {"name": 3}}], None, "not a function"),
        ([get_weather], None, "not a function"),
    ],
)
def test_choices_that_cannot_be(schemas: Any, choice: Any, error: str) -> None:
    with pytest.raises(SettingsError, match=error):
        as_tools(schemas, choice)


@pytest.mark.parametrize(
    ("schemas", "choice"),
    [(SCHEMAS, {"function": "add"}), ([{"function": "x"}], None), ([{"type": "function", "function": 3}], None)],
)
def test_functions_that_are_no_mappings(schemas: Any, choice: Any) -> None:
    with pytest.raises(SettingsError):
        as_tools(schemas, choice)


@pytest.mark.parametrize(("schemas", "choice"), [(SCHEMAS, {"type": "none"}), (None, {"type": "auto"})])
def test_no_choice_as_anthropic_writes_it(schemas: Any, choice: Any) -> None:
    assert as_tools(schemas, choice) is None


def test_tools_in_other_forms() -> None:
    tools = as_tools([DESCRIBED, {"name": "add", "strict": True}])
    assert tools is not None
    assert tools.schemas == (FUNCTION, {"type": "function", "function": {"name": "add", "strict": True}})
    assert tools.strict


def test_binding_refuses_what_a_call_would_refuse() -> None:
    llm = ChatCards(reward=None, decoding=Sampling())
    with pytest.raises(SettingsError, match="no such tool"):
        llm.bind_tools([get_weather], tool_choice="subtract")
    with pytest.raises(SettingsError, match="cannot be described"):
        llm.bind_tools([5])
    bound = llm.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False, max_tokens=5)
    assert bound.kwargs == {  # type: ignore[attr-defined]
        "tools": tool_schemas([get_weather]), "tool_choice": "any", "parallel_tool_calls": False, "max_tokens": 5
    }  # fmt: skip


# --- answers that are JSON ---

PLAIN = {"type": "object", "properties": {"mood": {"type": "string"}}}


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        ({"type": "json_object"}, None),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": PLAIN, "strict": True}}, PLAIN),
        (PLAIN, PLAIN),
        (Weather, Weather.model_json_schema()),
        (ResponseFormat(PLAIN), PLAIN),
        (ResponseFormat(), None),
    ],
)
def test_formats_of_every_kind(value: Any, schema: Any) -> None:
    found = as_response_format(value)
    assert found == ResponseFormat(schema)
    assert found is not None
    assert found.grammar == Grammar.json_schema(schema or {"type": "object"})


@pytest.mark.parametrize("value", [None, {"type": "text"}])
def test_no_format(value: Any) -> None:
    assert as_response_format(value) is None


@pytest.mark.parametrize("value", ["json", "json_object", 5, ["x"], int, OldWeather, object()], ids=kind)
def test_formats_that_cannot_be(value: Any) -> None:
    with pytest.raises(SettingsError, match="response_format="):
        as_response_format(value)


def test_the_model_is_told_of_the_schema() -> None:
    wanted = ResponseFormat({"const": "Köln"})
    told = 'Answer with a JSON object that this JSON schema describes:\n{"const": "Köln"}'
    user = {"role": "user", "content": "Hi."}
    assert wanted.instruct("Hi.") == wanted.instruct([user]) == [{"role": "system", "content": told}, user]
    messages = [{"role": "system", "content": "Be kind."}, user]
    assert wanted.instruct(messages) == [{"role": "system", "content": f"Be kind.\n\n{told}"}, user]
    assert messages[0]["content"] == "Be kind."
    assert wanted.instruct(FormattedPrompt("<s>Hi.")) == "<s>Hi."
    assert ResponseFormat().instruct("Hi.") == "Hi."


# --- arguments of one call ---


@pytest.fixture
def options() -> Options:
    return Options(reward=None, decoding=Sampling())


def test_tools_of_a_request(options: Options) -> None:
    request = options.request("Hi.", {"tools": SCHEMAS})
    assert request.prompt == "Hi."
    assert request.grammar is None
    assert request.tools is not None
    assert (request.tools.choice, request.tools.parallel, request.tools.strict) == ("auto", True, False)
    for parallel, found in ((False, False), (True, True), (None, True)):
        request = options.request("Hi.", {"tools": SCHEMAS, "tool_choice": "any", "parallel_tool_calls": parallel})
        assert request.tools is not None
        assert (request.tools.choice, request.tools.parallel) == ("any", found)
    assert options.request("Hi.", {"tools": SCHEMAS, "tool_choice": "none"}).tools is None
    assert options.request("Hi.", {"tools": [], "tool_choice": None}).tools is None
    assert options.request("Hi.", {}).tools is None


def test_requests_have_ids_of_their_own(options: Options) -> None:
    one, two = (options.request("Hi.", {"tools": SCHEMAS}).tools for _ in range(2))
    assert one is not None
    assert two is not None
    assert one.call_id != two.call_id


def test_a_format_and_tools_of_a_request(options: Options) -> None:
    request = options.request("Hi.", {"response_format": Weather, "tools": SCHEMAS})
    assert request.grammar == Grammar.json_schema(Weather.model_json_schema())
    assert request.tools is not None
    assert request.prompt[0]["role"] == "system"  # type: ignore[index]
    assert "JSON schema" in request.prompt[0]["content"]  # type: ignore[index]
    assert options.request("Hi.", {"response_format": {"type": "text"}}) == options.request("Hi.", {})


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        ({"toolz": SCHEMAS}, "'toolz' is not known. Did you mean 'tools'"),
        ({"tool_choices": "any"}, "Did you mean 'tool_choice'"),
        ({"engine": None}, "'engine' is not known"),
        ({"grammar": Grammar.regex("a"), "tools": SCHEMAS}, "grammar= describes the whole answer"),
        ({"grammar": PLAIN, "response_format": PLAIN}, "grammar= describes the whole answer"),
        ({"grammar": PLAIN, "response_format": {"type": "json_object"}}, "grammar= describes the whole answer"),
        ({"tool_choice": "any"}, "needs tools="),
        ({"tools": SCHEMAS, "tool_choice": "subtract"}, "no such tool"),
        ({"tools": [5]}, "not a function"),
        ({"response_format": "json"}, "response_format='json'"),
        ({"grammar": 5}, "grammar=5"),
        ({"max_tokens": 0}, "max_tokens=0"),
    ],
)
def test_arguments_that_cannot_be(options: Options, overrides: dict[str, Any], error: str) -> None:
    with pytest.raises(SettingsError, match=error):
        options.request("Hi.", overrides)


@pytest.mark.parametrize(
    "nothing", [{"tools": None}, {"tools": []}, {"tools": SCHEMAS, "tool_choice": "none"}], ids=kind
)
def test_a_grammar_goes_with_tools_that_may_not_be_called(options: Options, nothing: dict[str, Any]) -> None:
    request = options.request("Hi.", {"grammar": Grammar.regex("a"), "response_format": {"type": "text"}, **nothing})
    assert request.grammar == Grammar.regex("a")
    assert request.tools is None


@pytest.mark.parametrize("form", [as_tools, tool_schemas])
def test_errors_name_the_setting(form: Callable[[Any], Any]) -> None:
    with pytest.raises(SettingsError, match=r"^tools: "):
        form([{"nonsense": 1}])
