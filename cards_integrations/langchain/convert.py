"""Conversion of LangChain's messages, tools and classes to those of the core, and of answers to LangChain's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from inspect import isroutine
from typing import Any

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    BaseMessageChunk,
    ChatMessage,
    ToolMessage,
    message_chunk_to_message,
)
from langchain_core.messages.ai import InputTokenDetails, OutputTokenDetails, UsageMetadata
from langchain_core.messages.tool import ToolCallChunk, invalid_tool_call, tool_call_chunk
from langchain_core.messages.tool import tool_call as langchain_tool_call
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.tools import BaseTool, StructuredTool, create_schema_from_function
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_core.utils.json import parse_partial_json
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel
from typing_extensions import is_typeddict

from cards_integrations.chat import message
from cards_integrations.chat.logprobs import openai_logprobs
from cards_integrations.chat.message import (
    THOUGHTS,
    Message,
    add_refusal,
    add_thoughts,
    calls_in,
    older_call,
    plain_message,
    role_of,
    text_of,
    thoughts_of,
    tool_call,
)
from cards_integrations.chat.pydantic_schema import is_more_precise, pydantic_schema
from cards_integrations.chat.schema import is_recursive
from cards_integrations.chat.schema_values import KEYWORDS
from cards_integrations.engine.request import Chunk
from cards_integrations.errors import SettingsError, short_repr
from cards_integrations.langchain.typed_dicts import typed_dict_schema
from cards_integrations.trace import Alignment, InvalidToolCall, ToolCall

PROVIDER = "cards"
UNNAMED = "answer"
"""The name of a function whose schema has no title."""
NO_PARAMETERS = {"type": "object", "properties": {}}
SCHEMA_KEYWORDS = KEYWORDS | {"$ref", "allOf", "anyOf", "oneOf"}


# --- messages ---


def as_prompt(value: Any) -> str | list[Message]:
    """Return a string as it is, and a sequence of messages (of LangChain, dicts or pairs) as a chat."""
    return message.as_prompt(value, as_message)


def as_message(item: Any) -> Message:
    """Convert a LangChain message, a dict or a pair to a message."""
    return _from_langchain(item) if isinstance(item, BaseMessage) else plain_message(item)


def _from_langchain(item: BaseMessage) -> Message:
    if isinstance(item, BaseMessageChunk):
        item = message_chunk_to_message(item)
    role = role_of(item.role if isinstance(item, ChatMessage) else item.type)
    found: Message = {"role": role, "content": text_of(item.content, role)}
    if isinstance(item, AIMessage) and (item.tool_calls or item.invalid_tool_calls):
        calls = [*item.tool_calls, *item.invalid_tool_calls]
        found["tool_calls"] = [tool_call(call["id"], call["name"] or "tool", call["args"]) for call in calls]
    elif isinstance(item, AIMessage):
        found |= older_call(item.additional_kwargs) or calls_in(item.content)
    if isinstance(item, AIMessage):
        add_refusal(found, item.additional_kwargs.get("refusal"))
        add_thoughts(found, [item.additional_kwargs.get(THOUGHTS), thoughts_of(item.content)])
    if isinstance(item, ToolMessage):
        found |= {"tool_call_id": item.tool_call_id, "name": item.name}
    elif item.name is not None:
        found["name"] = item.name
    return found


# --- tools and schemas ---


def tool_schemas(tools: Sequence[Any] | None, strict: bool | None = None) -> list[dict[str, Any]]:
    """Describe tools, functions, pydantic classes, typed dicts and schemas as OpenAI describes functions.

    Raises:
        SettingsError: It is no list, or a tool cannot be described so.
    """
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools or (), Sequence):
        raise SettingsError(f"tools={short_repr(tools)}: pass a list of them.")
    return [_tool_schema(tool, strict) for tool in tools or ()]


def _tool_schema(tool: Any, strict: bool | None, what: str = "tools") -> dict[str, Any]:
    try:
        found = convert_to_openai_tool(_whole(tool), strict=strict)
        if strict is not None:  # a tool that is in OpenAI's form already comes back unchanged
            found = {**found, "function": {**found["function"], "strict": strict}}
        return found
    except Exception as error:
        raise SettingsError(
            f"{what}: {short_repr(tool)} cannot be described as a function: {str(error)[:500]}"
        ) from error


def _whole(tool: Any) -> Any:
    """Return the tool, or a function with its whole schema if LangChain would leave out some of that."""
    if isinstance(tool, Mapping):
        return _whole_mapping(tool)
    if is_typeddict(tool):
        return _whole_mapping({"title": tool.__name__, **typed_dict_schema(tool)})
    if isinstance(tool, type) and not _has_fields(tool):
        raise TypeError("this class does not say which fields it has; pass a typed dict, a dataclass or an object")
    schema: Any = _arguments(tool)
    precise = False
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        schema, precise = pydantic_schema(schema), is_more_precise(schema)
    recursive = isinstance(schema, Mapping) and is_recursive(schema)
    if not (precise or recursive):
        return tool
    known = convert_to_openai_tool(tool)["function"]
    name, description = known["name"], known.get("description", "")
    if recursive:  # LangChain replaces the reference of a schema to itself by any value
        return _function(name, description, _without_names(schema))
    return StructuredTool(name=name, description=description, args_schema=schema)


def _has_fields(cls: type) -> bool:
    """Return True for a class that says which fields its objects have; False for the class of a tool."""
    if issubclass(cls, BaseTool):
        return False
    return is_basemodel_subclass(cls) or is_dataclass(cls) or hasattr(cls, "_fields")


def _arguments(tool: Any) -> Any:
    """Return the pydantic class of a tool's arguments, or their schema; anything else as it is."""
    if isinstance(tool, BaseTool):
        return tool.tool_call_schema
    return _class_of_arguments(tool) if isroutine(tool) or (isinstance(tool, type) and is_dataclass(tool)) else tool


