"""Conversion of LlamaIndex's messages and tools to those of the core, and of answers to LlamaIndex's responses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from mimetypes import guess_type
from typing import Any, TypeVar

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ChatResponse,
    CitableBlock,
    CitationBlock,
    CompletionResponse,
    ContentBlock,
    DocumentBlock,
    LogProb,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools.types import BaseTool
from pydantic import BaseModel, ValidationError

from cards_integrations.chat import message
from cards_integrations.chat.message import (
    PARTIAL_CHARACTER,
    THOUGHTS,
    Message,
    add_refusal,
    add_thoughts,
    answered_call,
    joined,
    plain_message,
    role_of,
    text_only,
    tool_call,
    tool_calls,
)
from cards_integrations.chat.pydantic_schema import pydantic_schema
from cards_integrations.engine.request import Chunk
from cards_integrations.errors import AnswerCut
from cards_integrations.langchain import convert as langchain
from cards_integrations.trace import Alignment, InvalidToolCall, TokenLogprob, ToolCall

Model = TypeVar("Model", bound=BaseModel)

# --- messages ---


def as_prompt(value: Any) -> str | list[Message]:
    """Return a string as it is, and a sequence of messages (of LlamaIndex, dicts or pairs) as a chat."""
    return message.as_prompt(value, as_message)


def as_message(item: Any) -> Message:
    """Convert a LlamaIndex message, a dict or a pair to a message."""
    return _from_llama_index(item) if isinstance(item, ChatMessage) else plain_message(item)


def _from_llama_index(item: ChatMessage) -> Message:
    role = role_of(item.role.value)
    found: Message = {"role": role, "content": joined(map(_block_text, item.blocks), role)}
    calls = [block for block in item.blocks if isinstance(block, ToolCallBlock)]
    if calls:
        found["tool_calls"] = [tool_call(call.tool_call_id, call.tool_name, call.tool_kwargs) for call in calls]
    elif stored := item.additional_kwargs.get("tool_calls"):  # in histories that older integrations wrote
        found["tool_calls"] = tool_calls(stored)
    add_refusal(found, item.additional_kwargs.get("refusal"))
    thoughts = [block.content for block in item.blocks if isinstance(block, ThinkingBlock)]
    add_thoughts(found, [*thoughts, item.additional_kwargs.get(THOUGHTS)])
    if role == "tool":
        found |= answered_call(item.additional_kwargs)
    return found


def _block_text(block: ContentBlock) -> str:
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, CitableBlock):
        return joined([block.title, block.source, *map(_block_text, block.content)], "tool")
    if isinstance(block, CitationBlock):
        return _block_text(block.cited_content)
    if isinstance(block, (ThinkingBlock, ToolCallBlock, CachePoint)):
        return ""
    if isinstance(block, DocumentBlock) and (block.data or block.path) and _mime_type(block).startswith("text/"):
        return bytes(block.resolve_document().read()).decode(errors="replace")
    raise text_only(repr(block.block_type))


def _mime_type(document: DocumentBlock) -> str:
    """Return the type of a document; LlamaIndex itself does not know that of a text by its path."""
    return document.document_mimetype or guess_type(str(document.path))[0] or ""


# --- tools ---


def tool_schemas(tools: Sequence[Any] | None) -> list[dict[str, Any]]:
    """Describe LlamaIndex's tools, and all that LangChain can describe, as OpenAI describes functions."""
    return langchain.tool_schemas(describe_tools(tools))


def describe_tools(tools: Any) -> Any:
    """Return the list, with LlamaIndex's own tools described as OpenAI describes functions."""
    return [_describe(tool) for tool in tools] if isinstance(tools, (list, tuple)) else tools


def _describe(tool: Any) -> Any:
    if not isinstance(tool, BaseTool):
        return tool
    found, cls = tool.metadata.to_openai_tool(skip_length_check=True), tool.metadata.fn_schema
    if cls is None:
        return found
    parameters = {key: value for key, value in pydantic_schema(cls).items() if key not in ("title", "description")}
    return {**found, "function": {**found["function"], "parameters": parameters}}


