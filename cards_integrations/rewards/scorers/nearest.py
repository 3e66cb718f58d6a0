"""How near each sentence of an answer is to what a context says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cards_integrations.rewards.base import Conversation, Response, RewardModel, count_forward
from cards_integrations.rewards.scorers.embedding import Embedder
from cards_integrations.rewards.scorers.sentences import sentences
from cards_integrations.rewards.scorers.support import support


class Nearest(RewardModel):
    """The mean over an answer's sentences of the highest cosine with a sentence of its contexts.

    The state of a conversation is the vectors of those sentences, (n, size) for each context, made at
    the first score.
    """

    across_requests = True

    def __init__(self, name: str, embedder: Embedder, context: Callable[[Conversation], Sequence[str]]) -> None:
        self.name = name
        self.context = context
        self.embedder = embedder

    async def score(self, responses: Sequence[Response]) -> list[float]:
        for conversation in dict.fromkeys(response.conversation for response in responses):
            if conversation.state is None:
                said = [sentences(context) or [""] for context in self.context(conversation)] or [[""]]
                vectors = self._embed([sentence for own in said for sentence in own], conversation)
                conversation.state = torch.split(vectors, [len(own) for own in said])
        return [self._nearness(response) for response in responses]

    def _nearness(self, response: Response) -> float:
        own = sentences(response.text)
        if not own:
            return 0.0
        vectors = self._embed(own, response.conversation)
        nearest = [(vectors @ source.T).amax(-1).clamp(max=1) for source in response.conversation.state]
        return support(response, torch.stack(nearest, -1).tolist())

    def _embed(self, texts: list[str], conversation: Conversation) -> torch.Tensor:
        vectors, tokens = self.embedder(texts)
        count_forward([(conversation, sum(tokens))])
        return vectors
