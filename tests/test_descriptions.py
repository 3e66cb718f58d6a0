"""Every setting that users meet says what it is, where editors and schemas show it."""

from __future__ import annotations

import pytest
from langchain_core.language_models import BaseChatModel, BaseLLM
from llama_index.core.llms.function_calling import FunctionCallingLLM
from pydantic import BaseModel

from cards_integrations import CardsCompletion, CardsLLM, CardsSettings, ChatCards
from cards_integrations.decoding import METHODS, FixedLength, OptimalStopping, Punctuation, Uncertainty
from cards_integrations.engine import EngineSettings
from cards_integrations.models import LocalModel, VllmModel
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import REWARDS

SETTINGS: list[type[BaseModel]] = [
    *(CardsSettings, CardsLLM, ChatCards, CardsCompletion, EngineSettings, Sampler, LocalModel, VllmModel),
    *(OptimalStopping, Uncertainty, FixedLength, Punctuation),
    *(kind for kind in [*METHODS.values(), *REWARDS.values()] if kind.__module__.startswith("cards_integrations.")),
]
OTHERS = {name for base in (FunctionCallingLLM, BaseChatModel, BaseLLM) for name in base.model_fields}
"""Fields of the frameworks, which say what they say."""


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.__name__)
def test_every_setting_is_described(settings: type[BaseModel]) -> None:
    assert not [name for name, field in settings.model_fields.items() if name not in OTHERS and not field.description]
