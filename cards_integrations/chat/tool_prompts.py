"""Conversations with tools: what a chat template makes of them, and the same in plain messages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cards_integrations.chat.message import Message
from cards_integrations.chat.tool_formats import ToolFormat
from cards_integrations.chat.tools import FormatName

TOLD = """You can call functions to help with the user's request. Their signatures are:
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


def shows_tools(rendered: str) -> bool:
    """Does a template that made this of `PROBE` show tools, calls and results?"""
    return all(said in rendered for said in ("probed_tool", "probed_call", "probed result"))


def format_in(rendered: str) -> FormatName:
    """The form in which a template wrote the call of `PROBE`."""
    if "[TOOL_CALLS]" in rendered:
        return "mistral_named" if "[ARGS]" in rendered else "mistral"
    if re.search(r'<tool_call>\s*{\s*"(name|arguments)"', rendered):
        return "hermes"
    return "llama3" if '"parameters": {"key"' in rendered else "json"


def mentions_tools(messages: Sequence[Message]) -> bool:
    return any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


def flattened(
    messages: Sequence[Message], form: ToolFormat, schemas: Iterable[Mapping[str, Any]] = ()
) -> list[Message]:
    """The same conversation for those who know no tools: calls as the text that they were, results as the user's."""
    plain = [_flat(message, form) for message in messages]
    tools = "\n".join(json.dumps(schema["function"], ensure_ascii=False) for schema in schemas)
    if not tools:
        return plain
    example = form.written([{"function": {"name": "<name>", "arguments": {"<argument>": "<value>"}}}])
    return told(plain, TOLD.format(tools=tools, example=example))


def told(messages: Sequence[Message], instruction: str) -> list[Message]:
    """The conversation with an instruction in its system message."""
    if messages and messages[0]["role"] == "system":
        first = messages[0]
        return [{**first, "content": f"{first['content']}\n\n{instruction}".lstrip()}, *messages[1:]]
    return [{"role": "system", "content": instruction}, *messages]


def _flat(message: Message, form: ToolFormat) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": RESULT.format(content=message["content"])}
    if calls := message.get("tool_calls"):
        said = [message["content"]] if message["content"] else []
        return {"role": "assistant", "content": "\n".join([*said, form.written(calls)])}
    return {"role": message["role"], "content": message["content"]}
