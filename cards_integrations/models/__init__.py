"""Language models that text is drafted from."""

from cards_integrations.models.base import CustomModel, LanguageModel
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.models.sources import register_model
from cards_integrations.models.vllm.settings import VllmModel

__all__ = ["CustomModel", "LanguageModel", "LocalModel", "VllmModel", "register_model"]
