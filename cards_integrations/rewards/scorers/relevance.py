"""The cosine of the embeddings of question and answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cards_integrations.chat.message import Message
from cards_integrations.chat.template import as_messages, as_text
from cards_integrations.rewards.base import Conversation, Response, RewardModel, count_forward
from cards_integrations.rewards.scorers.embedding import Embedder, similarity


class Relevance(RewardModel):
    """The cosine of the vectors of question and answer; the question's is made at the first score."""

    across_requests = True

    def __init__(self, name: str, embedder: Embedder) -> None:
        self.name = name
        self.embedder = embedder
        self.questions: dict[Conversation, torch.Tensor | None] = {}  # vectors (size,) of open conversations

    def open(self, conversation: Conversation) -> None:
        self.questions[conversation] = None

    def close(self, conversation: Conversation) -> None:
        self.questions.pop(conversation, None)

    async def score(self, responses: Sequence[Response]) -> list[float]:
        conversations = [response.conversation for response in responses]
        known = await self._question_vectors(list(dict.fromkeys(conversations)))
        answers = await self._embed([response.text for response in responses], conversations)
        return similarity(answers, torch.stack([known[conversation] for conversation in conversations]))

    async def _question_vectors(self, conversations: list[Conversation]) -> dict[Conversation, torch.Tensor]:
        """Return the vector (size,) of each conversation's question, remembered while the conversation is open."""
        known = {c: vector for c in conversations if (vector := self.questions.get(c)) is not None}
        new = [conversation for conversation in conversations if conversation not in known]
        if new:
            vectors = await self._embed([question(conversation.prompt) for conversation in new], new, query=True)
            known.update(zip(new, vectors, strict=True))
            self.questions.update({c: known[c] for c in new if c in self.questions})
        return known

    async def _embed(self, texts: list[str], conversations: list[Conversation], query: bool = False) -> torch.Tensor:
        """Vectors (n, size), counted in the usage of the conversations."""
        vectors, tokens = await self.embedder(texts, query)
        count_forward(zip(conversations, tokens, strict=True))
        return vectors


def question(prompt: str | list[Message]) -> str:
    """Return the user's last message, or the whole conversation if there is none."""
    asked = [message["content"] for message in as_messages(prompt) if message["role"] == "user"]
    return asked[-1] if asked else as_text(prompt)
