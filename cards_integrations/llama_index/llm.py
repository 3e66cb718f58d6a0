"""CARDS as a LlamaIndex LLM."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing, closing
from dataclasses import asdict
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, TypeVar

from llama_index.core.base.llms.generic_utils import messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    ContentBlock,
    LLMMetadata,
    MessageRole,
    TextBlock,
    ToolCallBlock,
)
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.llm import LLMStructuredPredictEndEvent, LLMStructuredPredictStartEvent
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection, default_completion_to_prompt
from llama_index.core.program.utils import process_streaming_objects
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools.types import BaseTool
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.span import active_span_id
from pydantic import BaseModel, ValidationError

from cards_integrations.chat.template import Formatted
from cards_integrations.engine.engine import Engine
from cards_integrations.engine.request import Chunk, Request
from cards_integrations.errors import AnswerCut, SettingsError
from cards_integrations.langchain.convert import as_prompt
from cards_integrations.langchain.retrieval import retrieved_in
from cards_integrations.langchain.schemas import converted, tool_schemas
from cards_integrations.models.sources import context_window
from cards_integrations.settings import FromEnvironment
from cards_integrations.trace import Alignment, InvalidToolCall, ToolCall

dispatcher = get_dispatcher(__name__)
Model = TypeVar("Model", bound=BaseModel)
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
    and by `chat`, unless the messages bring a system message of their own. `completion_to_prompt` and
    `messages_to_prompt` take the place of the tokenizer's chat template.
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
            is_function_calling_model=True,
            model_name=chosen.model.model,
        )

    @property
    def tokenizer(self) -> Callable[[str], list[int]]:
        """For `Settings.tokenizer`, so that LlamaIndex counts in this model's own tokens."""
        return self._engine({}).loaded().chat.encode

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return _completion(self._engine(kwargs).run(self._completion_request(prompt, formatted, kwargs), _tell))

    @stream_callback(llm_completion_callback)
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        return _stream(self._engine(kwargs), self._completion_request(prompt, formatted, kwargs), _completion)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        request = self._completion_request(prompt, formatted, kwargs)
        return _completion(await self._engine(kwargs).arun(request, _atell))

    @stream_callback(llm_completion_callback)
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        return _astream(self._engine(kwargs), self._completion_request(prompt, formatted, kwargs), _completion)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return _chat(self._engine(kwargs).run(self._chat_request(messages, kwargs), _tell))

    @stream_callback(llm_chat_callback)
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        return _stream(self._engine(kwargs), self._chat_request(messages, kwargs), _chat)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return _chat(await self._engine(kwargs).arun(self._chat_request(messages, kwargs), _atell))

    @stream_callback(llm_chat_callback)
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        return _astream(self._engine(kwargs), self._chat_request(messages, kwargs), _chat)

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of `chat`; `tool_choice` goes before `tool_required`."""
        if isinstance(user_msg, str):
            user_msg = ChatMessage(role=MessageRole.USER, content=user_msg)
        asked = [] if user_msg is None else [user_msg]
        required = "any" if tool_required and tools else None
        return {
            "messages": [*(chat_history or ()), *asked],
            "tools": tool_schemas(tools) or None,
            "tool_choice": tool_choice or required,
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The calls of an answer. Without any it is an `AnswerCut` or a `ValueError`, unless told otherwise."""
        calls = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        if not calls and error_on_no_tool_call:
            _refuse_cut(response)
            raise ValueError(f"The answer calls no tool: {response.message.content!r}")
        return [
            ToolSelection(tool_id=call.tool_call_id or "", tool_name=call.tool_name, tool_kwargs=call.tool_kwargs)
            for call in calls
        ]

    # --- structured output: the answer is held to the schema, whichever way it is asked for ---

    @dispatcher.span
    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """An object of a pydantic class; an `AnswerCut` if `max_tokens` cut it."""
        _started(output_cls, prompt, prompt_args)
        response = self.chat(prompt.format_messages(llm=self, **prompt_args), **_wanted(output_cls, llm_kwargs))
        return _ended(_parsed(output_cls, response))

    @dispatcher.span
    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """Like `structured_predict`, without blocking the event loop."""
        _started(output_cls, prompt, prompt_args)
        messages = prompt.format_messages(llm=self, **prompt_args)
        return _ended(_parsed(output_cls, await self.achat(messages, **_wanted(output_cls, llm_kwargs))))

    def _structured_stream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Any, None, None]:
        """Objects that grow; fields that are not there yet are None."""
        messages = prompt.format_messages(llm=self, **prompt_args)
        for response in self.stream_chat(messages, **_wanted(output_cls, llm_kwargs)):
            if response.raw:
                _parsed(output_cls, response)  # the whole answer
            yield process_streaming_objects(response, output_cls, llm=self)

    async def _structured_astream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Any, None]:
        messages = prompt.format_messages(llm=self, **prompt_args)
        stream = await self.astream_chat(messages, **_wanted(output_cls, llm_kwargs))

        async def objects() -> AsyncGenerator[Any, None]:
            async for response in stream:
                if response.raw:
                    _parsed(output_cls, response)
                yield process_streaming_objects(response, output_cls, llm=self)

        return objects()

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
        own = self.completion_to_prompt
        if not formatted and own not in (None, default_completion_to_prompt):
            prompt, formatted = own(prompt), True
        if formatted:
            return self.request(Formatted(as_prompt(prompt)), overrides)
        return self._chat_request([ChatMessage(role=MessageRole.USER, content=prompt)], overrides)

    def _chat_request(self, messages: Sequence[ChatMessage], overrides: dict[str, Any]) -> Request:
        messages = list(messages)
        if messages and not any(message.role == MessageRole.SYSTEM for message in messages):
            messages = self._extend_messages(messages)
        own = converted(overrides)
        if "context" not in own:
            own["context"] = retrieved_in([message.content or "" for message in messages])
        if self.messages_to_prompt not in (None, messages_to_prompt):
            return self.request(Formatted(as_prompt(self.messages_to_prompt(messages))), own)
        return self.request(as_prompt(messages), own)

    def to_json(self, **kwargs: Any) -> str:
        """Without keys. A reward that is code has no JSON."""
        return super().to_json(mode="json", **kwargs)


