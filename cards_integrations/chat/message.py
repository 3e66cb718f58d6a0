"""The form of chat messages that the core uses, and the other forms that it accepts."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from cards_integrations.errors import PromptError, short_repr

Message = dict[str, Any]
"""`role` (system, user, assistant, tool) and `content`, a text; with tools also `tool_calls`, `tool_call_id` and
`name`, as chat templates take them."""

THOUGHTS = "reasoning_content"
"""The key of an assistant's message for its thoughts, if they are known."""

PARTIAL_CHARACTER = "\ufffd"
"""What tokenizers decode an incomplete character to, whose other bytes are still to come."""

ROLES = {
    "human": "user", "user": "user",
    "ai": "assistant", "assistant": "assistant", "chatbot": "assistant", "model": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "function": "tool",
}  # fmt: skip
TEXTS = {
    "text": "text", "input_text": "text", "output_text": "text", "text-plain": "text", "refusal": "refusal",
}  # fmt: skip
"""Types of content blocks that are text, and the key of that text."""

THOUGHTS_IN = {"reasoning": "reasoning", "thinking": "thinking", "reasoning_content": "text"}
"""Types of content blocks that are thoughts, and where these stand."""

CALLS = {"tool_use": ("id", "input"), "tool_call": ("id", "args"), "function_call": ("call_id", "arguments")}
"""Types of content blocks that are calls, and where their id and their arguments stand."""

NOT_TEXT = {
    *THOUGHTS_IN, "redacted_thinking", *CALLS, "tool_call_chunk", "input_json_delta", "cache_point",
    "server_tool_call_chunk", "server_tool_result", "mcp_list_tools",  # of what a provider ran itself
    "executable_code", "code_execution_result",
}  # fmt: skip
"""Types of content blocks that are no part of a message's text."""
OF_PROVIDER = ("_call", "_call_output", "_tool_result", "_tool_use")
"""How the types of further blocks end that record what a provider ran itself."""

INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "refusal")
"""What an assistant's message may have in place of a content."""


def plain_message(item: Any) -> Message:
    """Return a message, given a dict with a role and a content, or a pair of them.

    Raises:
        PromptError: It is something else, or its content is not text.
    """
    if isinstance(item, dict) and "role" in item and ("content" in item or any(map(item.get, INSTEAD_OF_CONTENT))):
        return _from_dict(item)
    if isinstance(item, tuple) and len(item) == 2:
        role = role_of(item[0])
        return {"role": role, "content": text_of(item[1], role)}
    raise PromptError(f"Not a message: {type(item).__name__}; pass dicts with 'role' and 'content'.")


def as_prompt(value: Any, convert: Callable[[Any], Message] = plain_message) -> str | list[Message]:
    """Return a string as it is, and a sequence of messages as a chat.

    Args:
        value: The prompt.
        convert: Makes each item of a sequence a message.

    Raises:
        PromptError: It is empty, neither of these, or has an item that is not a message.
    """
    if isinstance(value, str):
        if not value:
            raise PromptError("The prompt is empty.")
        return value
    if not isinstance(value, Sequence):
        raise PromptError(f"A prompt is a string or a list of messages, not {type(value).__name__}.")
    chat = as_chat(value, convert)
    if not chat:
        raise PromptError("The list of messages is empty: pass at least one.")
    if not any(message["content"] or message.get("tool_calls") for message in chat):
        raise PromptError("All messages are empty: give one of them a content.")
    return chat


def as_chat(items: Sequence[Any], convert: Callable[[Any], Message] = plain_message) -> list[Message]:
    """Return the messages of a chat, which may be empty; `convert` makes each item a message."""
    chat = [convert(part) for item in items for part in _results_apart(item)]
    _name_results(chat)
    return chat


def with_instruction(messages: Sequence[Message], instruction: str) -> list[Message]:
    """Return the conversation with an instruction at the end of its system message."""
    if messages and messages[0]["role"] == "system":
        first = messages[0]
        return [{**first, "content": f"{first['content']}\n\n{instruction}".lstrip()}, *messages[1:]]
    return [{"role": "system", "content": instruction}, *messages]


# --- the parts of a message ---


def role_of(name: Any) -> str:
    """Return the role (system, user, assistant, tool) that a framework calls by this name."""
    if not isinstance(name, str) or name not in ROLES:
        raise PromptError(
            f"The message role {short_repr(name)} is not known; use one of {', '.join(sorted(set(ROLES.values())))}."
        )
    return ROLES[name]


