"""`ChatCards`: CARDS as a LangChain chat model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import ToolCallChunk, invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import get_config_list
from langchain_core.utils.json import parse_partial_json
from pydantic import ConfigDict, Field

from cards_integrations.chat.tools import as_tools
from cards_integrations.engine.engine import Engine
from cards_integrations.engine.request import Chunk, Request
from cards_integrations.langchain.callbacks import aduring, ateller, current, during, taken, teller, with_run
from cards_integrations.langchain.convert import as_prompt
from cards_integrations.langchain.schemas import converted, tool_schemas
from cards_integrations.langchain.structured_output import Method, structured
from cards_integrations.settings import FromEnvironment
from cards_integrations.trace import Alignment, InvalidToolCall, ToolCall

PROVIDER = "cards"


class LangChainFace(FromEnvironment):
    """What the chat model and the text LLM have in common."""

    def close(self) -> None:
        """Free the models, unless another object uses them; the next call loads them again."""
        Engine.release(self)

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {name: repr(value) for name, value in self.options().items() if name not in ("engine", "timeout")}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return False

    def get_token_ids(self, text: str) -> list[int]:
        own: Callable[[str], list[int]] | None = getattr(self, "custom_get_token_ids", None)  # LangChain's field
        if own is not None:
            return own(text)
        return self._engine({}).loaded().chat.encode(text)

    def get_num_tokens(self, text: str) -> int:
        return len(self.get_token_ids(text))

    def traced_as(
        self, kind: Literal["chat", "llm"], stop: list[str] | None, overrides: dict[str, Any]
    ) -> LangSmithParams:
        """What LangSmith is told of a call."""
        # as settings, for a mapping may hold a key
        model = self.chosen({"model": overrides["model"]}).model if "model" in overrides else self.model
        params = LangSmithParams(
            ls_provider=PROVIDER,
            ls_model_type=kind,
            ls_model_name=str(getattr(model, "model", model)),
            ls_temperature=overrides.get("temperature", self.temperature),
            ls_max_tokens=overrides.get("max_tokens", self.max_tokens),
        )
        if stop or self.stop:
            params["ls_stop"] = list(stop or self.stop)
        return params

    def _engine(self, overrides: dict[str, Any]) -> Engine:
        return self.engine_for(overrides, self)


class ChatCards(LangChainFace, BaseChatModel):
    """A local model whose answers are aligned while they are written.

    Per-call arguments (`llm.invoke(..., max_tokens=64)`, `llm.bind(decoding=...)`) are options of the
    same names. The answer's rewards, segments and costs are in `response_metadata["cards"]`.
    `streaming=True` makes `invoke` report each kept segment to the callbacks, too.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    streaming: bool = False
    profile: ModelProfile | None = Field(
        default=ModelProfile(tool_calling=True, tool_choice=True, structured_output=True), exclude=True
    )

    # --- LangChain's contract ---

    @property
    def _llm_type(self) -> str:
        return "cards-chat"

    def _get_invocation_params(self, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        """For traces and the cache's key: the stop strings that hold, not only those of the call."""
        return super()._get_invocation_params(list(self.stop) if stop is None else stop, **kwargs)

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """For the cache's key: schemas, for two classes of one name may differ."""
        return super()._get_llm_string(stop, **converted(kwargs))

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return _result(self._engine(kwargs).run(self._request(messages, stop, kwargs), teller(run_manager)))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return _result(await self._engine(kwargs).arun(self._request(messages, stop, kwargs), ateller(run_manager)))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        chunks, tell = Chunks(), teller(run_manager or taken())
        for item in self._engine(kwargs).stream(self._request(messages, stop, kwargs)):
            if tell and isinstance(item, Chunk):
                tell(item)
            if (chunk := chunks.of(item)) is not None:
                if run_manager:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        chunks, tell = Chunks(), ateller(run_manager or taken())
        async with aclosing(self._engine(kwargs).astream(self._request(messages, stop, kwargs))) as items:
            async for item in items:
                if tell and isinstance(item, Chunk):
                    await tell(item)
                if (chunk := chunks.of(item)) is not None:
                    if run_manager:
                        await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    # `_stream` tells the callbacks of kept segments, and has to know in which run.

    def stream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[AIMessageChunk]:
        config, run = with_run(config, self)
        yield from during(run, super().stream(input, config, **kwargs))

    async def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[AIMessageChunk]:
        config, run = with_run(config, self)
        async with aclosing(super().astream(input, config, **kwargs)) as items:  # type: ignore[type-var]
            async for item in aduring(run, items):
                yield item

    def _should_stream(self, *, run_manager: Any = None, **kwargs: Any) -> bool:
        streams = super()._should_stream(run_manager=run_manager, **kwargs)
        if streams and run_manager is not None:
            current.set(run_manager)
        return streams

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """As many inputs at once as the engine drafts in one batch, unless `max_concurrency` says otherwise."""
        configs = get_config_list(config, len(inputs))
        for one in configs:
            one["max_concurrency"] = one.get("max_concurrency") or max(1, min(len(inputs), self.engine.max_rows))
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
        """The same model with tools that its answers may call.

        `tool_choice` is "auto" (the model decides), "none", "any" or "required" (at least one call), or
        the name of a tool (one call). A call that is forced is held to the tool's schema by a grammar;
        `strict=True` holds the others to it, too.
        """
        schemas = tool_schemas(tools, strict)
        as_tools(schemas, tool_choice)  # refuses here what a call would refuse
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
        """Answers as objects of a schema: a pydantic class, a typed dict, or a JSON schema (then dicts).

        "json_schema" tells the model the schema and holds the answer to it; "function_calling" has it call a
        tool with that schema; "json_mode" holds it to some JSON object, and the prompt says which.
        An answer that `max_tokens` cuts raises an `OutputParserException`.
        """
        return structured(self, schema, method, include_raw, strict, kwargs)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Tokens of the prompt that these messages make, template included."""
        chosen = as_tools(tool_schemas(tools))
        return len(self._engine({}).loaded().chat.prompt(as_prompt(messages), chosen)[1])

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self.traced_as("chat", stop, kwargs)

    # --- to the engine ---

    def _request(self, messages: list[BaseMessage], stop: list[str] | None, overrides: dict[str, Any]) -> Request:
        own = {} if stop is None else {"stop": stop}
        said = {name: value for name, value in overrides.items() if name != "stream"}  # LangChain's: which way to ask
        return self.request(as_prompt(messages), converted({**said, **own}))


def _result(answer: Alignment) -> ChatResult:
    message = AIMessage(
        answer.content,
        tool_calls=[tool_call(id=c.id, name=c.name, args=c.arguments) for c in answer.tool_calls],
        invalid_tool_calls=[
            invalid_tool_call(id=c.id, name=c.name, args=c.arguments, error=c.error) for c in answer.invalid_tool_calls
        ],
        usage_metadata=_usage(answer),
        response_metadata=_metadata(answer),
    )
    return ChatResult(generations=[ChatGeneration(message=message)])


class Chunks:
    """The chunks of one answer."""

    def __init__(self) -> None:
        self.called = 0

    def of(self, item: Chunk | Alignment) -> ChatGenerationChunk | None:
        """A kept segment's text and calls (None while all of it is held back); at the end the metadata."""
        if isinstance(item, Alignment):
            last = AIMessageChunk(
                content="", usage_metadata=_usage(item), response_metadata=_metadata(item), chunk_position="last"
            )
            return ChatGenerationChunk(message=last)
        if not item.text and not item.calls:
            return None
        calls = [self._call(call) for call in item.calls]
        return ChatGenerationChunk(message=AIMessageChunk(content=item.text, tool_call_chunks=calls))

    def _call(self, call: ToolCall | InvalidToolCall) -> ToolCallChunk:
        if isinstance(call, ToolCall):
            arguments = json.dumps(call.arguments, ensure_ascii=False)
        else:
            arguments = call.arguments
            if _closable(arguments):
                arguments = f"{call.error}: {arguments}"
        self.called += 1
        return tool_call_chunk(id=call.id, name=call.name, args=arguments, index=self.called - 1)


def _closable(text: str) -> bool:
    """Would LangChain close the JSON that a chunk leaves open, and take half a call for a whole one?"""
    try:
        return isinstance(parse_partial_json(text), dict)
    except ValueError:
        return False


def _usage(answer: Alignment) -> UsageMetadata:
    usage = answer.usage
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens),
    )


def _metadata(answer: Alignment) -> dict[str, Any]:
    return {
        "model_name": answer.model,
        "model_provider": PROVIDER,
        "finish_reason": answer.finish_reason,
        "cards": answer.summary(),
    }
