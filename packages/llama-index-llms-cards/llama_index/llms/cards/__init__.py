"""The names of `cards-integrations` that belong to LlamaIndex."""

from __future__ import annotations

from cards_integrations import CardsLLM, RetrievedContext

__all__ = ["CardsLLM", "RetrievedContext"]
