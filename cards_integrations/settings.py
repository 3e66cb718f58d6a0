"""Everything that a user can set: as keyword arguments, in the environment (CARDS_*), or in a YAML file."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import pydantic_settings
import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    model_validator,
)
from pydantic_core import PydanticSerializationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from cards_integrations.chat.grammar import Grammar, as_grammar
from cards_integrations.chat.message import Message
from cards_integrations.chat.response_format import as_response_format
from cards_integrations.chat.template import FormattedPrompt
from cards_integrations.chat.thinking import ThinkingMode
from cards_integrations.chat.tools import Tools, as_tools
from cards_integrations.decoding import AnyDecoding, Cards, Cascade, Decoding
from cards_integrations.engine.request import EngineSettings, Request
from cards_integrations.errors import SettingsError, nearest, short_repr, unknown_name
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.models.randomness import answer_seeds
from cards_integrations.models.sampling import LogitBias, Sampler, TokenIds
from cards_integrations.models.sources import AnyModel
from cards_integrations.paths import names_beside
from cards_integrations.rewards import NAMED, AnyReward
from cards_integrations.rewards.function import imports_allowed
from cards_integrations.rewards.registry import known_as
from cards_integrations.settings_model import SettingsModel

if TYPE_CHECKING:
    from cards_integrations.engine.engine import Engine
    from cards_integrations.engine.inspection import EngineState

log = logging.getLogger("cards_integrations")
CALL_ARGUMENTS = {"context", "grammar", "response_format", "tools", "tool_choice", "parallel_tool_calls"}
"""Arguments of a single call that are not options."""
SET_HERE = {
    *("conversation", "messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize"),
    *("chat_template", "return_tensors", "return_dict", "padding", "truncation", "max_length", "tokenizer_kwargs"),
}
"""Arguments of `apply_chat_template` that this package sets, and users cannot."""
OTHERS = ("ALLOW_IMPORTS", "CACHE_DIR", "PROGRESS", "REWARD_API_KEY", "SERVER_API_KEY", "TELEMETRY", "VLLM_API_KEY")
"""Environment variables that are not options, without their "CARDS_"."""


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value or ()


def _template_arguments(value: dict[str, Any]) -> dict[str, Any]:
    for name in value:
        if name in SET_HERE:
            raise SettingsError(f"chat_template_kwargs: {name!r} is set by this package.")
    return value


def as_context(context: Any) -> tuple[str, ...]:
    """Return the texts of a context, given as texts or documents of either framework."""
    if context is None:
        return ()
    return tuple(map(_document_text, context if isinstance(context, (list, tuple)) else [context]))


def _document_text(document: Any) -> str:
    if isinstance(document, str):
        return document
    text = getattr(document, "page_content", None)  # LangChain's Document
    if text is None and callable(getattr(document, "get_content", None)):
        text = document.get_content()  # LlamaIndex's nodes
    if not isinstance(text, str):
        raise SettingsError(f"context={short_repr(document)}: pass a text, a document, or a list of them.")
    return text


class Options(SettingsModel):
    """The options that `CardsLLM`, `ChatCards`, `CardsCompletion` and `CardsSettings` have in common."""

    # errors must not show the input, which may contain a key
    model_config = ConfigDict(use_attribute_docstrings=True, hide_input_in_errors=True)

    elsewhere = {  # noqa: RUF012
        **{
            name: f"decoding={method.__name__}({name}=...)"
            for method in (Cascade, Cards)
            for name in method.model_fields.keys() - {"method"}
        },
        **{name: f"engine=EngineSettings({name}=...)" for name in EngineSettings.model_fields},
    }

    model: Annotated[AnyModel, NoDecode] = LocalModel()
    """The language model: an embedded name, a hub id, a directory, `LocalModel(...)` or `VllmModel(...)`."""

    reward: Annotated[AnyReward | None, NoDecode] = NAMED["sentiment"]
    """The reward that guides the answers: an embedded name, a hub id, a directory, a function
    `f(prompt, answers) -> scores`, or settings such as `ClassifierReward(...)`. None for methods without a reward."""

    decoding: Annotated[AnyDecoding, NoDecode] = Cascade()
    """The decoding method: its name ("cascade", "cards", "sampling", ...) or its settings, such as `Cards(...)`."""

    max_tokens: Annotated[int, Field(ge=1)] = 128
    """Most tokens of an answer."""

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.7
    """Temperature of sampling. 0 is greedy: all candidates of a segment are then equal, so that CARDS keeps the first;
    the answer is the model's greedy one, with its rewards."""

    top_k: Annotated[int, Field(ge=0)] = 40
    """Sample among this many most likely tokens; 0 samples among all."""

    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Sample among the most likely tokens that together have this probability, after temperature and `top_k`; 1 turns
    this off."""

    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Sample among the tokens that have at least this share of the highest probability; 0 turns this off."""

    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Divides the positive logits of all tokens that occur in the prompt or the answer, and multiplies the negative
    ones; 1 turns this off."""

    presence_penalty: FiniteFloat = 0.0
    """Is subtracted from the logits of all tokens that occur in the answer."""

    frequency_penalty: FiniteFloat = 0.0
    """Is subtracted from the logit of a token once for each time it occurs in the answer."""

    logit_bias: LogitBias = ()
    """A mapping of token ids to numbers that are added to their logits; -100 practically forbids a token."""

    min_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens before which neither end-of-sequence nor `stop_token_ids` can end an answer, unless a grammar allows
    nothing else. Stop strings still do."""

    seed: int | None = None
    """Seed of the random numbers: one seed gives one answer. None draws a new seed for each answer and reports it."""

    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_tuple)] = ()
    """Strings that end an answer and are not part of it: one string or several. They have no effect within a grammar,
    the JSON of a schema or a tool call."""

    thinking: ThinkingMode | None = None
    """Whether the model thinks before it answers. "off" uses the switch of its chat template, or closes the thoughts
    before they begin. "free" samples the thoughts plainly: the reward sees and guides the answer only. "aligned" guides
    the thoughts as well, by the same reward, which reads them as an answer. None leaves the choice to the template; the
    thoughts are then "free". Raw text is continued as it is, whether that leads to thoughts or not."""

    max_thinking_tokens: Annotated[int, Field(ge=1)] = 1024
    """Most tokens of the thoughts, in addition to `max_tokens` for the answer. Longer thoughts are closed as the
    template closes them. The limit is lower where the model's context has no room for as many."""

    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_template_arguments)] = {}  # noqa: RUF012
    """Further arguments of the model's chat template, such as `{"enable_thinking": False}` or
    `{"reasoning_effort": "low"}`; they win over `thinking`."""

    stop_token_ids: TokenIds = ()
    """Token ids that end an answer like end-of-sequence, and are not part of it; they have no effect in a grammar."""

    finish_at: Literal["token", "sentence"] = "token"
    """Where an answer that reaches `max_tokens` ends: "sentence" leaves out what follows its last whole sentence, and
    scores what is left. Answers with a grammar or with tools are never cut in this way."""

    n: Annotated[int, Field(ge=1)] = 1
    """How many answers are written to a prompt: LangChain's `generate` returns all, `invoke` the first. Elsewhere use
    `align_batch([prompt] * n)`."""

    logprobs: bool = False
    """Report log p of each token of an answer under the language model: full vocabulary, temperature 1."""

    top_logprobs: Annotated[int, Field(ge=0)] = 0
    """How many of the most likely tokens are reported for each token of an answer; implies `logprobs`."""

    timeout: Annotated[float, Field(gt=0)] | None = None
    """Time limit of an answer in seconds, after which a `CardsTimeout` is raised. None sets no limit."""

    progress: bool = True
    """Whether progress is shown on stderr of whatever takes long: loading, converting, measuring, and answers that are
    not streamed. If stderr is neither a terminal nor a notebook, it gets one line for each phase except answers."""

    engine: EngineSettings = EngineSettings()
    """Settings of the machine: device, data type, memory, rows. A single call cannot change them."""

    def options(self) -> dict[str, Any]:
        """Return the values of all options, by name."""
        return {name: getattr(self, name) for name in Options.model_fields}

    def request(self, prompt: str | list[Message], overrides: dict[str, Any]) -> Request:
        """Make the engine's request for one answer.

        Args:
            prompt: A text or messages; a `FormattedPrompt` is a text that is model input already.
            overrides: Arguments of the call: options other than `engine`, and `CALL_ARGUMENTS`.

        Raises:
            SettingsError: An argument is unknown or cannot be used as given.
        """
        found = self.requests(prompt, overrides)
        if len(found) > 1:
            raise SettingsError(
                f"n={len(found)}: this call has one answer. Use LangChain's generate(), or align_batch([prompt] * n)."
            )
        return found[0]

    def requests(self, prompt: str | list[Message], overrides: dict[str, Any]) -> list[Request]:
        """Make the engine's requests for the `n` answers to one prompt, each with a seed of its own.

        Raises:
            SettingsError: As `request` does.
        """
        allowed = Options.model_fields.keys() - {"engine"} | CALL_ARGUMENTS
        for name in overrides:
            if name not in allowed:
                raise unknown_name("call argument", name, allowed)
        options = self.resolve_options({n: value for n, value in overrides.items() if n not in CALL_ARGUMENTS})
        call = {name: overrides.get(name) for name in CALL_ARGUMENTS}
        tools = as_tools(call["tools"], call["tool_choice"], call["parallel_tool_calls"] is not False)
        prompt, grammar = _constrained(prompt, call["grammar"], call["response_format"], tools)
        decoding: Decoding = options.decoding
        if decoding.needs_reward and options.reward is None:
            raise SettingsError(f"decoding={decoding.method!r} needs a reward: pass reward=.")
        if options.thinking == "aligned" and not decoding.needs_reward:
            raise SettingsError(
                f"thinking='aligned': decoding={decoding.method!r} is not guided by a reward. Use thinking='free', or "
                "another method."
            )
        request = Request(
            prompt=prompt,
            decoding=decoding,
            reward=options.reward,
            sampler=Sampler(**{name: getattr(options, name) for name in Sampler.model_fields}),
            max_tokens=options.max_tokens,
            stop=options.stop,
            seed=options.seed,
            timeout=options.timeout,
            thinking=options.thinking,
            max_thinking_tokens=options.max_thinking_tokens,
            chat_template_kwargs=options.chat_template_kwargs,
            context=as_context(call["context"]),
            grammar=grammar,
            tools=tools,
            finish_at=options.finish_at,
            logprobs=options.top_logprobs if options.logprobs or options.top_logprobs else None,
        )
        if options.seed is None:
            return [request] * options.n  # each draws its own
        return [replace(request, seed=seed) for seed in answer_seeds(options.seed, options.n)]

    def engine_for(self, overrides: dict[str, Any], owner: Any) -> Engine:
        """Return the engine for the model, which all objects of the process with equal settings share."""
        from cards_integrations.engine.engine import Engine  # needs torch, which settings do not

        chosen = {name: value for name, value in overrides.items() if name in ("model", "progress")}
        options = self.resolve_options(chosen)
        return Engine.shared(options.model, options.engine, owner, progress=options.progress)

    def resolve_options(self, overrides: dict[str, Any]) -> Options:
        """Return the validated options of one call, with the object's attributes as they are now."""
        return Options.model_validate({**self.options(), **overrides})

    @model_validator(mode="after")
    def _refuse_impossible(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise SettingsError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}.")
        return self

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        aliases = {field.alias for field in cls.model_fields.values()}
        for name in values.keys() - cls.model_fields.keys() - aliases if isinstance(values, dict) else ():
            raise unknown_name("setting", str(name), Options.model_fields, elsewhere=cls.elsewhere)
        return values


