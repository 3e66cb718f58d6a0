"""Language models that text is drafted from."""

from cards_integrations.models.loading import LocalModel
from cards_integrations.models.vllm import VllmModel

__all__ = ["LocalModel", "VllmModel"]