class CardsSegmentEvent(BaseEvent):
    """A segment was kept: its place in the answer, its text, reward and threshold, and all its drafts."""

    segment: int
    text: str
    reward: float | None
    threshold: float | None
    drafts: list[dict[str, Any]]

    @classmethod
    def class_name(cls) -> str:
        return "CardsSegmentEvent"


def _tell(chunk: Chunk, span: str | None = None) -> None:
    where = {} if span is None else {"span_id": span}
    dispatcher.event(CardsSegmentEvent(segment=chunk.number, **chunk.segment.summary(), **where))


async def _atell(chunk: Chunk) -> None:
    _tell(chunk)


def _wanted(output_cls: type[BaseModel], llm_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    return {**(llm_kwargs or {}), "response_format": output_cls}


def _parsed(output_cls: type[Model], response: ChatResponse) -> Model:
    try:
        return output_cls.model_validate_json(response.message.content or "")
    except ValidationError as error:
        _refuse_cut(response, error)
        raise


def _refuse_cut(response: ChatResponse, cause: Exception | None = None) -> None:
    if response.raw and response.raw["finish_reason"] == "length":
        raise AnswerCut("The answer was cut at max_tokens before it was whole; use a larger max_tokens.") from cause


def _started(output_cls: type[BaseModel], prompt: PromptTemplate, prompt_args: dict[str, Any]) -> None:
    dispatcher.event(LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=prompt_args))


def _ended(output: Model) -> Model:
    dispatcher.event(LLMStructuredPredictEndEvent(output=output))
    return output


class Growing:
    """The responses of a stream: what was said and called so far, and what is new."""

    def __init__(self, respond: Callable[..., Any], span: str | None) -> None:
        self.respond = respond
        self.span = span  # a stream is read outside of the span that it was opened in
        self.text = ""
        self.calls: list[ToolCall | InvalidToolCall] = []

    def of(self, item: Chunk | Alignment) -> Any:
        """None while all of a segment is held back."""
        if isinstance(item, Alignment):
            return self.respond(item, delta="")
        _tell(item, self.span)
        self.text += item.text
        self.calls += item.calls
        return self.respond(item, self.text, item.text, self.calls) if item.text or item.calls else None


def _stream(engine: Engine, request: Request, respond: Callable[..., Response]) -> Generator[Response, None, None]:
    return _responses(engine.stream(request), Growing(respond, active_span_id.get()))


def _responses(items: Generator[Chunk | Alignment, None, None], growing: Growing) -> Generator[Any, None, None]:
    with closing(items):
        for item in items:
            if (response := growing.of(item)) is not None:
                yield response


def _astream(engine: Engine, request: Request, respond: Callable[..., Response]) -> AsyncGenerator[Response, None]:
    return _aresponses(engine.astream(request), Growing(respond, active_span_id.get()))


async def _aresponses(items: AsyncGenerator[Chunk | Alignment, None], growing: Growing) -> AsyncGenerator[Any, None]:
    async with aclosing(items):
        async for item in items:
            if (response := growing.of(item)) is not None:
                yield response


def _completion(
    item: Chunk | Alignment, text: str | None = None, delta: str | None = None, calls: Sequence[Any] = ()
) -> CompletionResponse:
    return CompletionResponse(text=item.text if text is None else text, delta=delta, raw=_raw(item))


def _chat(
    item: Chunk | Alignment, text: str | None = None, delta: str | None = None, calls: Sequence[Any] = ()
) -> ChatResponse:
    if isinstance(item, Alignment):
        text, calls = item.content, item.tool_calls
    said: list[ContentBlock] = [TextBlock(text=text or "")]
    called = [
        ToolCallBlock(tool_call_id=call.id, tool_name=call.name, tool_kwargs=call.arguments)
        for call in calls
        if isinstance(call, ToolCall)
    ]
    message = ChatMessage(role=MessageRole.ASSISTANT, blocks=said + called)
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
        "invalid_tool_calls": [asdict(call) for call in item.invalid_tool_calls],
        "cards": item.summary(),
    }
