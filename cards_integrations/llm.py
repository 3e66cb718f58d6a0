"""`CardsLLM`: one object that is a LlamaIndex LLM and a LangChain Runnable."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables import ConfigurableField, Runnable, RunnableConfig
from llama_index.core.prompts import BasePromptTemplate
from pydantic import ConfigDict, PrivateAttr

from cards_integrations.engine.engine import Engine
from cards_integrations.engine.request import Chunk
from cards_integrations.langchain.chat_model import ChatCards
from cards_integrations.langchain.convert import as_prompt
from cards_integrations.langchain.schemas import converted
from cards_integrations.llama_index.llm import LlamaIndexCards
from cards_integrations.rewards import AnyReward, as_reward
from cards_integrations.settings import CardsSettings, as_context
from cards_integrations.trace import Alignment

if TYPE_CHECKING:
    from cards_integrations.study import Calibration


class CardsLLM(LlamaIndexCards, Runnable[LanguageModelInput, AIMessage]):
    """A local model whose answers are aligned while they are written, in both frameworks.

    It is a LlamaIndex LLM (`Settings.llm = llm`, `llm.complete`, `llm.chat`), a LangChain Runnable
    (`prompt | llm | parser`, `llm.invoke`), and has a face of its own: `llm.align(...)` returns the
    whole `Alignment`. Nothing is loaded before the first answer; equal settings share one engine.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    name: str | None = None  # Runnable only annotates it
    streaming: bool = False  # of the LangChain face: `invoke` reports each kept segment, too
    _chat_model: ChatCards | None = PrivateAttr(default=None)

    @classmethod
    def from_settings(cls, settings: CardsSettings | str | Path, *, allow_imports: bool = False) -> Self:
        """From a settings object, or from the path of a YAML file (see `CardsSettings.from_yaml`)."""
        found = settings
        if not isinstance(found, CardsSettings):
            found = CardsSettings.from_yaml(found, allow_imports=allow_imports)
        return cls(**found.options())

    def as_langchain(self) -> ChatCards:
        """The same model as a `BaseChatModel`, for fields that ask for one."""
        chat = self._chat_model
        if chat is None or (chat.options(), chat.streaming) != (self.options(), self.streaming):
            streaming = {"streaming": True} if self.streaming else {}  # False would forbid `stream`
            self._chat_model = chat = ChatCards(**self.options(), **streaming)
        return chat

    # --- its own face ---

    def align(self, prompt: Any, **options: Any) -> Alignment:
        """Write one answer to a string or a list of messages; `options` override the object's own."""
        return self._engine(options).run(self.request(as_prompt(prompt), converted(options)))

    async def aalign(self, prompt: Any, **options: Any) -> Alignment:
        """Like `align`, without blocking the event loop."""
        return await self._engine(options).arun(self.request(as_prompt(prompt), converted(options)))

    def align_stream(self, prompt: Any, **options: Any) -> Iterator[Chunk | Alignment]:
        """Like `align`: a `Chunk` for each kept segment, then the `Alignment`. Closing it stops the drafting."""
        return self._engine(options).stream(self.request(as_prompt(prompt), converted(options)))

    def aalign_stream(self, prompt: Any, **options: Any) -> AsyncIterator[Chunk | Alignment]:
        """Like `align_stream`, without blocking the event loop."""
        return self._engine(options).astream(self.request(as_prompt(prompt), converted(options)))

    def align_batch(
        self,
        prompts: Sequence[Any],
        seeds: Sequence[int] | None = None,
        contexts: Sequence[Any] | None = None,
        progress: bool | str = False,
        **options: Any,
    ) -> list[Alignment]:
        """Write the answers to all prompts in one running batch, each with a seed and a context of its own.

        `progress` shows a bar, with this text.
        """
        each = [dict(options) for _ in prompts]
        for name, own in (("seed", seeds), ("context", contexts)):
            if own is not None:
                each = [{**mine, name: value} for mine, value in zip(each, own, strict=True)]
        requests = [self.request(as_prompt(p), converted(own)) for p, own in zip(prompts, each, strict=True)]
        engine = self._engine(options)
        if not progress:
            return engine.run_many(requests)
        from rich.progress import Progress

        with Progress(transient=True) as bar:
            task = bar.add_task(progress if isinstance(progress, str) else "answers", total=len(requests))
            return engine.run_many(requests, lambda: bar.advance(task))

    def score(
        self, prompt: Any, texts: Sequence[str], reward: AnyReward | str | None = None, context: Any = None
    ) -> list[float]:
        """Rewards of whole answers to a prompt, by this object's reward model or another one."""
        return self._engine({}).score(as_reward(reward or self.reward), as_prompt(prompt), texts, as_context(context))

    def calibrate(self, prompts: Sequence[Any] | None = None, *, remember: bool = True, **how: Any) -> Calibration:
        """Find target, beta and threshold for these models (see `study.calibrate`).

        With `remember`, `Cards()` on "auto" takes them from now on, in this and other processes.
        """
        from cards_integrations.study import calibrate

        found = calibrate(self, prompts, **how)
        if remember:
            found.remember()
        return found

    def close(self) -> None:
        """Free the models, unless another object uses them; the next call loads them again."""
        Engine.release(self)
        if self._chat_model is not None:
            self._chat_model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- LangChain: a Runnable that delegates to the chat model ---

    @property
    def InputType(self) -> Any:
        return self.as_langchain().InputType

    @property
    def OutputType(self) -> Any:
        return self.as_langchain().OutputType

    def invoke(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> AIMessage:
        return self.as_langchain().invoke(input, config, **kwargs)

    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        return await self.as_langchain().ainvoke(input, config, **kwargs)

    def batch(self, inputs: list[LanguageModelInput], config: Any = None, **kwargs: Any) -> list[AIMessage]:
        return self.as_langchain().batch(inputs, config, **kwargs)

    async def abatch(self, inputs: list[LanguageModelInput], config: Any = None, **kwargs: Any) -> list[AIMessage]:
        return await self.as_langchain().abatch(inputs, config, **kwargs)

    def stream_events(self, input: Any, config: Any = None, **kwargs: Any) -> Any:
        return self.as_langchain().stream_events(input, config, **kwargs)

    def astream_events(self, input: Any, config: Any = None, **kwargs: Any) -> Any:
        return self.as_langchain().astream_events(input, config, **kwargs)

    def configurable_fields(self, **fields: Any) -> Any:
        return self.as_langchain().configurable_fields(**fields)

    def configurable_alternatives(self, which: ConfigurableField, **alternatives: Any) -> Any:
        return self.as_langchain().configurable_alternatives(which, **alternatives)

    def bind_tools(
        self, tools: Sequence[Any], *, tool_choice: Any = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, AIMessage]:
        return self.as_langchain().bind_tools(tools, tool_choice=tool_choice, **kwargs)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        return self.as_langchain()._get_ls_params(stop, **kwargs)

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return False

    def with_structured_output(self, schema: Any = None, **kwargs: Any) -> Runnable[LanguageModelInput, Any]:
        return self.as_langchain().with_structured_output(schema, **kwargs)

    def get_token_ids(self, text: str) -> list[int]:
        return self.as_langchain().get_token_ids(text)

    def get_num_tokens(self, text: str) -> int:
        return self.as_langchain().get_num_tokens(text)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        return self.as_langchain().get_num_tokens_from_messages(messages, tools)

    # `stream` and `astream` are the two names that both frameworks use: a LlamaIndex prompt template
    # as first argument is LlamaIndex's call, everything else is LangChain's.

    def stream(self, *args: Any, **kwargs: Any) -> Any:
        if _of_llama_index(*args, **kwargs):
            return super().stream(*args, **kwargs)
        return self.as_langchain().stream(*args, **kwargs)

    def astream(self, *args: Any, **kwargs: Any) -> Any:
        if _of_llama_index(*args, **kwargs):
            return super().astream(*args, **kwargs)
        return self.as_langchain().astream(*args, **kwargs)


def _of_llama_index(prompt: Any = None, *_: Any, **__: Any) -> bool:
    """A call with a template, whose variables may have any name."""
    return isinstance(prompt, BasePromptTemplate)
