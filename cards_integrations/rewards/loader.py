"""The reward models of one engine: what is built, and how long it stays."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

from cards_integrations.chat.template import ChatTokenizer, same_vocabulary
from cards_integrations.errors import CardsError, ModelError, RewardError
from cards_integrations.models.local.checks import embedding_rows
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.rewards.base import CausalModel, Loader, Reward, RewardModel
from cards_integrations.rewards.scorers.sentences import WholeSentences


class RewardLoader(Loader):
    """Builds the reward models of one engine, each once, whichever composites it is part of.

    A model whose settings say `stays_loaded` is held as long as the loader, any other one as long as
    somebody else holds it.
    """

    def __init__(self, models: ModelLoader) -> None:
        self.models = models
        self.built: WeakValueDictionary[Reward, RewardModel] = WeakValueDictionary()
        self._loaded: list[RewardModel] = []

    def causal(self, spec: LocalModel | None, name: str) -> CausalModel:
        if self.models.language_model is None:
            raise ModelError(f"reward {name!r} needs a local language model.")
        own, model, tokenizer = self.models.language_model
        memory = self.models.memory
        if spec is None or spec.same_weights(own):
            return CausalModel(model, _chat(tokenizer, model), True, True, memory)
        other, its_tokenizer = self.models.causal(spec)
        same = same_vocabulary(its_tokenizer, tokenizer)
        return CausalModel(other, _chat(its_tokenizer, other), False, same, memory)

    def __getitem__(self, settings: Reward) -> RewardModel:
        key = settings if settings.parts else settings.model_copy(update={"scale": None})
        if (known := self.built.get(key)) is not None:
            return known
        model = self.built[key] = self._build(settings)
        if settings.stays_loaded:
            self._loaded.append(model)
        return model

    def _build(self, settings: Reward) -> RewardModel:
        try:
            model = settings.build(self)
        except CardsError:
            raise
        except Exception as error:
            raise RewardError(f"reward {settings.name!r} cannot be loaded: {type(error).__name__}: {error}") from error
        if settings.scores_whole_sentences:
            model = WholeSentences(model)
        model.timeout = settings.timeout
        return model


def _chat(tokenizer: Any, model: Any) -> ChatTokenizer:
    return ChatTokenizer(tokenizer, rows=embedding_rows(model))
