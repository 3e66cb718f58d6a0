"""CARDS as a LlamaIndex LLM."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing, closing
from functools import wraps
from inspect import iscoroutinefunction
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
from cards_integrations.errors import SettingsError
from cards_integrations.messages import as_prompt
from cards_integrations.models.chat import Formatted
from cards_integrations.models.loading import context_window
from cards_integrations.session import Chunk
from cards_integrations.settings import FromEnvironment
from cards_integrations.trace import Alignment

Response = TypeVar("Response", ChatResponse, CompletionResponse)
Method = TypeVar("Method", bound=Callable[..., Any])


def stream_callback(callback: Callable[[], Any]) -> Callable[[Method], Method]:
    """`callback`, for a method that streams: whoever closes the stream that it returns stops the drafting.

    LlamaIndex's callbacks wrap the method's own stream in another one, and closing that leaves the
    method's open for as long as an event handler holds the exception.
    """

    def decorate(method: Method) -> Any:
        def stream(self: Any, *args: Any, **kwargs: Any) -> Any:
            own: list[Any] = []

            def opened(*args: Any, **kwargs: Any) -> Any:
                own.append(method(*args, **kwargs))
                return own[0]

            return _both(callback()(opened)(self, *args, **kwargs), own[0])

        async def astream(self: Any, *args: Any, **kwargs: Any) -> Any:
            own: list[Any] = []

            async def opened(*args: Any, **kwargs: Any) -> Any:
                own.append(await method(*args, **kwargs))
                return own[0]

            return _aboth(await callback()(opened)(self, *args, **kwargs), own[0])

        return wraps(method)(astream if iscoroutinefunction(method) else stream)

    return decorate


def _both(outer: Generator[Response, None, None], own: Any) -> Generator[Response, None, None]:
    with closing(own):
        yield from outer


async def _aboth(outer: AsyncGenerator[Response, None], own: Any) -> AsyncGenerator[Response, None]:
    async with aclosing(own), aclosing(outer):
        async for response in outer:
            yield response


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
        chosen = self.chosen({})
        return LLMMetadata(
            context_window=context_window(chosen.model),
            num_output=chosen.max_tokens,
            is_chat_model=True,
            is_function_calling_model=False,
            model_name=chosen.model.model,
        )

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return _completion(self._engine(kwargs).run(self._completion_request(prompt, formatted, kwargs)))

    @stream_callback(llm_completion_callback)
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        return _stream(self._engine(kwargs), self._completion_request(prompt, formatted, kwargs), _completion)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return _completion(await self._engine(kwargs).arun(self._completion_request(prompt, formatted, kwargs)))

    @stream_callback(llm_completion_callback)
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        return _astream(self._engine(kwargs), self._completion_request(prompt, formatted, kwargs), _completion)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return _chat(self._engine(kwargs).run(self._chat_request(messages, kwargs)))

    @stream_callback(llm_chat_callback)
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        return _stream(self._engine(kwargs), self._chat_request(messages, kwargs), _chat)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return _chat(await self._engine(kwargs).arun(self._chat_request(messages, kwargs)))

    @stream_callback(llm_chat_callback)
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        return _astream(self._engine(kwargs), self._chat_request(messages, kwargs), _chat)

    def _prepare_chat_with_tools(self, tools: Sequence[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise NotImplementedError("CardsLLM does not call tools yet; use a ReActAgent.")

    def get_tool_calls_from_response(self, response: Any, *args: Any, **kwargs: Any) -> list[ToolSelection]:
        raise NotImplementedError("CardsLLM does not call tools yet.")

    def __getstate__(self) -> dict[str, Any]:
        """LlamaIndex drops what cannot be pickled, even from the object; a lost option would come back as another."""
        state = super(LlamaIndexCards, self.model_copy()).__getstate__()
        for name in self.options().keys() - state["__dict__"].keys():
            raise SettingsError(f"{name}={getattr(self, name)!r} cannot be pickled; use module-level functions.")
        return state

    def _engine(self, overrides: dict[str, Any]) -> Engine:
        return self.engine_for(overrides, self)

    def _completion_request(self, prompt: str, formatted: bool, overrides: dict[str, Any]) -> Request:
        as_prompt(prompt)  # refuses an empty one
        if formatted:
            return self.request(Formatted(prompt), overrides)
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
