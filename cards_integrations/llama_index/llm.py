"""CARDS as a LlamaIndex LLM."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextvars import ContextVar
from typing import Any

from llama_index.core.base.llms.generic_utils import messages_to_prompt
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
    ToolCallBlock,
)
from llama_index.core.instrumentation.events.llm import LLMStructuredPredictEndEvent, LLMStructuredPredictStartEvent
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection, default_completion_to_prompt
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools.types import BaseTool
from llama_index_instrumentation import get_dispatcher
from pydantic import BaseModel
from pydantic_core import PydanticSerializationError

from cards_integrations.chat.response_format import ResponseFormat, as_response_format
from cards_integrations.chat.template import FormattedPrompt
from cards_integrations.engine.engine import Engine
from cards_integrations.engine.request import Request
from cards_integrations.errors import SettingsError
from cards_integrations.llama_index.convert import (
    Model,
    as_prompt,
    chat_response,
    completion_response,
    convert_options,
    invalid_selections,
    parse_response,
    refuse_cut,
    tool_schemas,
)
from cards_integrations.llama_index.retrieval import retrieved_in
from cards_integrations.llama_index.streaming import (
    asend_segment,
    astream_objects,
    astream_responses,
    closing_callback,
    send_segment,
    stream_objects,
    stream_responses,
)
from cards_integrations.models.sources import context_window
from cards_integrations.progress import shown
from cards_integrations.settings import OptionsFromEnvironment

dispatcher = get_dispatcher(__name__)
TOOL_OPTIONS = {"tools", "tool_choice", "tool_required", "allow_parallel_tool_calls", "parallel_tool_calls"}
"""What LlamaIndex's own code passes to structured calls, for integrations that answer these by a tool call."""
_calls_itself: ContextVar[bool] = ContextVar("calls_itself", default=False)
"""True within `predict_and_call`, which can only call tools that exist; an agent also answers invalid calls."""


