"""`ChatCards`: CARDS as a LangChain chat model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, get_buffer_string
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import get_config_list
from pydantic import ConfigDict, Field

from cards_integrations.chat.message import as_chat
from cards_integrations.chat.response_format import as_response_format
from cards_integrations.chat.thinking import switches
from cards_integrations.chat.tools import as_tools
from cards_integrations.engine.request import Request
from cards_integrations.errors import PromptError
from cards_integrations.langchain.base import CardsLangChainBase
from cards_integrations.langchain.cache_key import call_key
from cards_integrations.langchain.callbacks import (
    asegment_callback,
    astream_chunks,
    awithin_run,
    current_run,
    pop_current_run,
    segment_callback,
    start_run,
    stream_chunks,
    within_run,
)
from cards_integrations.langchain.convert import (
    ChunkConverter,
    add_outputs,
    as_chat_result,
    as_message,
    as_prompt,
    convert_options,
    is_form,
    tool_schemas,
)
from cards_integrations.langchain.profile import model_profile
from cards_integrations.langchain.structured_output import Method, structured_chain
from cards_integrations.progress import shown


class ChatCards(CardsLangChainBase, BaseChatModel):
    """A LangChain chat model whose answers a reward model guides while they are written.

    It takes the options of `CardsLLM` and those of every LangChain chat model (`cache`, `callbacks`, `rate_limiter`,
    ...). The options of a single call have the same names: `llm.invoke(..., max_tokens=64)`, `llm.bind(decoding=...)`.
    A call also takes `context=`, `grammar=`, `response_format=`, `tools=`, `tool_choice=` and `parallel_tool_calls=`.
    The rewards, segments and costs of an answer are in `response_metadata["cards"]` of its message, the token counts in
    `usage_metadata`. `stream` yields a chunk for each kept segment, and `batch` drafts its inputs together.
    Construction loads nothing; the first call does.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    streaming: bool = False
    """Report each kept segment to the callbacks of `invoke`, too, and not only to those of `stream`."""

    profile: ModelProfile | None = Field(default=None, exclude=True)
    """What the model can do, for LangChain's agents; by default what is known without loading it."""

    # --- LangChain's contract ---

    def _resolve_model_profile(self) -> ModelProfile:
        with shown(self.progress):
            return model_profile(self)

    @property
    def _llm_type(self) -> str:
        return "cards-chat"

    def _get_invocation_params(self, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        """Return the parameters of traces and of the cache key, with the object's stop strings if the call has none."""
        return super()._get_invocation_params(list(self.stop) if stop is None else stop, **kwargs)

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """Return the cache key. It tells apart what only looks alike."""
        return super()._get_llm_string(stop, **call_key(kwargs))

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        engine, requests = self._engine(kwargs), self._requests(messages, stop, kwargs)
        if len(requests) > 1:
            return as_chat_result(*engine.run_many(requests))
        return as_chat_result(engine.run(requests[0], segment_callback(run_manager)))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        engine, requests = self._engine(kwargs), self._requests(messages, stop, kwargs)
        if len(requests) > 1:
            return as_chat_result(*await engine.arun_many(requests))
        return as_chat_result(await engine.arun(requests[0], asegment_callback(run_manager)))

    def _combine_llm_outputs(self, llm_outputs: list[dict[str, Any] | None]) -> dict[str, Any]:
        """Return the usage of all prompts of a call; LangChain asks for it where prompts have several answers."""
        return add_outputs(llm_outputs)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        on_segment = segment_callback(run_manager or pop_current_run())
        items = self._engine(kwargs).stream(self._request(messages, stop, kwargs))
        return stream_chunks(items, ChunkConverter(self.output_version == "v1"), run_manager, on_segment)

    def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        on_segment = asegment_callback(run_manager or pop_current_run())
        items = self._engine(kwargs).astream(self._request(messages, stop, kwargs))
        return astream_chunks(items, ChunkConverter(self.output_version == "v1"), run_manager, on_segment)

    # `_stream` sends kept segments to the callbacks of its run, which it finds in `current_run`.

    def stream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[AIMessageChunk]:
        """Answer one input and yield a chunk for each kept segment; closing the stream stops the drafting."""
        self._refuse_streaming_several(kwargs)
        config, run = start_run(config, self)
        yield from within_run(run, super().stream(input, config, **kwargs))

    async def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[AIMessageChunk]:
        """Async version of `stream`."""
        self._refuse_streaming_several(kwargs)
        config, run = start_run(config, self)
        async with aclosing(super().astream(input, config, **kwargs)) as items:  # type: ignore[type-var]
            async for item in awithin_run(run, items):
                yield item

    def _should_stream(self, *, run_manager: Any = None, **kwargs: Any) -> bool:
        streams = kwargs.get("n", self.n) == 1 and super()._should_stream(run_manager=run_manager, **kwargs)
        if streams and run_manager is not None:
            current_run.set(run_manager)
        return streams

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Answer all inputs; `max_concurrency` at once, or by default as many as the engine runs."""
        configs = get_config_list(config, len(inputs))
        for each in configs:
            each["max_concurrency"] = each.get("max_concurrency") or max(1, min(len(inputs), self.engine.max_rows))
        return super().batch(inputs, configs, **kwargs)

    def bind_tools(
        self,
        tools: Sequence[Any],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Return this model with tools that its answers may call.

        Args:
            tools: LangChain tools, functions, pydantic classes, typed dicts, or functions as OpenAI describes them.
            tool_choice: "auto" (the default; the model decides), "none", "any" or "required" (at least one call),
                or the name of a tool (one call of it). A grammar holds a required call to the tool's schema.
            strict: Hold calls to the schema under "auto", too.
            parallel_tool_calls: False allows one call in an answer. That is the default if a tool is only a form with
                nothing to run, like those of LangChain's `ToolStrategy`.
            kwargs: Options of the calls, such as `max_tokens`.

        Raises:
            SettingsError: A tool cannot be described as a function, `tool_choice` names no tool, or no grammar can
                enforce the schema of a tool whose calls must match it.
        """
        schemas = tool_schemas(tools, strict)
        offered = as_tools(schemas, tool_choice)  # so that errors are raised here, not by the call
        if offered is not None and as_response_format(kwargs.get("response_format")) is not None:
            offered.check_schemas()
        if parallel_tool_calls is None and any(map(is_form, tools)):
            parallel_tool_calls = False  # one answer fills in one form
        for name, value in (("tool_choice", tool_choice), ("parallel_tool_calls", parallel_tool_calls)):
            if value is not None:
                kwargs[name] = value
        return self.bind(tools=schemas, **kwargs)

    def with_structured_output(
        self,
        schema: Any = None,
        *,
        method: Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Return a chain that answers with objects of a schema.

        Args:
            schema: A pydantic class, whose objects are the answers; or a typed dict or a JSON schema, for dicts.
                "json_mode" needs none.
            method: "json_schema" shows the schema to the model and holds the answer to it; "function_calling" makes
                the model call a tool with that schema; "json_mode" holds the answer to any JSON object, and the
                prompt must say which.
            include_raw: Answer with a dict of the message ("raw"), the object ("parsed") and the "parsing_error".
            strict: As in OpenAI's API.
            kwargs: Options of the calls, such as `max_tokens`. With `tools=` the model may call these instead; the
                object is None then, and `include_raw` has the calls.

        Raises:
            SettingsError: The method is unknown, or it needs a schema.
            OutputParserException: Raised by the chain if `max_tokens` cut the answer.
        """
        return structured_chain(self, schema, method, include_raw, strict, kwargs)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Count the tokens of the prompt that these messages become, chat template included; loads the model.

        Messages that cannot be a prompt, such as an empty list or images, are counted as well.
        """
        try:
            counted = as_chat(messages, as_message)
        except PromptError:  # not all of it is text
            return self.get_num_tokens(get_buffer_string(messages))
        arguments = switches(self.thinking, self.chat_template_kwargs)
        return self._engine({}).loaded().chat.count(counted, as_tools(tool_schemas(tools)), arguments)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self._langsmith_params("chat", stop, kwargs)

    def _request(self, messages: list[BaseMessage], stop: list[str] | None, overrides: dict[str, Any]) -> Request:
        self._refuse_streaming_several(overrides)
        return self._requests(messages, stop, overrides)[0]

    def _requests(
        self, messages: list[BaseMessage], stop: list[str] | None, overrides: dict[str, Any]
    ) -> list[Request]:
        options = {name: value for name, value in overrides.items() if name != "stream"}  # LangChain's own argument
        if stop is not None:
            options["stop"] = stop
        return self.requests(as_prompt(messages), convert_options(options))
