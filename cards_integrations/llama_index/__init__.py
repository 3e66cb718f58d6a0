"""CARDS in LlamaIndex: an LLM, its events, and a postprocessor that shows the reward what was retrieved."""

from cards_integrations.llama_index.llm import LlamaIndexCards
from cards_integrations.llama_index.retrieval import RetrievedContext
from cards_integrations.llama_index.streaming import CardsSegmentEvent

__all__ = ["CardsSegmentEvent", "LlamaIndexCards", "RetrievedContext"]
