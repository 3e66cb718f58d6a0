"""From the settings of a language model to its backend: the one place that knows all backends."""

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
    """Decorate a backend of another package so that settings can refer to it by its `kind`.

    An installed package can name the class as an entry point of the group `cards_integrations.models` instead.
    """
    MODELS.register(cls)
    return cls


def as_model(value: Any) -> Any:
    """Make the settings of a model from a name, a path, JSON or a dict (local if it names no kind), or return them."""
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
    """Return what the settings call the model: a name, a hub id or a path."""
    return str(getattr(source, "model", source.kind))


def build_model(source: ModelSource, loader: ModelLoader, wake: Callable[[], None]) -> LanguageModel:
    """Load a language model, or connect to its server; called once per engine, in a thread of its own.

    Args:
        source: The settings.
        loader: Loads the weights and the tokenizers of the engine.
        wake: Called from the engine's thread when `LanguageModel.sample` has something new to return.

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
    """Return the most tokens of prompt and answer together, from a config or from the server; loads no weights."""
    match source:
        case LocalModel():
            return max_positions(read_config(source))
        case VllmModel():
            return _served_context_window(source)
        case _:
            return source.context_window()


def known_context_window(source: ModelSource) -> int | None:
    """Return the same from files on this machine only; None if no config here says it."""
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
    """Return the source of the chat template from files on this machine only; "" if none has it."""
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
