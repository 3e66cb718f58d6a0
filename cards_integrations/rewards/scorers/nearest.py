"""How close each sentence of an answer is to what a context says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cards_integrations.rewards.base import Conversation, Response, RewardModel, count_forward
from cards_integrations.rewards.scorers.embedding import Embedder
from cards_integrations.rewards.scorers.sentences import split_sentences
from cards_integrations.rewards.scorers.support import support


class Nearest(RewardModel):
    """The mean over an answer's sentences of the highest cosine with a sentence of its contexts.

    The vectors of those sentences, (n, size) for each context, are made at the first score.

    Args:
        name: What errors call the reward.
        embedder: Makes the vectors.
        context: Finds the contexts of a conversation.
    """

    across_requests = True

    def __init__(self, name: str, embedder: Embedder, context: Callable[[Conversation], Sequence[str]]) -> None:
        self.name = name
        self.context = context
        self.embedder = embedder
        self.sources: dict[Conversation, Sequence[torch.Tensor]] = {}  # of open conversations; empty until needed

    def open(self, conversation: Conversation) -> None:
        self.sources[conversation] = ()

    def close(self, conversation: Conversation) -> None:
        self.sources.pop(conversation, None)

    async def score(self, responses: Sequence[Response]) -> list[float]:
        sources = {c: await self._sources(c) for c in dict.fromkeys(response.conversation for response in responses)}
        return [await self._nearness(response, sources[response.conversation]) for response in responses]

    async def _sources(self, conversation: Conversation) -> Sequence[torch.Tensor]:
        """Return the vectors (n, size) of each context's sentences, remembered while the conversation is open."""
        if known := self.sources.get(conversation):
            return known
        contexts = [split_sentences(context) or [""] for context in self.context(conversation)] or [[""]]
        vectors = await self._embed([sentence for context in contexts for sentence in context], conversation)
        found = torch.split(vectors, [len(context) for context in contexts])
        if conversation in self.sources:
            self.sources[conversation] = found
        return found

    async def _nearness(self, response: Response, sources: Sequence[torch.Tensor]) -> float:
        own = split_sentences(response.text)
        if not own:
            return 0.0
        vectors = await self._embed(own, response.conversation)
        nearest = [(vectors @ source.T).amax(-1).clamp(max=1) for source in sources]
        return support(response, torch.stack(nearest, -1).tolist())

    async def _embed(self, texts: list[str], conversation: Conversation) -> torch.Tensor:
        vectors, tokens = await self.embedder(texts)
        count_forward([(conversation, sum(tokens))])
        return vectors
