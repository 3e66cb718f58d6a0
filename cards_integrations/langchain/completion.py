"""`CardsCompletion`: CARDS as a LangChain text LLM, for chains that require one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextvars import ContextVar
from itertools import chain, islice
from types import MappingProxyType
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseLLM
from langchain_core.language_models.base import LangSmithParams
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import ConfigDict

from cards_integrations.chat.message import as_prompt
from cards_integrations.chat.template import FormattedPrompt
from cards_integrations.engine.request import Chunk, Request
from cards_integrations.langchain.base import CardsLangChainBase
from cards_integrations.langchain.cache_key import call_key
from cards_integrations.langchain.callbacks import astream_chunks, stream_chunks
from cards_integrations.langchain.convert import llm_output, logprobs
from cards_integrations.trace import Alignment

OF_LANGCHAIN = {"stop", "callbacks", "tags", "metadata", "run_name", "run_id"}
"""Arguments of `generate` that are no options of an answer, or that LangChain knows the answer by."""
_call: ContextVar[Mapping[str, Any]] = ContextVar("call", default=MappingProxyType({}))
"""The arguments of the call whose answers are looked up."""


class CardsCompletion(CardsLangChainBase, BaseLLM):
    """A LangChain text LLM: it continues a prompt as it is, without a chat template.

    It takes the options of `CardsLLM`; a call takes those of `ChatCards`. `generate` drafts all its prompts in one
    batch. The rewards, segments and costs of an answer are in `generation_info["cards"]` of its generation.
    Construction loads nothing; the first call does.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    @property
    def _llm_type(self) -> str:
        return "cards-completion"

    # LangChain leaves the arguments of a call out of the cache key of a text LLM, and out of its traces.

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {**super()._identifying_params, **_call.get()}

    def generate(self, prompts: list[str], *args: Any, **kwargs: Any) -> LLMResult:
        """Continue all prompts in one batch; see LangChain's `BaseLLM`."""
        token = _call.set(call_key(_own(kwargs)))
        try:
            return super().generate(prompts, *args, **kwargs)
        finally:
            _call.reset(token)

    async def agenerate(self, prompts: list[str], *args: Any, **kwargs: Any) -> LLMResult:
        """Async version of `generate`."""
        token = _call.set(call_key(_own(kwargs)))
        try:
            return await super().agenerate(prompts, *args, **kwargs)
        finally:
            _call.reset(token)

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        asked = self._requests(prompts, stop, kwargs)
        return _result(asked, self._engine(kwargs).run_many([*chain.from_iterable(asked)]))

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        asked = self._requests(prompts, stop, kwargs)
        return _result(asked, await self._engine(kwargs).arun_many([*chain.from_iterable(asked)]))

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        request = self._request(prompt, stop, kwargs)
        return stream_chunks(self._engine(kwargs).stream(request), _chunk, run_manager)

    def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        request = self._request(prompt, stop, kwargs)
        return astream_chunks(self._engine(kwargs).astream(request), _chunk, run_manager)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self._langsmith_params("llm", stop, kwargs)

    def _request(self, prompt: str, stop: list[str] | None, overrides: dict[str, Any]) -> Request:
        self._refuse_streaming_several(overrides)
        [[request]] = self._requests([prompt], stop, overrides)
        return request

    def _requests(self, prompts: list[str], stop: list[str] | None, overrides: dict[str, Any]) -> list[list[Request]]:
        """Return the requests of each prompt."""
        if stop is not None:
            overrides = {**overrides, "stop": stop}
        return [self.requests(FormattedPrompt(as_prompt(prompt)), overrides) for prompt in prompts]


def _result(asked: list[list[Request]], answers: list[Alignment]) -> LLMResult:
    """Return the answers to each prompt, in the order of the requests."""
    found = iter(answers)
    generations = [
        [Generation(text=answer.text, generation_info=_info(answer)) for answer in islice(found, len(requests))]
        for requests in asked
    ]
    return LLMResult(generations=generations, llm_output=llm_output(answers))


def _own(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `generate` that are options of the answers."""
    return {name: value for name, value in arguments.items() if name not in OF_LANGCHAIN}


def _chunk(item: Chunk | Alignment) -> GenerationChunk | None:
    if isinstance(item, Alignment):
        return GenerationChunk(text="", generation_info=_info(item))
    return GenerationChunk(text=item.text) if item.text else None


def _info(answer: Alignment) -> dict[str, Any]:
    return {"finish_reason": answer.finish_reason, "cards": answer.summary(), **logprobs(answer)}
