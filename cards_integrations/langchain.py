"""`ChatCards`: CARDS as a LangChain chat model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import get_config_list
from pydantic import ConfigDict

from cards_integrations.engine import Engine, Request
from cards_integrations.messages import as_prompt
from cards_integrations.session import Chunk
from cards_integrations.settings import FromEnvironment
from cards_integrations.trace import Alignment

PROVIDER = "cards"


class ChatCards(FromEnvironment, BaseChatModel):
    """A local model whose answers are aligned while they are written.

    Per-call arguments (`llm.invoke(..., max_tokens=64)`, `llm.bind(decoding=...)`) are options of the
    same names. The answer's rewards, segments and costs are in `response_metadata["cards"]`.
    `streaming=True` makes `invoke` report each kept segment to the callbacks, too.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    streaming: bool = False

    def close(self) -> None:
        """Free the models, unless another object uses them; the next call loads them again."""
        Engine.release(self)

    # --- LangChain's contract ---

    @property
    def _llm_type(self) -> str:
        return "cards-chat"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {name: repr(value) for name, value in self.options().items() if name not in ("engine", "timeout")}

    def _get_invocation_params(self, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        """For traces and the cache's key: the stop strings that hold, not only those of the call."""
        return super()._get_invocation_params(list(self.stop) if stop is None else stop, **kwargs)

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return False

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return _result(self._engine(kwargs).run(self._request(messages, stop, kwargs)))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return _result(await self._engine(kwargs).arun(self._request(messages, stop, kwargs)))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for item in self._engine(kwargs).stream(self._request(messages, stop, kwargs)):
            if (chunk := _chunk(item)) is not None:
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
        items = self._engine(kwargs).astream(self._request(messages, stop, kwargs))
        async with aclosing(items):
            async for item in items:
                if (chunk := _chunk(item)) is not None:
                    if run_manager:
                        await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """All inputs at once (the engine drafts them in one batch), unless `max_concurrency` says less."""
        configs = get_config_list(config, len(inputs))
        for one in configs:
            one["max_concurrency"] = one.get("max_concurrency") or max(1, len(inputs))
        return super().batch(inputs, configs, **kwargs)

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[LanguageModelInput, AIMessage]:
        raise NotImplementedError("ChatCards does not call tools yet.")

    def with_structured_output(self, schema: Any, **kwargs: Any) -> Runnable[LanguageModelInput, Any]:
        raise NotImplementedError("ChatCards does not produce structured output yet; use an output parser.")

    def get_token_ids(self, text: str) -> list[int]:
        return self._engine({}).loaded().chat.encode(text)

    def get_num_tokens(self, text: str) -> int:
        return len(self.get_token_ids(text))

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Tokens of the prompt that these messages make, template included."""
        if tools:
            raise NotImplementedError("ChatCards does not call tools yet.")
        return len(self._engine({}).loaded().chat.prompt(as_prompt(messages))[1])

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        model = kwargs.get("model", self.model)
        params = LangSmithParams(
            ls_provider=PROVIDER,
            ls_model_type="chat",
            ls_model_name=getattr(model, "model", model),
            ls_temperature=kwargs.get("temperature", self.temperature),
            ls_max_tokens=kwargs.get("max_tokens", self.max_tokens),
        )
        if stop or self.stop:
            params["ls_stop"] = list(stop or self.stop)
        return params

    # --- to the engine ---

    def _engine(self, overrides: dict[str, Any]) -> Engine:
        return self.engine_for(overrides, self)

    def _request(self, messages: list[BaseMessage], stop: list[str] | None, overrides: dict[str, Any]) -> Request:
        for name in ("tools", "tool_choice", "response_format"):
            if overrides.get(name):
                raise NotImplementedError(f"ChatCards does not support {name}= yet.")
        return self.request(as_prompt(messages), {**overrides, **({"stop": stop} if stop is not None else {})})


def _result(answer: Alignment) -> ChatResult:
    message = AIMessage(answer.text, usage_metadata=_usage(answer), response_metadata=_metadata(answer))
    return ChatResult(generations=[ChatGeneration(message=message)])


def _chunk(item: Chunk | Alignment) -> ChatGenerationChunk | None:
    """A kept segment's text (None while all of it is held back); at the end the metadata."""
    if isinstance(item, Chunk):
        return ChatGenerationChunk(message=AIMessageChunk(content=item.text)) if item.text else None
    last = AIMessageChunk(
        content="", usage_metadata=_usage(item), response_metadata=_metadata(item), chunk_position="last"
    )
    return ChatGenerationChunk(message=last)


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