def _class_of_arguments(function: Callable[..., Any]) -> type[Any]:
    """Return the class that LangChain makes of a function's arguments when it describes the function."""
    how: dict[str, Any] = {"parse_docstring": True, "error_on_invalid_docstring": False, "include_injected": False}
    return create_schema_from_function(function.__name__, function, filter_args=(), **how)


def _whole_mapping(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a function for a schema (with or without properties), a response format or a tool as MCP lists it."""
    if is_schema(given):
        name = given.get("title", given.get("name"))
        return given if name is None else _function(name, given.get("description"), _without_names(given))
    inner = given.get("json_schema", given)
    for key in ("schema", "inputSchema"):
        if isinstance(inner, Mapping) and key in inner:
            return _function(inner.get("name", UNNAMED), inner.get("description"), inner[key])
    return given


def _function(name: str, description: str | None, parameters: Any) -> dict[str, Any]:
    described = {"description": description} if description else {}
    return {"name": name, **described, "parameters": parameters}


def _without_names(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key not in ("title", "name", "description")}


def is_schema(value: Mapping[str, Any]) -> bool:
    """True for a JSON schema; False for what contains one, such as the description of a function."""
    return value.get("type") not in ("function", "json_schema") and not SCHEMA_KEYWORDS.isdisjoint(value)


def is_form(tool: Any) -> bool:
    """True for a tool with nothing to run, whose arguments are the answer."""
    return isinstance(tool, StructuredTool) and tool.func is None and tool.coroutine is None


def json_schema(schema: Any) -> dict[str, Any]:
    """Return the JSON schema of a pydantic class (v2 or v1), a typed dict or a function's description; or itself."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return pydantic_schema(schema)
    if isinstance(schema, Mapping) and is_schema(schema):
        return dict(schema)
    found = _tool_schema(schema, None, "schema")
    function = found.get("function", found)
    described = {"description": function["description"]} if "description" in function else {}
    return {"title": function["name"], **described, **(function.get("parameters") or NO_PARAMETERS)}


def convert_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call, with tools and classes replaced by their schemas."""
    found = dict(options)
    if found.get("tools"):
        found["tools"] = tool_schemas(found["tools"])
    for name in ("response_format", "grammar"):
        if isinstance(found.get(name), type) and issubclass(found[name], BaseModel):
            found[name] = json_schema(found[name])
    return found


# --- answers ---


def as_chat_result(*answers: Alignment) -> ChatResult:
    """Convert finished answers to one prompt, each to a message with its usage and rewards; several also to a sum."""
    generations = [ChatGeneration(message=_message(answer)) for answer in answers]
    return ChatResult(generations=generations, llm_output=llm_output(answers) if len(answers) > 1 else None)


def _message(answer: Alignment) -> AIMessage:
    return AIMessage(
        answer.content,
        additional_kwargs=_thoughts(answer.thoughts),
        tool_calls=[langchain_tool_call(id=c.id, name=c.name, args=c.arguments) for c in answer.tool_calls],
        invalid_tool_calls=[
            invalid_tool_call(id=c.id, name=c.name, args=c.arguments, error=c.error) for c in answer.invalid_tool_calls
        ],
        usage_metadata=_usage(answer),
        response_metadata=_metadata(answer),
    )


def llm_output(answers: Sequence[Alignment]) -> dict[str, Any]:
    """Return the model of some answers, and the sum of their usage."""
    return {
        "model_name": answers[0].model if answers else None,
        "token_usage": {
            "prompt_tokens": sum(answer.usage.prompt_tokens for answer in answers),
            "completion_tokens": sum(answer.usage.output_tokens for answer in answers),
            "total_tokens": sum(answer.usage.total_tokens for answer in answers),
        },
    }


def add_outputs(outputs: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """Return the sum of the `llm_output` of several prompts; empty if there is none."""
    known = [output for output in outputs if output]
    total: Counter[str] = Counter()
    for output in known:
        total.update(output["token_usage"])
    return {**known[0], "token_usage": dict(total)} if known else {}


def logprobs(answer: Alignment) -> dict[str, Any]:
    """Return the log p of an answer's tokens in OpenAI's form, as metadata; empty if the answer has none."""
    found = openai_logprobs(answer.logprobs)
    return {} if found is None else {"logprobs": found}


class ChunkConverter:
    """Converts the items of one answer's stream, and numbers its tool calls.

    Args:
        blocks: Whether LangChain makes content blocks of the chunks (`output_version="v1"`). It numbers texts and
            thoughts from 0 on, and adds up what has one number, so calls are numbered from -1 down then.
    """

    def __init__(self, blocks: bool = False) -> None:
        self._blocks = blocks
        self._calls = 0

    def __call__(self, item: Chunk | Alignment) -> ChatGenerationChunk | None:
        """Convert a kept segment (to None while all of it is held back), or at the end the metadata."""
        if isinstance(item, Alignment):
            last = AIMessageChunk(
                content="", usage_metadata=_usage(item), response_metadata=_metadata(item), chunk_position="last"
            )
            return ChatGenerationChunk(message=last)
        if item.thought:
            return ChatGenerationChunk(message=AIMessageChunk(content="", additional_kwargs=_thoughts(item.thought)))
        if not item.text and not item.calls:
            return None
        calls = [self._call_chunk(call) for call in item.calls]
        return ChatGenerationChunk(message=AIMessageChunk(content=item.text, tool_call_chunks=calls))

    def _call_chunk(self, call: ToolCall | InvalidToolCall) -> ToolCallChunk:
        if isinstance(call, ToolCall):
            arguments = json.dumps(call.arguments, ensure_ascii=False)
        else:
            arguments = f"{call.error}: {call.arguments}" if _closable(call.arguments) else call.arguments
        self._calls += 1
        index = -self._calls if self._blocks else self._calls - 1
        return tool_call_chunk(id=call.id, name=call.name, args=arguments, index=index)


def _closable(text: str) -> bool:
    """True if LangChain would close this incomplete JSON, and take a part of a call for the whole."""
    try:
        return isinstance(parse_partial_json(text), dict)
    except ValueError:
        return False


def _thoughts(text: str) -> dict[str, Any]:
    """Return thoughts where LangChain looks for them to make reasoning blocks."""
    return {THOUGHTS: text} if text else {}


def _usage(answer: Alignment) -> UsageMetadata:
    usage = answer.usage
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.output_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens),
        output_token_details=OutputTokenDetails(reasoning=usage.reasoning_tokens),
    )


def _metadata(answer: Alignment) -> dict[str, Any]:
    return {
        "model_name": answer.model,
        "model_provider": PROVIDER,
        "finish_reason": answer.finish_reason,
        "cards": answer.summary(),
        **logprobs(answer),
    }