def text_of(content: Any, role: str) -> str:
    """Return the text of the content of a message with this role: a string, or a list of strings and content blocks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise PromptError(f"Message content must be text, not {type(content).__name__}.")
    return joined(map(_block_text, content), role)


def joined(texts: Iterable[str], role: str) -> str:
    """Return the texts of content blocks as one: an answer goes on in its next block, others are lines of their own."""
    return ("" if role == "assistant" else "\n").join(filter(None, texts))


def thoughts_of(content: Any) -> str:
    """Return the thoughts among content blocks, in LangChain's form or that of a provider."""
    blocks = content if isinstance(content, list) else []
    found = [_thought(block) for block in blocks if isinstance(block, Mapping)]
    return "\n".join(text for text in found if isinstance(text, str))


def _thought(block: Mapping[str, Any]) -> Any:
    kind = str(block.get("type"))
    within = block.get(kind) if kind == "reasoning_content" else block
    return within.get(THOUGHTS_IN[kind]) if kind in THOUGHTS_IN and isinstance(within, Mapping) else None


def calls_in(content: Any) -> dict[str, Any]:
    """Return the calls among content blocks, if there are any, as the message's `tool_calls`."""
    blocks = content if isinstance(content, list) else []
    named = [each for each in blocks if isinstance(each, Mapping) and str(each.get("type")) in CALLS and "name" in each]
    found = [(each, *CALLS[each["type"]]) for each in named]
    calls = [{"id": each.get(call_id), "name": each["name"], "args": each.get(args)} for each, call_id, args in found]
    return {"tool_calls": tool_calls(calls)} if calls else {}


def add_thoughts(message: Message, found: Sequence[Any]) -> None:
    """Add the first text that was found to a message of the assistant, as its thoughts."""
    texts = [text for text in found if isinstance(text, str) and text]
    if texts and message["role"] == "assistant":
        message[THOUGHTS] = texts[0]


def add_refusal(message: Message, refusal: Any) -> None:
    """Make the refusal of an answer of OpenAI, which comes in place of a content, the content of its message."""
    if isinstance(refusal, str) and message["role"] == "assistant" and not message["content"]:
        message["content"] = refusal


