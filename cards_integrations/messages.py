"""Both frameworks' messages to the one chat form of the core: dicts with `role` and `content`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.messages import BaseMessage
from langchain_core.messages import ChatMessage as LangChainChatMessage
from llama_index.core.base.llms.types import ChatMessage, ContentBlock, TextBlock, ThinkingBlock

from cards_integrations.errors import PromptError
from cards_integrations.models.base import Message

ROLES = {
    "human": "user", "user": "user",
    "ai": "assistant", "assistant": "assistant", "chatbot": "assistant", "model": "assistant",
    "system": "system", "developer": "system",
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
    if not any(message["content"] for message in chat):
        raise PromptError("All messages are empty.")
    return chat


def _message(item: Any) -> Message:
    if isinstance(item, BaseMessage):
        role = item.role if isinstance(item, LangChainChatMessage) else item.type
        if getattr(item, "tool_calls", None):
            raise _no_tools()
        return {"role": _role(role), "content": _text(item.content)}
    if isinstance(item, ChatMessage):
        return {"role": _role(item.role.value), "content": "".join(map(_block, item.blocks))}
    if isinstance(item, dict) and {"role", "content"} <= item.keys():
        return {"role": _role(item["role"]), "content": _text(item["content"])}
    if isinstance(item, tuple) and len(item) == 2:
        return {"role": _role(item[0]), "content": _text(item[1])}
    raise PromptError(f"Not a message: {type(item).__name__}; pass dicts with 'role' and 'content'.")


def _role(role: str) -> str:
    if role in ("tool", "function"):
        raise _no_tools()
    if role not in ROLES:
        raise PromptError(
            f"The message role {role!r} is not known; use one of {', '.join(sorted(set(ROLES.values())))}."
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
    if kind == "text":
        return str(part["text"])
    if kind in ("reasoning", "thinking"):
        return ""
    raise _only_text(str(kind))


def _block(block: ContentBlock) -> str:
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, ThinkingBlock):
        return ""
    raise _only_text(block.block_type)


def _only_text(kind: str) -> PromptError:
    return PromptError(f"Message content of type {kind!r} is not supported: the model reads text only.")


def _no_tools() -> PromptError:
    return PromptError("Messages with tool calls or tool results are not supported yet.")
