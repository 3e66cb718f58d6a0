"""Language models that text is drafted from."""

from cards_integrations.models.loading import LocalModel

__all__ = ["LocalModel"]
