"""CARDS in LangChain: a chat model, a text LLM, and a chain that shows the reward what was retrieved."""

from cards_integrations.langchain.chat_model import ChatCards
from cards_integrations.langchain.completion import CardsCompletion
from cards_integrations.langchain.retrieval import documents_chain

__all__ = ["CardsCompletion", "ChatCards", "documents_chain"]
