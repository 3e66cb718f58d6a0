"""Conversations with tools: what a chat template supports of them, and how plain messages express the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cards_integrations.chat.message import Message, with_instruction
from cards_integrations.chat.tool_formats import ToolFormat
from cards_integrations.chat.tools import FormatName

INSTRUCTION = """You can call functions to help with the user's request. Their signatures are:
<tools>
{tools}
</tools>

To call one, answer in this form, with arguments that its signature asks for:
{example}"""
RESULT = "<tool_response>\n{content}\n</tool_response>"

_PARAMETERS = {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]}
PROBED_TOOLS = [
    {"type": "function", "function": {"name": "probed_tool", "description": "A probe.", "parameters": _PARAMETERS}}
]
_CALL = {"type": "function", "id": "probe1234", "function": {"name": "probed_call", "arguments": {"key": "value"}}}
PROBE: list[Message] = [
    {"role": "user", "content": "A question."},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "name": "probed_call", "tool_call_id": "probe1234", "content": "probed result"},
]

_SECOND = {**_CALL, "id": "probe5678", "function": {"name": "probed_second", "arguments": {"key": "probed other"}}}
PROBE_OF_SEVERAL: list[Message] = [
    PROBE[0],
    {**PROBE[1], "tool_calls": [_CALL, _SECOND]},
    PROBE[2],
    {**PROBE[2], "name": "probed_second", "tool_call_id": "probe5678"},
]


def shows_tools(rendered: str) -> bool:
    """True if a template that rendered `PROBE` to this text shows tools, calls and results."""
    return all(text in rendered for text in ("probed_tool", "probed_call", "probed result"))


def shows_several(rendered: str) -> bool:
    """True if a template that rendered `PROBE_OF_SEVERAL` to this text shows both calls of the turn."""
    return "probed_second" in rendered and "probed other" in rendered


def format_in(rendered: str) -> FormatName:
    """Return the tool format in which a template wrote the call of `PROBE`."""
    if "[TOOL_CALLS]" in rendered:
        return "mistral_named" if "[ARGS]" in rendered else "mistral"
    if "to=functions.probed_call" in rendered:
        return "harmony"
    if re.search(r'<tool_call>\s*{\s*"(name|arguments)"', rendered):
        return "hermes"
    return "llama3" if '"parameters": {"key"' in rendered else "json"


def mentions_tools(messages: Sequence[Message]) -> bool:
    """True if the conversation has tool calls or their results."""
    return any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


def without_tool_messages(
    messages: Sequence[Message], tool_format: ToolFormat, schemas: Iterable[Mapping[str, Any]] = ()
) -> list[Message]:
    """Return the conversation for a model or template that knows no tools.

    Args:
        messages: The conversation; its calls become text of the assistant, and their results messages of the user.
        tool_format: How the model writes calls.
        schemas: The tools that may be called, which an instruction describes.
    """
    plain = [_plain(message, tool_format) for message in messages]
    tools = "\n".join(json.dumps(schema["function"], ensure_ascii=False) for schema in schemas)
    if not tools:
        return plain
    example = tool_format.write([{"function": {"name": "<name>", "arguments": {"<argument>": "<value>"}}}])
    return with_instruction(plain, INSTRUCTION.format(tools=tools, example=example))


def _plain(message: Message, tool_format: ToolFormat) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": RESULT.format(content=message["content"])}
    if calls := message.get("tool_calls"):
        text = [message["content"]] if message["content"] else []
        return {"role": "assistant", "content": "\n".join([*text, tool_format.write(calls)])}
    return {"role": message["role"], "content": message["content"]}
