"""`CardsCompletion`: CARDS as a LangChain text LLM, for chains that insist on one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseLLM
from langchain_core.language_models.base import LangSmithParams
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import ConfigDict

from cards_integrations.chat.template import Formatted
from cards_integrations.engine.request import Chunk, Request
from cards_integrations.langchain.chat_model import LangChainFace
from cards_integrations.langchain.convert import as_prompt
from cards_integrations.trace import Alignment


class CardsCompletion(LangChainFace, BaseLLM):
    """Text in, text out, without a chat template; `generate` drafts all its prompts in one batch.

    The rewards, segments and costs of an answer are in its `generation_info["cards"]`.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    @property
    def _llm_type(self) -> str:
        return "cards-completion"

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        return _result(self._engine(kwargs).run_many(self._requests(prompts, stop, kwargs)))

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        return _result(await self._engine(kwargs).arun_many(self._requests(prompts, stop, kwargs)))

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        (request,) = self._requests([prompt], stop, kwargs)
        for item in self._engine(kwargs).stream(request):
            if (chunk := _chunk(item)) is not None:
                if run_manager:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        (request,) = self._requests([prompt], stop, kwargs)
        async with aclosing(self._engine(kwargs).astream(request)) as items:
            async for item in items:
                if (chunk := _chunk(item)) is not None:
                    if run_manager:
                        await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self.traced_as("llm", stop, kwargs)

    def _requests(self, prompts: list[str], stop: list[str] | None, overrides: dict[str, Any]) -> list[Request]:
        own = overrides if stop is None else {**overrides, "stop": stop}
        return [self.request(Formatted(as_prompt(prompt)), own) for prompt in prompts]


def _result(answers: list[Alignment]) -> LLMResult:
    return LLMResult(
        generations=[[Generation(text=answer.text, generation_info=_info(answer))] for answer in answers],
        llm_output={
            "model_name": answers[0].model if answers else None,
            "token_usage": {
                "prompt_tokens": sum(answer.usage.prompt_tokens for answer in answers),
                "completion_tokens": sum(answer.usage.completion_tokens for answer in answers),
                "total_tokens": sum(answer.usage.total_tokens for answer in answers),
            },
        },
    )


def _chunk(item: Chunk | Alignment) -> GenerationChunk | None:
    if isinstance(item, Alignment):
        return GenerationChunk(text="", generation_info=_info(item))
    return GenerationChunk(text=item.text) if item.text else None


def _info(answer: Alignment) -> dict[str, Any]:
    return {"finish_reason": answer.finish_reason, "cards": answer.summary()}
