"""`CardsLLM`: one object that is a LlamaIndex LLM and a LangChain Runnable."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from langchain_core.caches import BaseCache
from langchain_core.callbacks import Callbacks
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables import ConfigurableField, Runnable, RunnableConfig
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.prompts import BasePromptTemplate
from pydantic import ConfigDict, Field, PrivateAttr, field_validator

from cards_integrations.chat import message
from cards_integrations.chat.message import Message
from cards_integrations.engine.engine import Engine
from cards_integrations.engine.request import Chunk, Request
from cards_integrations.errors import PromptError, SettingsError
from cards_integrations.langchain.chat_model import ChatCards
from cards_integrations.langchain.convert import as_message as from_langchain
from cards_integrations.langchain.rate_limiter import as_rate_limiter
from cards_integrations.llama_index.convert import as_message as from_llama_index
from cards_integrations.llama_index.convert import convert_options, describe_tools
from cards_integrations.llama_index.llm import LlamaIndexCards
from cards_integrations.progress import answering, phase, shown
from cards_integrations.rewards import AnyReward, as_reward
from cards_integrations.settings import CardsSettings, as_context
from cards_integrations.trace import Alignment

if TYPE_CHECKING:
    from cards_integrations.study import Calibration, TrainedValue


class CardsLLM(LlamaIndexCards, Runnable[LanguageModelInput, AIMessage]):
    """A language model whose answers a reward model guides while they are written (CARDS, arXiv:2406.16306).

    One object is a LlamaIndex LLM (`Settings.llm = llm`, `llm.complete`, `llm.chat`) and a LangChain Runnable
    (`prompt | llm | parser`, `llm.invoke`). Its own methods return everything that is known of an answer:

        llm = CardsLLM(model="smollm2", reward="sentiment", max_tokens=64, seed=1)
        llm.align("How was your day?").reward

    The options are keyword arguments; the environment (`CARDS_MODEL`, ...) sets those that are not given, see
    `CardsSettings`. LlamaIndex's fields, such as `system_prompt` and `callback_manager`, can be set, too; a
    `rate_limiter` of either framework holds for both.
    Construction loads nothing; the first answer does. All objects of a process with equal model and engine settings
    share one engine, which runs all their requests in one batch.

    Raises:
        SettingsError: An option is unknown or cannot be used as given.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, populate_by_name=True)

    name: str | None = None  # Runnable only annotates it
    """The name of its runs in LangChain's traces."""

    streaming: bool = False
    """Report each kept segment to the callbacks of `invoke`, too, and not only to those of `stream`."""

    tags: list[str] | None = Field(default=None, exclude=True)
    """Tags of its runs in LangChain's traces."""

    run_metadata: dict[str, Any] | None = Field(default=None, exclude=True, alias="metadata")
    """Metadata of its runs in LangChain's traces; given as `metadata=`, a name that LlamaIndex uses for a property."""

    callbacks: Callbacks = Field(default=None, exclude=True)
    """LangChain's callbacks for its runs; those of LlamaIndex are in `callback_manager`."""

    cache: BaseCache | bool | None = Field(default=None, exclude=True)
    """A LangChain cache for answers of `invoke`; True for the global one, False for none."""

    _chat_model: ChatCards | None = PrivateAttr(default=None)
    _chat_options: tuple[dict[str, Any], dict[str, Any]] | None = PrivateAttr(default=None)

    @field_validator("rate_limiter", check_fields=False)  # which LlamaIndex has not always had
    @classmethod
    def _limits_both_frameworks(cls, value: Any) -> Any:
        return as_rate_limiter(value)

    @classmethod
    def from_settings(cls, settings: CardsSettings | str | Path, *, allow_imports: bool = False) -> Self:
        """Make a model from settings.

        Args:
            settings: A settings object, or the path of a YAML file (see `CardsSettings.from_yaml`).
            allow_imports: Import the reward functions that the file names. This runs their modules' code.

        Raises:
            SettingsError: The file cannot be read, or an option is unknown, cannot be used as given, or would import
                code without permission.
        """
        if not isinstance(settings, CardsSettings):
            settings = CardsSettings.from_yaml(settings, allow_imports=allow_imports)
        return cls(**settings.options())

    def as_langchain(self) -> ChatCards:
        """Return a LangChain `BaseChatModel` with the same options, for code that requires one."""
        own: dict[str, Any] = {
            "tags": self.tags,
            "metadata": self.run_metadata,
            "callbacks": self.callbacks,
            "cache": self.cache,
            "rate_limiter": as_rate_limiter(getattr(self, "rate_limiter", None)),
        }
        if self.streaming:  # False would forbid `stream`
            own["streaming"] = True
        if self._chat_model is None or self._chat_options != (self.options(), own):
            self._chat_model, self._chat_options = ChatCards(**self.options(), **own), (self.options(), own)
        return self._chat_model

    # --- its own methods ---

    def align(self, prompt: Any, **options: Any) -> Alignment:
        """Write one answer and return it with its rewards, segments and costs.

        Args:
            prompt: A text, or a list of messages: of LangChain, of LlamaIndex, dicts with "role" and "content", or
                pairs of role and text. A text becomes one message of the user.
            options: Options of this call, in place of the object's own:

                - all options but `engine`, such as `reward`, `decoding`, `max_tokens`, `seed` and `stop`, as in the
                  constructor; `n` must be 1.
                - `context`: what a `GroundednessReward` compares the answer with: a text, a document of either
                  framework, or a list of these.
                - `response_format`: a pydantic class, a JSON schema, or what OpenAI's API takes. The model is shown
                  the schema, and a grammar holds the answer to it.
                - `grammar`: a `Grammar`, a pydantic class or a JSON schema that the answer must match; the model is
                  not shown it.
                - `tools`: what the answer may call: tools of either framework, functions, pydantic classes, or
                  functions as OpenAI describes them.
                - `tool_choice`: "auto", "none", "any" or the name of a tool.
                - `parallel_tool_calls`: False allows a single call only.

        Raises:
            SettingsError: An option is unknown or cannot be used as given.
            PromptError: The prompt is empty, is not text, or does not fit the model's context.
            ModelError: The model cannot be loaded or used; `OutOfMemory` if the request does not fit.
            RewardError: The reward model failed, or returned no finite score.
            CardsTimeout: The answer took longer than `timeout` seconds.
            EngineClosed: The object was closed while the request ran.
        """
        return self._engine(options).run(self._align_request(prompt, options))

    async def aalign(self, prompt: Any, **options: Any) -> Alignment:
        """Async version of `align`; cancelling the task stops the drafting."""
        return await self._engine(options).arun(self._align_request(prompt, options))

    def align_stream(self, prompt: Any, **options: Any) -> Iterator[Chunk | Alignment]:
        """Write one answer as `align` does, and yield it while it grows.

        Closing the iterator stops the drafting.

        Yields:
            A `Chunk` for each kept segment (`text`, `segment`, `number`, `calls`), and at the end the `Alignment`.
        """
        return self._engine(options).stream(self._align_request(prompt, options))

    def aalign_stream(self, prompt: Any, **options: Any) -> AsyncIterator[Chunk | Alignment]:
        """Async version of `align_stream`."""
        return self._engine(options).astream(self._align_request(prompt, options))

    @overload
    def align_batch(
        self, prompts: Sequence[Any], seeds: Sequence[int] | None = None, contexts: Sequence[Any] | None = None,
        progress: bool | str = True, *, return_exceptions: Literal[False] = False, **options: Any,
    ) -> list[Alignment]: ...  # fmt: skip
    @overload
    def align_batch(
        self, prompts: Sequence[Any], seeds: Sequence[int] | None = None, contexts: Sequence[Any] | None = None,
        progress: bool | str = True, *, return_exceptions: bool, **options: Any,
    ) -> list[Alignment | Exception]: ...  # fmt: skip

    def align_batch(
        self,
        prompts: Sequence[Any],
        seeds: Sequence[int] | None = None,
        contexts: Sequence[Any] | None = None,
        progress: bool | str = True,
        *,
        return_exceptions: bool = False,
        **options: Any,
    ) -> list[Any]:
        """Write the answers to all prompts in one batch; no answer depends on the others.

        Args:
            prompts: As for `align`.
            seeds: One for each prompt.
            contexts: One for each prompt.
            progress: Whether progress is shown, unless the object has `progress=False`; a text is the title of it.
            return_exceptions: Return errors in place of answers; otherwise the first error cancels the rest.
            options: Options of all answers, as for `align`. `timeout` counts from the moment an answer begins.

        Returns:
            The answers in the order of the prompts.
        """
        found: list[Any] = [None] * len(prompts)
        answers = self.align_as_completed(prompts, seeds, contexts, return_exceptions=return_exceptions, **options)
        steps = phase(progress, len(prompts)) if isinstance(progress, str) else answering(len(prompts))
        with shown(bool(progress) and self.progress), steps as advance:
            for index, answer in answers:
                found[index] = answer
                advance()
        return found

    def align_as_completed(
        self,
        prompts: Sequence[Any],
        seeds: Sequence[int] | None = None,
        contexts: Sequence[Any] | None = None,
        *,
        return_exceptions: bool = False,
        **options: Any,
    ) -> Iterator[tuple[int, Any]]:
        """Write the answers to all prompts in one batch, and yield each as soon as it is written.

        Closing the iterator stops the drafting of the rest.

        Args:
            prompts: As for `align_batch`.
            seeds: As for `align_batch`.
            contexts: As for `align_batch`.
            return_exceptions: Yield errors in place of answers; otherwise the first error cancels the rest.
            options: As for `align_batch`.

        Yields:
            The index of a prompt, and its answer; with `return_exceptions`, its answer or its error.
        """
        if isinstance(prompts, str):
            raise PromptError("A batch is a list of prompts: pass [prompt] for a single one, or use align().")
        each = [dict(options) for _ in prompts]
        for name, values in (("seed", seeds), ("context", contexts)):
            if values is not None:
                if len(values) != len(prompts):
                    raise SettingsError(f"{name}s: {len(values)} for {len(prompts)} prompts; pass one for each.")
                each = [{**one, name: value} for one, value in zip(each, values, strict=True)]
        requests: dict[int, Request] = {}
        for index, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
            try:
                requests[index] = self._align_request(prompt, one)
            except PromptError as error:
                if not return_exceptions:
                    raise
                yield index, error
        places = list(requests)
        with closing(self._engine(options).stream_many(list(requests.values()))) as answers:
            for place, answer in answers:
                if isinstance(answer, Exception) and not return_exceptions:
                    raise answer
                yield places[place], answer

    def score(
        self, prompt: Any, texts: Sequence[str], reward: AnyReward | str | None = None, context: Any = None
    ) -> list[float]:
        """Score whole answers to a prompt.

        Args:
            prompt: As for `align`.
            texts: The answers; they may have any origin.
            reward: A reward in place of the object's own.
            context: As for `align`.

        Returns:
            A reward for each text; higher is better.
        """
        return self._engine({}).score(as_reward(reward or self.reward), as_prompt(prompt), texts, as_context(context))

    def calibrate(self, prompts: Sequence[Any] | None = None, *, remember: bool = True, **how: Any) -> Calibration:
        """Find the target reward, beta and threshold for this language model and reward model.

        Args:
            prompts: Prompts to which plain answers are written; by default those of this package.
            remember: Make `Cards()` use the result for what is "auto", in this process and later ones.
            how: Arguments of `study.calibrate`.

        Returns:
            The measurements and the choice; print it, or use its `decoding`.
        """
        from cards_integrations.study import calibrate

        found = calibrate(self, prompts, **how)
        if remember:
            found.remember()
        return found

    def train_value(self, prompts: Sequence[Any], *, path: str | Path, **how: Any) -> TrainedValue:
        """Train a head that predicts the reward from the language model's own hidden states, at no cost per answer.

        Args:
            prompts: Some hundreds of prompts, like those that will be asked; plain answers are written to them.
            path: The file to write.
            how: Arguments of `study.train_value`: `reward`, `target`, `contexts`, `held_out`, `seed` and others.

        Returns:
            The head with its correlations; print it, or use its `reward`.
        """
        from cards_integrations.study import train_value

        return train_value(self, prompts, path, **how)

    def close(self) -> None:
        """Free the models, unless another object uses them; the next call loads them again."""
        Engine.release(self)
        if self._chat_model is not None:
            self._chat_model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _align_request(self, prompt: Any, options: dict[str, Any]) -> Request:
        return self.request(as_prompt(prompt), convert_options(options))

    # --- LangChain: a Runnable that delegates to the chat model ---

    @property
    def InputType(self) -> Any:
        """The type of input of LangChain's chat models."""
        return self.as_langchain().InputType

    @property
    def OutputType(self) -> Any:
        """The type of output of LangChain's chat models."""
        return self.as_langchain().OutputType

    def invoke(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> AIMessage:
        """Answer a string, a prompt value or messages of LangChain; `kwargs` are options of the call, as in `align`."""
        return self.as_langchain().invoke(input, config, **kwargs)

    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        """Async version of `invoke`."""
        return await self.as_langchain().ainvoke(input, config, **kwargs)

    def batch(self, inputs: list[LanguageModelInput], config: Any = None, **kwargs: Any) -> list[AIMessage]:
        """Answer all inputs; `max_concurrency` at once, or by default as many as the engine runs."""
        return self.as_langchain().batch(inputs, config, **kwargs)

    async def abatch(self, inputs: list[LanguageModelInput], config: Any = None, **kwargs: Any) -> list[AIMessage]:
        """Async version of `batch`."""
        return await self.as_langchain().abatch(inputs, config, **kwargs)

    def stream_events(self, input: Any, config: Any = None, **kwargs: Any) -> Any:
        """Stream LangChain's events of one answer; see `ChatCards`."""
        return self.as_langchain().stream_events(input, config, **kwargs)

    def astream_events(self, input: Any, config: Any = None, **kwargs: Any) -> Any:
        """Async version of `stream_events`; each kept segment is a custom event `cards_segment`."""
        return self.as_langchain().astream_events(input, config, **kwargs)

    def configurable_fields(self, **fields: Any) -> Any:
        """Return a chat model whose options can be set in a LangChain config."""
        return self.as_langchain().configurable_fields(**fields)

    def configurable_alternatives(self, which: ConfigurableField, **alternatives: Any) -> Any:
        """Return a Runnable that a LangChain config can replace by an alternative."""
        return self.as_langchain().configurable_alternatives(which, **alternatives)

    def bind_tools(
        self, tools: Sequence[Any], *, tool_choice: Any = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Return a chat model with tools that its answers may call; see `ChatCards.bind_tools`.

        Args:
            tools: As for `ChatCards.bind_tools`, and LlamaIndex's tools.
            tool_choice: As for `ChatCards.bind_tools`.
            kwargs: `strict`, `parallel_tool_calls` and options of the calls.
        """
        return self.as_langchain().bind_tools(describe_tools(tools), tool_choice=tool_choice, **kwargs)

    @property
    def profile(self) -> ModelProfile | None:
        """What LangChain's agents and middleware look up: the window in tokens, and what the model can do."""
        return self.as_langchain().profile

    @property
    def _llm_type(self) -> str:
        return self.as_langchain()._llm_type

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        return self.as_langchain()._get_ls_params(stop, **kwargs)

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """False: a local model is not in LangChain's serialization registry."""
        return False

    def with_structured_output(self, schema: Any = None, **kwargs: Any) -> Runnable[LanguageModelInput, Any]:
        """Return a chain that answers with objects of a schema; see `ChatCards.with_structured_output`."""
        return self.as_langchain().with_structured_output(schema, **kwargs)

    def get_token_ids(self, text: str) -> list[int]:
        """Encode a text with the model's tokenizer; loads the model."""
        return self.as_langchain().get_token_ids(text)

    def get_num_tokens(self, text: str) -> int:
        """Count the tokens of a text, without a chat template."""
        return self.as_langchain().get_num_tokens(text)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Count the tokens of the prompt that these messages become, chat template included."""
        return self.as_langchain().get_num_tokens_from_messages(messages, describe_tools(tools))

    # Both frameworks have methods named `stream` and `astream`. A call whose first argument is a LlamaIndex prompt
    # template is LlamaIndex's; every other call is LangChain's.

    def stream(self, *args: Any, **kwargs: Any) -> Any:
        """Stream LangChain's message chunks, one for each kept segment; with a prompt template, LlamaIndex's texts."""
        if _is_llama_index_call(*args, **kwargs):
            return super().stream(*args, **kwargs)
        return self.as_langchain().stream(*args, **kwargs)

    def astream(self, *args: Any, **kwargs: Any) -> Any:
        """Async version of `stream`."""
        if _is_llama_index_call(*args, **kwargs):
            return super().astream(*args, **kwargs)
        return self.as_langchain().astream(*args, **kwargs)


def _is_llama_index_call(prompt: Any = None, *_: Any, **__: Any) -> bool:
    """True if the first argument is a LlamaIndex template; the others are its variables, of any name."""
    return isinstance(prompt, BasePromptTemplate)


def as_prompt(prompt: Any) -> str | list[Message]:
    """Return a string as it is, and a sequence of messages (of either framework, dicts or pairs) as a chat."""
    return message.as_prompt(prompt, _as_message)


def _as_message(item: Any) -> Message:
    return from_llama_index(item) if isinstance(item, ChatMessage) else from_langchain(item)
