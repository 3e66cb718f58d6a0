"""Language models that text is drafted from."""

from cards_integrations.models.local.settings import LocalModel
from cards_integrations.models.vllm.language_model import VllmModel

__all__ = ["LocalModel", "VllmModel"]
