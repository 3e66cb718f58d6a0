"""Both frameworks' messages to the one chat form of the core (`models.base.Message`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    BaseMessageChunk,
    FunctionMessage,
    ToolMessage,
    message_chunk_to_message,
)
from langchain_core.messages import ChatMessage as LangChainChatMessage
from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ContentBlock,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from pydantic import BaseModel

from cards_integrations.chat.message import Message
from cards_integrations.errors import PromptError, short_repr

ROLES = {
    "human": "user", "user": "user",
    "ai": "assistant", "assistant": "assistant", "chatbot": "assistant", "model": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "function": "tool",
}  # fmt: skip
NOT_SAID = {
    "reasoning", "thinking", "redacted_thinking",
    "tool_use", "tool_call", "function_call", "tool_call_chunk", "input_json_delta",  # they are in `tool_calls`, too
}  # fmt: skip


def as_prompt(value: Any) -> str | list[Message]:
    """A string as it is; a sequence of messages (of either framework, dicts, pairs) as chat."""
    if isinstance(value, str):
        if not value:
            raise PromptError("The prompt is empty.")
        return value
    if not isinstance(value, Sequence):
        raise PromptError(f"A prompt is a string or a list of messages, not {type(value).__name__}.")
    chat = [_message(item) for item in value]
    if not chat:
        raise PromptError("The list of messages is empty.")
    if not any(message["content"] or message.get("tool_calls") for message in chat):
        raise PromptError("All messages are empty.")
    _name_results(chat)
    return chat


def _message(item: Any) -> Message:
    if isinstance(item, BaseMessage):
        return _of_langchain(item)
    if isinstance(item, ChatMessage):
        return _of_llama_index(item)
    if isinstance(item, dict) and "role" in item and ("content" in item or item.get("tool_calls")):
        return _of_dict(item)
    if isinstance(item, tuple) and len(item) == 2:
        return {"role": _role(item[0]), "content": _text(item[1])}
    raise PromptError(f"Not a message: {type(item).__name__}; pass dicts with 'role' and 'content'.")


def _of_langchain(item: BaseMessage) -> Message:
    if isinstance(item, BaseMessageChunk):
        item = message_chunk_to_message(item)
    message: Message = {
        "role": _role(item.role if isinstance(item, LangChainChatMessage) else item.type),
        "content": _text(item.content),
    }
    if isinstance(item, AIMessage) and (item.tool_calls or item.invalid_tool_calls):
        calls = [*item.tool_calls, *item.invalid_tool_calls]
        message["tool_calls"] = [_call(call["id"], call["name"] or "tool", call["args"]) for call in calls]
    if isinstance(item, ToolMessage):
        message |= {"tool_call_id": item.tool_call_id, "name": item.name}
    if isinstance(item, FunctionMessage):
        message["name"] = item.name
    return message


def _of_llama_index(item: ChatMessage) -> Message:
    message: Message = {"role": _role(item.role.value), "content": "".join(map(_block, item.blocks))}
    calls = [block for block in item.blocks if isinstance(block, ToolCallBlock)]
    if calls:
        message["tool_calls"] = [_call(call.tool_call_id, call.tool_name, call.tool_kwargs) for call in calls]
    elif stored := item.additional_kwargs.get("tool_calls"):  # of a history that older integrations wrote
        message["tool_calls"] = _calls(stored)
    if message["role"] == "tool":
        message |= _result(item.additional_kwargs)
    return message


def _of_dict(item: Mapping[str, Any]) -> Message:
    content = item.get("content")
    message: Message = {"role": _role(item["role"]), "content": "" if content is None else _text(content)}
    if calls := item.get("tool_calls"):
        message["tool_calls"] = _calls(calls)
    if message["role"] == "tool":
        message |= _result(item)
    return message


def _result(said: Mapping[str, Any]) -> dict[str, str | None]:
    """Which call a tool's message answers."""
    found = {name: said.get(name) for name in ("tool_call_id", "name")}
    for name, value in found.items():
        if not isinstance(value, str | None):
            raise PromptError(f"{name}={short_repr(value)} of a tool's message must be a string.")
    return found


def _calls(several: Any) -> list[dict[str, Any]]:
    if not isinstance(several, (list, tuple)):
        raise PromptError(f"Not a tool call: {short_repr(several)}; pass a list of them.")
    return [_call_of_dict(call.model_dump() if isinstance(call, BaseModel) else call) for call in several]


def _call_of_dict(call: Any) -> dict[str, Any]:
    try:
        function = call["function"] if "function" in call else {"name": call["name"], "arguments": call["args"]}
        name, arguments = function["name"], function["arguments"]
    except (TypeError, KeyError):
        name = arguments = None
    if not isinstance(name, str) or not isinstance(call.get("id"), str | None):
        raise PromptError(f"Not a tool call: {short_repr(call)}; pass OpenAI's or LangChain's form.")
    return _call(call.get("id"), name, arguments)


def _call(call_id: str | None, name: str, arguments: Any) -> dict[str, Any]:
    """A call as chat templates take it: the arguments are an object."""
    given = arguments
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = given
    if not isinstance(arguments, Mapping):
        arguments = {} if arguments is None else {"input": given}  # said as well as it can be
    try:
        json.dumps(dict(arguments))
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(
            f"The arguments {short_repr(arguments)} of a call of {name!r} are no JSON: {error}."
        ) from None
    return {"type": "function", "id": call_id, "function": {"name": name, "arguments": dict(arguments)}}


def _name_results(chat: list[Message]) -> None:
    """Some templates ask for the name of the tool with its result; a result has only the id of the call."""
    names: dict[Any, str] = {}
    for message in chat:
        names |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls", ())}
        if message["role"] == "tool" and not message.get("name"):
            message["name"] = names.get(message.get("tool_call_id"), "tool")


def _role(role: Any) -> str:
    if not isinstance(role, str) or role not in ROLES:
        raise PromptError(
            f"The message role {short_repr(role)} is not known; use one of {', '.join(sorted(set(ROLES.values())))}."
        )
    return ROLES[role]


def _text(content: Any) -> str:
    """The text of a content: a string, or a list of strings and text blocks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise PromptError(f"Message content must be text, not {type(content).__name__}.")
    return "".join(_part(part) for part in content)


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(kind, str) and kind in NOT_SAID:
        return ""
    raise PromptError("Message content of type 'text' has no text.") if kind == "text" else _only_text(short_repr(kind))


def _block(block: ContentBlock) -> str:
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, (ThinkingBlock, ToolCallBlock, CachePoint)):
        return ""
    raise _only_text(repr(block.block_type))


def _only_text(kind: str) -> PromptError:
    return PromptError(f"Message content of type {kind} is not supported: the model reads text only.")
