"""CARDS in LlamaIndex: an LLM, its events, and a postprocessor that tells the reward what was retrieved."""

from cards_integrations.llama_index.llm import CardsSegmentEvent, LlamaIndexCards

__all__ = ["CardsSegmentEvent", "LlamaIndexCards"]
