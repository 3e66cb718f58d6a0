"""Everything a user can set: as keyword arguments, in the environment (CARDS_*), or in a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

import pydantic_settings
import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticSerializationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from cards_integrations.chat.grammar import as_grammar
from cards_integrations.chat.message import Message
from cards_integrations.chat.response_format import as_response_format
from cards_integrations.chat.tools import as_tools
from cards_integrations.decoding import AnyDecoding, Cards, Decoding
from cards_integrations.engine.engine import Engine
from cards_integrations.engine.request import EngineSettings, Request
from cards_integrations.errors import SettingsError, short_repr, unknown_name
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.models.sampling import Sampler
from cards_integrations.models.sources import AnyModel
from cards_integrations.rewards import NAMED, AnyReward
from cards_integrations.rewards.function import imports_allowed

PER_CALL = {"context", "grammar", "response_format", "tools", "tool_choice", "parallel_tool_calls"}


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value or ()


def as_context(context: Any) -> tuple[str, ...]:
    """What an answer should be grounded in: texts, or documents of either framework."""
    if context is None:
        return ()
    several = context if isinstance(context, (list, tuple)) else [context]
    return tuple(_text(one) for one in several)


def _text(one: Any) -> str:
    if isinstance(one, str):
        return one
    found = getattr(one, "page_content", None)  # LangChain's Document
    if found is None and callable(getattr(one, "get_content", None)):
        found = one.get_content()  # LlamaIndex's nodes
    if not isinstance(found, str):
        raise SettingsError(f"context={short_repr(one)}: pass a text, a document, or a list of them.")
    return found


def _told(error: ErrorDetails) -> str:
    """One of the errors of a validation: our own words, or the setting and pydantic's."""
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, SettingsError):
        return str(cause)
    given = error["input"]
    said = f"={short_repr(given)}" if isinstance(given, (str, int, float)) else ""  # a mapping may hold a key
    return f"{'.'.join(map(str, error['loc']))}{said}: {error['msg']}"


def in_words(error: ValidationError) -> str:
    """All that is wrong, in one line."""
    return "; ".join(map(_told, error.errors()))


class Options(BaseModel, hide_input_in_errors=True):  # the input may hold a key
    """What `CardsLLM`, `ChatCards` and a settings file have in common.

    `temperature=0` is greedy: every candidate of a segment would be the same one, so CARDS keeps
    the first without rejection, and the answer is the model's greedy one, with its rewards.
    `seed=None` draws a new seed for each answer and reports it. `timeout` is in seconds.
    """

    model: Annotated[AnyModel, NoDecode] = LocalModel()
    reward: Annotated[AnyReward | None, NoDecode] = NAMED["sentiment"]
    decoding: Annotated[AnyDecoding, NoDecode] = Cards()
    max_tokens: Annotated[int, Field(ge=1)] = 128
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.7
    top_k: Annotated[int, Field(ge=0)] = 40
    seed: int | None = None
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_one_or_many)] = ()
    timeout: Annotated[float, Field(gt=0)] | None = None
    engine: EngineSettings = EngineSettings()

    def options(self) -> dict[str, Any]:
        """The options alone, as objects."""
        return {name: getattr(self, name) for name in Options.model_fields}

    def request(self, prompt: str | list[Message], overrides: dict[str, Any]) -> Request:
        """One request; `overrides` are the call's own arguments: those of `PER_CALL`, or options."""
        for name in overrides:
            if name not in Options.model_fields.keys() - {"engine"} | PER_CALL:
                raise unknown_name("call argument", name, Options.model_fields.keys() - {"engine"} | PER_CALL)
        own = {name: overrides.get(name) for name in PER_CALL}
        chosen = self.chosen({name: value for name, value in overrides.items() if name not in PER_CALL})
        tools = as_tools(own["tools"], own["tool_choice"], own["parallel_tool_calls"] is not False)
        grammar, wanted = as_grammar(own["grammar"]), as_response_format(own["response_format"])
        if grammar is not None and (wanted or tools):
            raise SettingsError("grammar= says all of what an answer may be: leave response_format= and tools= out.")
        if wanted is not None:
            prompt, grammar = wanted.told(prompt), wanted.grammar
        decoding: Decoding = chosen.decoding
        if decoding.needs_reward and chosen.reward is None:
            raise SettingsError(f"decoding={decoding.method!r} needs a reward: pass reward=.")
        return Request(
            prompt=prompt,
            decoding=decoding,
            reward=chosen.reward,
            sampler=Sampler(temperature=chosen.temperature, top_k=chosen.top_k),
            max_tokens=chosen.max_tokens,
            stop=tuple(chosen.stop),
            seed=chosen.seed,
            timeout=chosen.timeout,
            context=as_context(own["context"]),
            grammar=grammar,
            tools=tools,
        )

    def engine_for(self, overrides: dict[str, Any], owner: Any) -> Engine:
        """The process's engine for the model, shared by all objects with equal settings."""
        chosen = self.chosen({name: value for name, value in overrides.items() if name == "model"})
        return Engine.shared(chosen.model, chosen.engine, owner)

    def chosen(self, overrides: dict[str, Any]) -> Options:
        """The options of one call, validated: attributes may have been assigned since."""
        try:
            return Options.model_validate({**self.options(), **overrides})
        except ValidationError as error:
            raise SettingsError(in_words(error)) from error

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        for name in values.keys() - cls.model_fields.keys() if isinstance(values, dict) else ():
            raise unknown_name("setting", str(name), Options.model_fields)
        return values


