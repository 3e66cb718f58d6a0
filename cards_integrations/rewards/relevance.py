"""Whether an answer speaks about what was asked: the cosine of their embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from cards_integrations.chat.message import Message
from cards_integrations.chat.template import as_messages, as_text
from cards_integrations.models.local.embedded import MINILM
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.rewards.base import Conversation, Loader, Response, Reward, RewardModel, count_forward
from cards_integrations.rewards.registry import register_reward
from cards_integrations.rewards.scorers.embedding import Embedder, similarity


@register_reward
class RelevanceReward(Reward):
    """Cosine similarity of the answer and the question, in [-1, 1]; needs the extra `embeddings`.

    The question is the user's last message. An empty answer scores 0.0: it is about nothing, which is
    neither good nor bad. A text that is longer than the model's window is read from its end.
    """

    kind: Literal["relevance"] = "relevance"
    """Names this class in settings files."""
    model: Annotated[str, Field(min_length=1)] = MINILM
    """The embedded "minilm", or any sentence-transformers model: a directory or a hub id."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""

    @property
    def name(self) -> str:
        return f"relevance {self.model}"

    def build(self, loader: Loader) -> RewardModel:
        spec = LocalModel(model=self.model, revision=self.revision, trust_remote_code=self.trust_remote_code)
        return Relevance(self.name, Embedder.of(loader.models, spec))


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
        known = self._question_vectors(list(dict.fromkeys(conversations)))
        answers = self._embed([response.text for response in responses], conversations)
        return similarity(answers, torch.stack([known[conversation] for conversation in conversations]))

    def _question_vectors(self, conversations: list[Conversation]) -> dict[Conversation, torch.Tensor]:
        """The vector (size,) of each conversation's question, remembered while the conversation is open."""
        known = {c: vector for c in conversations if (vector := self.questions.get(c)) is not None}
        new = [conversation for conversation in conversations if conversation not in known]
        if new:
            vectors = self._embed([question(conversation.prompt) for conversation in new], new, query=True)
            known.update(zip(new, vectors, strict=True))
            self.questions.update({c: known[c] for c in new if c in self.questions})
        return known

    def _embed(self, texts: list[str], conversations: list[Conversation], query: bool = False) -> torch.Tensor:
        """Vectors (n, size), counted in the usage of the conversations."""
        vectors, tokens = self.embedder(texts, query)
        count_forward(zip(conversations, tokens, strict=True))
        return vectors


def question(prompt: str | list[Message]) -> str:
    """Return the user's last message, or the whole conversation if there is none."""
    asked = [message["content"] for message in as_messages(prompt) if message["role"] == "user"]
    return asked[-1] if asked else as_text(prompt)
