"""The names of `cards-integrations` that belong to LangChain."""

from __future__ import annotations

from cards_integrations import CardsCompletion, ChatCards, documents_chain

__all__ = ["CardsCompletion", "ChatCards", "documents_chain"]