def _read(source: PydanticBaseSettingsSource) -> dict[str, Any]:
    try:
        return source()
    except RecursionError:
        raise SettingsError("A variable CARDS_... is nested too deeply.") from None
    except pydantic_settings.SettingsError as error:
        raise SettingsError(f"The environment's CARDS_... variables cannot be read: {error}.") from None


class CardsSettings(BaseSettings, Options):
    """The options as a settings object: `CardsSettings()` reads CARDS_MODEL, CARDS_MAX_TOKENS, ...

    An environment variable holds a name or a number as it is, and a settings object as JSON:
    `CARDS_DECODING='{"method": "cards", "target_reward": 1.0}'`.
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
        """Whole options: a reward that is given replaces the environment's, and is not merged with it."""
        found: dict[str, Any] = {}
        for source in (file_secret_settings, dotenv_settings, env_settings, init_settings):
            found |= _read(source)
        return (InitSettingsSource(settings_cls, found),)

    @classmethod
    def from_yaml(cls, path: str | Path, *, allow_imports: bool = False) -> Self:
        """Read a YAML file of options; what it does not set comes from the environment.

        A reward function that it names is imported only with `allow_imports=True`.
        """
        try:
            found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.MarkedYAMLError as error:  # its own words quote the line, which may hold a key
            mark = error.problem_mark
            where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
            raise SettingsError(f"The settings file {str(path)!r} cannot be read: {error.problem}{where}.") from None
        except Exception as error:  # PyYAML has errors of many types for one bad scalar
            told = error.strerror if isinstance(error, OSError) else type(error).__name__
            raise SettingsError(f"The settings file {str(path)!r} cannot be read: {told}.") from None
        if not isinstance(found, dict):
            raise SettingsError(f"The settings file {str(path)!r} must be a mapping of options.")
        with imports_allowed(allow_imports):
            return cls(**{str(name): value for name, value in found.items()})

    def to_yaml(self) -> str:
        """The options as YAML that `from_yaml` reads."""
        try:
            return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        except PydanticSerializationError as error:
            raise SettingsError(f"These settings have no YAML, for a reward function, say, is code: {error}") from error


class FromEnvironment(Options):
    """Options whose defaults come from the environment, for the objects that users construct."""

    @model_validator(mode="before")
    @classmethod
    def _environment(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        found = _read(EnvSettingsSource(CardsSettings))
        return {**{name: value for name, value in found.items() if name in Options.model_fields}, **values}