def older_call(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the call of a message in OpenAI's older form as its `tool_calls`; {} if it has none."""
    call = fields.get("function_call")
    return {"tool_calls": [_call_from_dict({"function": call})]} if call else {}


def tool_call(call_id: str | None, name: str, arguments: Any) -> dict[str, Any]:
    """Return a call as chat templates take it, with an object as its arguments.

    Raises:
        PromptError: JSON cannot express the arguments.
    """
    parsed = _parsed(arguments)
    if not isinstance(parsed, Mapping):
        parsed = {} if parsed is None else {"input": arguments}  # the nearest object to what was written
    try:
        json.dumps(dict(parsed))
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(
            f"The arguments {short_repr(parsed)} of a call of {name!r} cannot be written as JSON: {error}."
        ) from None
    return {"type": "function", "id": call_id, "function": {"name": name, "arguments": dict(parsed)}}


def tool_calls(calls: Any) -> list[dict[str, Any]]:
    """Return the calls of a message as chat templates take them.

    Args:
        calls: Dicts or pydantic objects in OpenAI's or LangChain's form.

    Raises:
        PromptError: They are something else.
    """
    if not isinstance(calls, (list, tuple)):
        raise PromptError(f"Not a tool call: {short_repr(calls)}; pass a list of them.")
    return [_call_from_dict(call.model_dump() if isinstance(call, BaseModel) else call) for call in calls]


def answered_call(fields: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the id and the name of the call that a message of a tool answers."""
    found = {name: fields.get(name) for name in ("tool_call_id", "name")}
    for name, value in found.items():
        if not isinstance(value, str | None):
            raise PromptError(f"{name}={short_repr(value)} of a tool message must be a string.")
    return found


def text_only(kind: str) -> PromptError:
    """Return the error for content that is not text."""
    return PromptError(f"Message content of type {kind} is not supported: the model reads text only.")


def _from_dict(item: Mapping[str, Any]) -> Message:
    content = item.get("content")
    role = role_of(item["role"])
    message: Message = {"role": role, "content": "" if content is None else text_of(content, role)}
    if calls := item.get("tool_calls"):
        message["tool_calls"] = tool_calls(calls)
    else:
        message |= older_call(item) or (calls_in(content) if role == "assistant" else {})
    add_refusal(message, item.get("refusal"))
    add_thoughts(message, [item.get(THOUGHTS) or item.get("reasoning"), thoughts_of(content)])
    if role == "tool":
        message |= answered_call(item)
    elif isinstance(name := item.get("name"), str):
        message["name"] = name
    return message


def _block_text(block: Any) -> str:
    if isinstance(block, str):
        return block
    kind = block.get("type", "text") if isinstance(block, dict) else type(block).__name__
    if isinstance(block, dict) and isinstance(kind, str) and isinstance(text := block.get(TEXTS.get(kind)), str):
        return text
    if isinstance(block, dict) and (text := _text_within(block)) is not None:
        return text
    if isinstance(kind, str) and (kind in NOT_TEXT or kind.endswith(OF_PROVIDER)):
        return ""
    if kind == "non_standard" and isinstance(block.get("value"), Mapping):  # LangChain's name for what it does not know
        return _block_text(block["value"])
    raise PromptError("Message content of type 'text' has no text.") if kind == "text" else text_only(short_repr(kind))


def _decoded(data: str) -> str:
    """Return the text that a block holds in base64."""
    try:
        return b64decode(data).decode(errors="replace")
    except ValueError as error:
        raise PromptError(f"Message content of type 'file' is no base64: {error}.") from error


def _text_within(block: Mapping[str, Any]) -> str | None:
    """Return the text of a document, a search result or another block that holds one; None if it holds none."""
    match block:
        case {"type": "file", "text": str(text)}:  # LangChain's older form of a plain text
            return text
        case {"type": "file" | "text-plain", "mime_type": str(kind), "base64": str(data)} if kind.startswith("text/"):
            return _decoded(data)
        case {"type": "json", "json": value}:  # of a tool
            return json.dumps(value, ensure_ascii=False, default=str)
        case {"type": "custom_tool_call_output" | "function_call_output", "output": output}:  # of a tool run here
            return text_of(output, "tool")
        case {"type": "document", "source": {"type": "text", "data": str(text)}}:
            found = text
        case {"type": "document", "source": {"type": "content", "content": content}}:
            found = text_of(content, "tool")
        case {"type": "search_result", "content": content}:
            found = text_of(content, "tool")
        case {"type": "guard_content", "guard_content": {"text": str(text)}}:
            return text
        case {"cachePoint": _}:
            return ""
        case _:
            return None
    named = [block.get(name) for name in ("title", "source", "context")]
    return "\n".join([*(each for each in named if isinstance(each, str) and each), found])


def _results_apart(item: Any) -> list[Any]:
    """Return results of calls in a user message (Anthropic's form) as messages of their own, and then the rest."""
    content = item.get("content") if isinstance(item, Mapping) else getattr(item, "content", None)
    blocks = content if isinstance(content, list) else []
    results = [each for each in blocks if isinstance(each, Mapping) and each.get("type") == "tool_result"]
    if not results:
        return [item]
    rest = [each for each in blocks if each not in results]
    apart = [
        {"role": "tool", "tool_call_id": each.get("tool_use_id"), "content": each.get("content") or ""}
        for each in results
    ]
    own = {**item, "content": rest} if isinstance(item, Mapping) else item.model_copy(update={"content": rest})
    return [*apart, own] if rest else apart


def _call_from_dict(call: Any) -> dict[str, Any]:
    try:
        function = call["function"] if "function" in call else {"name": call["name"], "arguments": call["args"]}
        name, arguments = function["name"], function["arguments"]
    except (TypeError, KeyError):
        name = arguments = None
    if not isinstance(name, str) or not isinstance(call.get("id"), str | None):
        raise PromptError(f"Not a tool call: {short_repr(call)}; pass OpenAI's or LangChain's form.")
    return tool_call(call.get("id"), name, arguments)


def _parsed(arguments: Any) -> Any:
    """Return the JSON value in a string; anything else, and a string without one, as it is."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments


def _name_results(chat: list[Message]) -> None:
    """Add to each result the name of its tool, which some templates need: a result may have only the id of its call."""
    names: dict[Any, str] = {}
    for message in chat:
        names |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls", ())}
        if message["role"] == "tool" and not message.get("name"):
            message["name"] = names.get(message.get("tool_call_id"), "tool")
