"""Aligned text from a local model, without fine-tuning it: Cascade Reward Sampling (CARDS)."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cards_integrations.completion import CardsCompletion
    from cards_integrations.langchain import ChatCards
    from cards_integrations.llm import CardsLLM
    from cards_integrations.models.grammar import Grammar
    from cards_integrations.retrieval import RetrievedContext, documents_chain
    from cards_integrations.settings import CardsSettings
    from cards_integrations.trace import Alignment

__version__ = version("cards-integrations")
__all__ = [
    "Alignment",
    "CardsCompletion",
    "CardsLLM",
    "CardsSettings",
    "ChatCards",
    "Grammar",
    "RetrievedContext",
    "__version__",
    "documents_chain",
]

_HOMES = {
    "CardsLLM": "llm",
    "ChatCards": "langchain",
    "CardsCompletion": "completion",
    "CardsSettings": "settings",
    "RetrievedContext": "retrieval",
    "documents_chain": "retrieval",
    "Alignment": "trace",
    "Grammar": "models.grammar",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch and the frameworks take seconds."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
