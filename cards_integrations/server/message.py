"""Builds the message of an answer, whole and in pieces."""

from __future__ import annotations

import json
from typing import Any

from cards_integrations.chat.message import THOUGHTS
from cards_integrations.engine.request import Chunk
from cards_integrations.trace import Alignment, InvalidToolCall, ToolCall


def message_of(answer: Alignment) -> dict[str, Any]:
    """Return a finished answer as a message of the assistant."""
    calls: list[ToolCall | InvalidToolCall] = [*answer.tool_calls, *answer.invalid_tool_calls]
    message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
    if answer.thoughts:
        message[THOUGHTS] = answer.thoughts
    if calls:
        message["content"] = answer.content or None
        message["tool_calls"] = [tool_call(call) for call in calls]
    return message


def delta_of(chunk: Chunk, calls_sent: int) -> dict[str, Any]:
    """Return what a kept segment adds to the message; `calls_sent` is the number of calls that were sent before."""
    delta: dict[str, Any] = {"content": chunk.text} if chunk.text else {}
    if chunk.thought:
        delta[THOUGHTS] = chunk.thought
    if chunk.calls:
        delta["tool_calls"] = [
            {"index": calls_sent + number, **tool_call(call)} for number, call in enumerate(chunk.calls)
        ]
    return delta


def tool_call(call: ToolCall | InvalidToolCall) -> dict[str, Any]:
    """Return a call in OpenAI's form; the arguments of an invalid one are what the model wrote."""
    arguments = json.dumps(call.arguments) if isinstance(call, ToolCall) else call.arguments
    return {"id": call.id, "type": "function", "function": {"name": call.name or "", "arguments": arguments}}
