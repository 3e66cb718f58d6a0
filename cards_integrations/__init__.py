"""Aligned text from a local model, without fine-tuning it: Cascade Reward Sampling (CARDS)."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cards_integrations.chat.grammar import Grammar
    from cards_integrations.langchain.chat_model import ChatCards
    from cards_integrations.langchain.completion import CardsCompletion
    from cards_integrations.langchain.retrieval import documents_chain
    from cards_integrations.llama_index.retrieval import RetrievedContext
    from cards_integrations.llm import CardsLLM
    from cards_integrations.settings import CardsSettings
    from cards_integrations.trace import Alignment

__version__ = version("cards-integrations")
"""The version that is installed."""
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
    "ChatCards": "langchain.chat_model",
    "CardsCompletion": "langchain.completion",
    "CardsSettings": "settings",
    "RetrievedContext": "llama_index.retrieval",
    "documents_chain": "langchain.retrieval",
    "Alignment": "trace",
    "Grammar": "chat.grammar",
}


def __getattr__(name: str) -> Any:
    """Import a name on first use: torch and the frameworks take seconds."""
    if name in _HOMES:
        from cards_integrations.progress import phase, shown, wanted

        with shown(wanted()), phase(f"importing {name}", lasting=False):
            return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