def _constrained(
    prompt: str | list[Message], grammar: Any, response_format: Any, tools: Tools | None
) -> tuple[str | list[Message], Grammar | None]:
    """Return the prompt, with the schema of the response format if there is one, and the grammar of the answer."""
    constraint, json_format = as_grammar(grammar), as_response_format(response_format)
    if constraint is not None and (json_format or tools):
        raise SettingsError("grammar= describes the whole answer: omit response_format= and tools=.")
    if tools and isinstance(prompt, FormattedPrompt):
        raise SettingsError(
            "tools= would not be told to the model: the prompt is its input already, as messages_to_prompt, "
            "completion_to_prompt or a raw completion has it. Pass messages without those, or omit tools=."
        )
    if json_format is not None:
        return json_format.instruct(prompt), json_format.grammar
    return prompt, constraint


@lru_cache  # once for each name
def _tell_misspelt(name: str) -> None:
    """Warn of an environment variable whose name is almost that of an option."""
    known = {option.upper(): f"CARDS_{option.upper()}" for option in (*Options.model_fields, *OTHERS)}
    own = name.removeprefix("CARDS_")
    if own not in known and (near := nearest(own, (), known)):
        log.warning("The environment variable %s is not known and does nothing.%s", name, near)


def _read(source: PydanticBaseSettingsSource) -> dict[str, Any]:
    for name in os.environ:
        if name.startswith("CARDS_"):
            _tell_misspelt(name.partition("__")[0])
    try:
        return source()
    except RecursionError:
        raise SettingsError("A CARDS_... environment variable is nested too deeply.") from None
    except pydantic_settings.SettingsError as error:
        raise SettingsError(f"The CARDS_... environment variables cannot be read: {error}.") from None


