"""CARDS as a LlamaIndex LLM."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection

from cards_integrations.engine import Engine, Request
from cards_integrations.messages import as_prompt
from cards_integrations.models.chat import Formatted
from cards_integrations.models.loading import context_window
from cards_integrations.session import Chunk
from cards_integrations.settings import FromEnvironment
from cards_integrations.trace import Alignment

Response = TypeVar("Response", ChatResponse, CompletionResponse)


class LlamaIndexCards(FromEnvironment, FunctionCallingLLM):
    """The LlamaIndex face. `raw["usage"]` has the token counts, `raw["cards"]` rewards and costs.

    Per-call keyword arguments are options of the same names. The system prompt is used by `complete`
    and by `chat`, unless the messages bring a system message of their own.
    """

    @classmethod
    def class_name(cls) -> str:
        return "CardsLLM"

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(
            context_window=context_window(self.model),
            num_output=self.max_tokens,
            is_chat_model=True,
            is_function_calling_model=False,
            model_name=self.model.model,
        )

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return _completion(self._engine(kwargs).run(self._completion_request(prompt, formatted, kwargs)))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        return _stream(self._engine(kwargs), self._completion_request(prompt, formatted, kwargs), _completion)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return _completion(await self._engine(kwargs).arun(self._completion_request(prompt, formatted, kwargs)))

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        return _astream(self._engine(kwargs), self._completion_request(prompt, formatted, kwargs), _completion)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return _chat(self._engine(kwargs).run(self._chat_request(messages, kwargs)))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        return _stream(self._engine(kwargs), self._chat_request(messages, kwargs), _chat)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return _chat(await self._engine(kwargs).arun(self._chat_request(messages, kwargs)))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        return _astream(self._engine(kwargs), self._chat_request(messages, kwargs), _chat)

    def _prepare_chat_with_tools(self, tools: Sequence[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise NotImplementedError("CardsLLM does not call tools yet; use a ReActAgent.")

    def get_tool_calls_from_response(self, response: Any, *args: Any, **kwargs: Any) -> list[ToolSelection]:
        raise NotImplementedError("CardsLLM does not call tools yet.")

    def _engine(self, overrides: dict[str, Any]) -> Engine:
        return self.engine_for(overrides, self)

    def _completion_request(self, prompt: str, formatted: bool, overrides: dict[str, Any]) -> Request:
        if formatted:
            as_prompt(prompt)
            return self.request(Formatted(prompt), overrides)
        as_prompt(prompt)
        return self._chat_request([ChatMessage(role=MessageRole.USER, content=prompt)], overrides)

    def _chat_request(self, messages: Sequence[ChatMessage], overrides: dict[str, Any]) -> Request:
        messages = list(messages)
        if messages and not any(message.role == MessageRole.SYSTEM for message in messages):
            messages = self._extend_messages(messages)
        return self.request(as_prompt(messages), overrides)


def _stream(engine: Engine, request: Request, respond: Callable[..., Response]) -> Generator[Response, None, None]:
    text = ""
    for item in engine.stream(request):
        if isinstance(item, Alignment):
            yield respond(item, delta="")
        elif item.text:
            text += item.text
            yield respond(item, text=text, delta=item.text)


async def _astream(
    engine: Engine, request: Request, respond: Callable[..., Response]
) -> AsyncGenerator[Response, None]:
    text = ""
    async with aclosing(engine.astream(request)) as items:
        async for item in items:
            if isinstance(item, Alignment):
                yield respond(item, delta="")
            elif item.text:
                text += item.text
                yield respond(item, text=text, delta=item.text)


def _completion(item: Chunk | Alignment, text: str | None = None, delta: str | None = None) -> CompletionResponse:
    return CompletionResponse(text=item.text if text is None else text, delta=delta, raw=_raw(item))


def _chat(item: Chunk | Alignment, text: str | None = None, delta: str | None = None) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=item.text if text is None else text)
    return ChatResponse(message=message, delta=delta, raw=_raw(item))


def _raw(item: Chunk | Alignment) -> dict[str, Any] | None:
    if isinstance(item, Chunk):
        return None
    usage = item.usage
    return {
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
        },
        "finish_reason": item.finish_reason,
        "cards": item.summary(),
    }