class LlamaIndexCards(OptionsFromEnvironment, FunctionCallingLLM):
    """The LlamaIndex side of `CardsLLM`.

    Per-call keyword arguments are options of the same names. `raw["usage"]` of a response has the token counts,
    `raw["cards"]` the rewards and costs.

    `complete` and `chat` use the `system_prompt`, unless the messages have a system message of their own.
    `complete` wraps its prompt in the `query_wrapper_prompt`, which has a `{query_str}`.
    `completion_to_prompt` and `messages_to_prompt` replace the tokenizer's chat template; tools are refused then.
    """

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex serializes it."""
        return "CardsLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """The model's name and its limits in tokens. This may read its configuration, but loads no weights."""
        options = self.resolve_options({})
        with shown(options.progress):
            window = context_window(options.model)
        return LLMMetadata(
            context_window=window,
            num_output=options.max_tokens,
            is_chat_model=True,
            is_function_calling_model=True,
            model_name=options.model.model,
        )

    @property
    def tokenizer(self) -> Callable[[str], list[int]]:
        """The model's own tokenizer, for `Settings.tokenizer`; loads the model."""
        return self._engine({}).loaded().chat.encode

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt, as one message of the user; with `formatted=True` it is used as model input as it is."""
        request = self._completion_request(prompt, formatted, kwargs)
        return completion_response(self._engine(kwargs).run(request, send_segment))

    @closing_callback(llm_completion_callback)
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Like `complete`, with a response for each kept segment; closing the stream stops the drafting."""
        request = self._completion_request(prompt, formatted, kwargs)
        return stream_responses(self._engine(kwargs), request, completion_response)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Async version of `complete`."""
        request = self._completion_request(prompt, formatted, kwargs)
        return completion_response(await self._engine(kwargs).arun(request, asend_segment))

    @closing_callback(llm_completion_callback)
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """Async version of `stream_complete`."""
        request = self._completion_request(prompt, formatted, kwargs)
        return astream_responses(self._engine(kwargs), request, completion_response)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation."""
        return chat_response(self._engine(kwargs).run(self._chat_request(messages, kwargs), send_segment))

    @closing_callback(llm_chat_callback)
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Like `chat`, with a response for each kept segment; closing the stream stops the drafting."""
        return stream_responses(self._engine(kwargs), self._chat_request(messages, kwargs), chat_response)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Async version of `chat`."""
        return chat_response(await self._engine(kwargs).arun(self._chat_request(messages, kwargs), asend_segment))

    @closing_callback(llm_chat_callback)
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Async version of `stream_chat`."""
        return astream_responses(self._engine(kwargs), self._chat_request(messages, kwargs), chat_response)

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
        """Return the arguments of `chat`; `tool_choice` takes precedence over `tool_required`."""
        if isinstance(user_msg, str):
            user_msg = ChatMessage(role=MessageRole.USER, content=user_msg)
        required = "any" if tool_required and tools else None
        return {
            "messages": [*(chat_history or ()), *([] if user_msg is None else [user_msg])],
            "tools": tool_schemas(tools) or None,
            "tool_choice": tool_choice or required,
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """Return the tool calls of an answer.

        Raises:
            AnswerCut: There is none, and `max_tokens` cut the answer.
            ValueError: There is none, unless `error_on_no_tool_call` is False. An agent, which passes False, gets
                invalid calls if there are no others, each with its error in the name of the tool.
        """
        calls = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        if not calls and not error_on_no_tool_call and not _calls_itself.get():
            return invalid_selections(response)
        if not calls and error_on_no_tool_call:
            refuse_cut(response)
            raise ValueError(f"The answer calls no tool: {response.message.content!r}")
        return [
            ToolSelection(tool_id=call.tool_call_id or "", tool_name=call.tool_name, tool_kwargs=call.tool_kwargs)
            for call in calls
        ]

    def predict_and_call(self, *args: Any, **kwargs: Any) -> Any:
        """Answer and call the tools that the answer calls; see LlamaIndex's `FunctionCallingLLM`."""
        token = _calls_itself.set(True)
        try:
            return super().predict_and_call(*args, **kwargs)
        finally:
            _calls_itself.reset(token)

    async def apredict_and_call(self, *args: Any, **kwargs: Any) -> Any:
        """Async version of `predict_and_call`."""
        token = _calls_itself.set(True)
        try:
            return await super().apredict_and_call(*args, **kwargs)
        finally:
            _calls_itself.reset(token)

    # --- structured output: a grammar holds the answer to the schema, whichever method asks for it ---

    @dispatcher.span
    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """Answer a prompt template with an object of a pydantic class.

        Args:
            output_cls: The class.
            prompt: The template.
            llm_kwargs: Options of the call.
            prompt_args: The template's variables.

        Raises:
            AnswerCut: `max_tokens` cut the answer.
        """
        _predict_started(output_cls, prompt, prompt_args)
        messages = prompt.format_messages(llm=self, **prompt_args)
        return _predict_ended(parse_response(output_cls, self.chat(messages, **_held_to(output_cls, llm_kwargs))))

    @dispatcher.span
    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """Async version of `structured_predict`."""
        _predict_started(output_cls, prompt, prompt_args)
        messages = prompt.format_messages(llm=self, **prompt_args)
        response = await self.achat(messages, **_held_to(output_cls, llm_kwargs))
        return _predict_ended(parse_response(output_cls, response))

    def _structured_stream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Any, None, None]:
        messages = prompt.format_messages(llm=self, **prompt_args)
        return stream_objects(self.stream_chat(messages, **_held_to(output_cls, llm_kwargs)), output_cls)

    async def _structured_astream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Any, None]:
        messages = prompt.format_messages(llm=self, **prompt_args)
        responses = await self.astream_chat(messages, **_held_to(output_cls, llm_kwargs))
        return astream_objects(responses, output_cls)

    def as_structured_llm(self, output_cls: type[BaseModel], **kwargs: Any) -> StructuredLLM:
        """Return an LLM whose answers are objects of a pydantic class.

        Raises:
            SettingsError: No grammar can hold an answer to the schema of the class.
        """
        as_response_format(output_cls)
        return super().as_structured_llm(output_cls, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle all options or none: LlamaIndex drops what cannot be pickled, even from the object itself."""
        state = super(LlamaIndexCards, self.model_copy()).__getstate__()
        for name in self.options().keys() - state["__dict__"].keys():
            raise SettingsError(f"{name}={getattr(self, name)!r} cannot be pickled; use module-level functions.")
        return state

    def _engine(self, overrides: dict[str, Any]) -> Engine:
        return self.engine_for(overrides, self)

    def _completion_request(self, prompt: str, formatted: bool, overrides: dict[str, Any]) -> Request:
        as_prompt(prompt)  # raises if it is empty
        if self.query_wrapper_prompt is not None and not formatted:
            prompt = self.query_wrapper_prompt.format(query_str=prompt)
        to_prompt = self.completion_to_prompt
        if not formatted and to_prompt not in (None, default_completion_to_prompt):
            prompt, formatted = to_prompt(prompt), True
        if formatted:
            return self.request(FormattedPrompt(as_prompt(prompt)), overrides)
        return self._chat_request([ChatMessage(role=MessageRole.USER, content=prompt)], overrides)

    def _chat_request(self, messages: Sequence[ChatMessage], overrides: dict[str, Any]) -> Request:
        messages = list(messages)
        if messages and not any(message.role == MessageRole.SYSTEM for message in messages):
            messages = self._extend_messages(messages)
        options = convert_options(overrides)
        if "context" not in options:
            options["context"] = retrieved_in([message.content or "" for message in messages])
        if self.messages_to_prompt not in (None, messages_to_prompt):
            messages = _told_of(as_response_format(options.get("response_format")), messages)
            return self.request(FormattedPrompt(as_prompt(self.messages_to_prompt(messages))), options)
        return self.request(as_prompt(messages), options)

    def to_json(self, **kwargs: Any) -> str:
        """Serialize the settings as JSON, without keys.

        Raises:
            SettingsError: An option has no JSON form, such as a reward function that has no importable name.
        """
        try:
            return super().to_json(mode="json", **kwargs)
        except PydanticSerializationError as error:
            raise SettingsError(
                f"These settings cannot be written as JSON (a reward that is a lambda cannot, for example): {error}"
            ) from error


def _told_of(json_format: ResponseFormat | None, messages: list[ChatMessage]) -> list[ChatMessage]:
    """Return the messages with the schema of the answer in the first of them, the system message."""
    if json_format is None or json_format.schema is None or not messages:
        return messages
    first, *rest = messages if messages[0].role == MessageRole.SYSTEM else [ChatMessage(content=""), *messages]
    said = f"{first.content or ''}\n\n{json_format.instruction}".lstrip()
    return [ChatMessage(role=MessageRole.SYSTEM, content=said), *rest]


def _held_to(output_cls: type[BaseModel], llm_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Return the options of a call whose answer is an object; options of tools are dropped if there are no tools."""
    options = {**(llm_kwargs or {}), "response_format": output_cls}
    return options if options.get("tools") else {k: v for k, v in options.items() if k not in TOOL_OPTIONS}


def _predict_started(output_cls: type[BaseModel], prompt: PromptTemplate, prompt_args: dict[str, Any]) -> None:
    dispatcher.event(LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=prompt_args))


def _predict_ended(output: Model) -> Model:
    dispatcher.event(LLMStructuredPredictEndEvent(output=output))
    return output