class CardsSettings(BaseSettings, Options):
    """The options as a settings object that can be read from YAML and written to it.

    `CardsSettings()` takes the options that are not given from the environment: CARDS_MODEL, CARDS_MAX_TOKENS, ... A
    variable holds a name or a number as it is, and settings as JSON, such as
    `CARDS_DECODING='{"method": "cards", "beta": 0.5}'`; `CARDS_ENGINE__MAX_ROWS=8` sets one field.
    `CardsLLM.from_settings` makes a model from it.
    """

    model_config = SettingsConfigDict(env_prefix="CARDS_", env_nested_delimiter="__", extra="forbid", frozen=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Merge the sources option by option: a given reward replaces that of the environment as a whole."""
        found: dict[str, Any] = {}
        for source in (file_secret_settings, dotenv_settings, env_settings, init_settings):
            found |= _read(source)
        return (InitSettingsSource(settings_cls, found),)

    @classmethod
    def from_yaml(cls, path: str | Path, *, allow_imports: bool = False) -> Self:
        """Read the options from a YAML file; those that it does not set come from the environment.

        Args:
            path: A file with a mapping of option names to values.
            allow_imports: Import the reward functions that the file names. This runs their modules' code.

        Raises:
            SettingsError: The file cannot be read, or an option is unknown, cannot be used as given, or would import
                code without permission.
        """
        try:
            found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.MarkedYAMLError as error:  # its message quotes the line, which may hold a key
            mark = error.problem_mark
            where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
            raise SettingsError(f"The settings file {str(path)!r} cannot be read: {error.problem}{where}.") from None
        except Exception as error:  # PyYAML raises errors of many types for a bad scalar
            reason = error.strerror if isinstance(error, OSError) else type(error).__name__
            near = nearest(Path(path).name, names_beside(Path(path))) if isinstance(error, FileNotFoundError) else ""
            raise SettingsError(f"The settings file {str(path)!r} cannot be read: {reason}.{near}") from None
        if not isinstance(found, dict):
            raise SettingsError(f"The settings file {str(path)!r} must be a mapping of options.")
        with imports_allowed(allow_imports):
            return cls(**{str(name): value for name, value in found.items()})

    def to_yaml(self) -> str:
        """Write the options as YAML that `from_yaml` reads.

        Raises:
            SettingsError: An option has no YAML form, such as a reward function that has no importable name.
        """
        try:
            return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        except PydanticSerializationError as error:
            raise SettingsError(
                f"These settings cannot be written as YAML (a reward that is a lambda cannot, for example): {error}"
            ) from error


class OptionsFromEnvironment(Options):
    """Options that come from the environment unless they are given, for the objects that users construct."""

    @model_validator(mode="before")
    @classmethod
    def _with_environment(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        found = _read(EnvSettingsSource(CardsSettings))
        return {**{name: value for name, value in found.items() if name in Options.model_fields}, **values}

    def __repr__(self) -> str:
        """Show model, reward, method and all options that differ from their defaults, in short and without keys."""
        shown = {
            "model": getattr(self.model, "model", None),
            "reward": None if self.reward is None else known_as(self.reward),
            "decoding": getattr(self.decoding, "method", None),
        }
        for name, field in Options.model_fields.items():
            value = getattr(self, name)
            if isinstance(value, (int, float, str, tuple)) and name not in shown and value != field.default:
                shown[name] = value
        return f"{type(self).__name__}({', '.join(f'{name}={short_repr(value)}' for name, value in shown.items())})"

    __str__ = __repr__

    def inspect(self) -> EngineState:
        """Look at what lives in this object's engine now: requests, rows, memory, loaded rewards. Loads nothing."""
        return self.engine_for({}, self).inspect()
