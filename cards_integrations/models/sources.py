"""Where the language model is: the one place that goes from settings to a backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, SerializeAsAny

from cards_integrations.errors import CardsError, SettingsError, short_repr
from cards_integrations.models.base import CustomModel, LanguageModel
from cards_integrations.models.local.checks import embedding_rows
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.resolve import chat_template_here, max_positions, read_config, with_config_here
from cards_integrations.models.local.settings import LocalModel, as_local_model
from cards_integrations.models.vllm.settings import VllmModel
from cards_integrations.registry import Registry, from_json

ModelSource = LocalModel | VllmModel | CustomModel
C = TypeVar("C", bound=type[CustomModel])
MODELS: Registry[BaseModel] = Registry(
    base=CustomModel, setting="model", discriminator="kind", group="cards_integrations.models"
)
MODELS.register(LocalModel)
MODELS.register(VllmModel)


def register_model(cls: C) -> C:
    """Make a backend of another package known by its `kind`, for settings files. A decorator.

    An installed package can name the class as an entry point of the group `cards_integrations.models` instead.
    """
    MODELS.register(cls)
    return cls


def as_model(value: Any) -> Any:
    """A model from a name, a path, JSON, its settings as a dict (local, if they name no kind), or itself."""
    value = from_json("model", value)
    if isinstance(value, (str, Path)):
        return as_local_model(value)
    if isinstance(value, dict):
        kind = value.get("kind", "local")
        return MODELS[kind if isinstance(kind, str) else short_repr(kind)].model_validate(value)
    if isinstance(value, type):
        raise SettingsError(f"model={value.__name__} is a class: pass an object of it, {value.__name__}(...).")
    if not isinstance(value, (LocalModel, VllmModel, CustomModel)):
        raise SettingsError(f"model={short_repr(value)}: pass a name, a hub id, a directory or a settings object.")
    return value


AnyModel = Annotated[LocalModel | VllmModel | SerializeAsAny[CustomModel], BeforeValidator(as_model)]


def source_name(source: ModelSource) -> str:
    """What the settings call the model: a name, a hub id or a path."""
    return str(getattr(source, "model", source.kind))


def build_model(source: ModelSource, loader: ModelLoader, wake: Callable[[], None]) -> LanguageModel:
    """Load a language model, or meet its server; called once per engine, in a thread of its own.

    Args:
        source: The settings.
        loader: Loads the weights and the tokenizers of the engine.
        wake: Called, from the engine's thread, when `LanguageModel.sample` has something new although nothing was
            begun since.

    Raises:
        ModelError: It cannot be loaded, or its server does not answer as it should.
    """
    from cards_integrations.chat.template import ChatTokenizer
    from cards_integrations.models.local.language_model import LocalLanguageModel
    from cards_integrations.models.vllm.language_model import VllmLanguageModel

    match source:
        case LocalModel():
            model, tokenizer = loader.causal(source)
            chat = ChatTokenizer(tokenizer, source.tool_format, embedding_rows(model))
            return LocalLanguageModel(model, chat, source.model, loader.memory, loader.thread_tuner())
        case VllmModel():
            chat = ChatTokenizer(loader.tokenizer(_tokenizer_of(source)), source.tool_format)
            return VllmLanguageModel(source, chat, wake)
        case _:
            return source.build(wake)


def context_window(source: ModelSource) -> int:
    """Most tokens of prompt and answer together, from a config alone or from the server; no weights are loaded."""
    match source:
        case LocalModel():
            return max_positions(read_config(source))
        case VllmModel():
            return _served_context_window(source)
        case _:
            return source.context_window()


def known_context_window(source: ModelSource) -> int | None:
    """The same without asking anybody: None if no config on this machine says it."""
    try:
        match source:
            case LocalModel():
                here = with_config_here(source)
                return None if here is None else max_positions(read_config(here))
            case VllmModel():
                return None
            case _:
                return source.context_window()
    except CardsError:
        return None


def known_chat_template(source: ModelSource) -> str:
    """The source of its chat template without asking anybody; "" if no file on this machine has it."""
    try:
        here = with_config_here(source) if isinstance(source, LocalModel) else None
        return "" if here is None else chat_template_here(here)
    except CardsError:
        return ""


@lru_cache
def _served_context_window(source: VllmModel) -> int:
    from cards_integrations.models.vllm.replies import ServerHandshake

    return ServerHandshake(source).context_window()


def _tokenizer_of(source: VllmModel) -> LocalModel:
    return LocalModel(
        model=source.tokenizer or source.model, revision=source.revision, trust_remote_code=source.trust_remote_code
    )