def convert_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call, with its tools replaced by their schemas."""
    return {**options, "tools": tool_schemas(options["tools"])} if options.get("tools") else dict(options)


# --- answers ---


def completion_response(
    item: Chunk | Alignment, text: str | None = None, delta: str | None = None, calls: Sequence[Any] = (),
    thoughts: str = "",
) -> CompletionResponse:  # fmt: skip
    """Convert a whole answer, or the `text` of a stream so far with what is new of it (`delta`)."""
    said = item.text if text is None else text
    return CompletionResponse(text=said, delta=delta, raw=_raw(item), logprobs=_logprobs(item))


def chat_response(
    item: Chunk | Alignment,
    text: str | None = None,
    delta: str | None = None,
    calls: Sequence[ToolCall | InvalidToolCall] = (),
    thoughts: str = "",
) -> ChatResponse:
    """Convert a whole answer, or the `text`, `calls` and `thoughts` of a stream so far with the new text (`delta`)."""
    tokens = None
    if isinstance(item, Alignment):
        text, calls, thoughts, tokens = item.content, item.tool_calls, item.thoughts, item.usage.reasoning_tokens
    blocks: list[ContentBlock] = [ThinkingBlock(content=thoughts, num_tokens=tokens)] if thoughts else []
    blocks.append(TextBlock(text=text or ""))
    valid = [call for call in calls if isinstance(call, ToolCall)]
    blocks += [ToolCallBlock(tool_call_id=each.id, tool_name=each.name, tool_kwargs=each.arguments) for each in valid]
    said = ChatMessage(role=MessageRole.ASSISTANT, blocks=blocks)
    if valid:  # where LlamaIndex's programs and chat engines still look for them
        said.additional_kwargs["tool_calls"] = [_openai_call(each) for each in valid]
    new = {"thinking_delta": item.thought} if isinstance(item, Chunk) and item.thought else {}
    return ChatResponse(message=said, delta=delta, raw=_raw(item), additional_kwargs=new, logprobs=_logprobs(item))


def _openai_call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": json.dumps(call.arguments)}}


def _logprobs(item: Chunk | Alignment) -> list[list[LogProb]] | None:
    """Return, for each token of a whole answer, the token itself and then the most probable ones at its position."""
    if isinstance(item, Chunk) or not item.logprobs:
        return None
    return [[*map(_logprob, (token, *token.top))] for token in item.logprobs]


def _logprob(token: TokenLogprob) -> LogProb:
    """Return the token in LlamaIndex's form."""
    whole = PARTIAL_CHARACTER not in token.token  # of a part the bytes are not known
    return LogProb(token=token.token, logprob=token.logprob, bytes=[*token.token.encode()] if whole else [])


def invalid_selections(response: ChatResponse) -> list[ToolSelection]:
    """Return a selection of a tool that does not exist for each call that cannot be read.

    An agent answers that there is no tool of that name, and the name says what is wrong with the call.
    """
    calls = (response.raw or {}).get("invalid_tool_calls", ())
    return [
        ToolSelection(
            tool_id=call["id"],
            tool_name=f"{call['name'] or ''!r} (of a call that cannot be read: {call['error']})",
            tool_kwargs={},
        )
        for call in calls
    ]


def parse_response(output_cls: type[Model], response: ChatResponse) -> Model:
    """Parse an answer into an object of a pydantic class.

    Raises:
        AnswerCut: `max_tokens` cut the answer.
        ValidationError: It does not match the class for another reason.
    """
    try:
        return output_cls.model_validate_json(response.message.content or "")
    except ValidationError as error:
        refuse_cut(response, error)
        raise


def refuse_cut(response: ChatResponse, cause: Exception | None = None) -> None:
    """Raise an `AnswerCut` if `max_tokens` cut the answer."""
    if response.raw and response.raw["finish_reason"] == "length":
        raise AnswerCut("The answer was cut at max_tokens before it was complete; use a larger max_tokens.") from cause


def _raw(item: Chunk | Alignment) -> dict[str, Any] | None:
    if isinstance(item, Chunk):
        return None
    usage = item.usage
    return {
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.output_tokens,
            "reasoning_tokens": usage.reasoning_tokens,
            "total_tokens": usage.total_tokens,
        },
        "finish_reason": item.finish_reason,
        "invalid_tool_calls": [asdict(call) for call in item.invalid_tool_calls],
        "cards": item.summary(),
    }
