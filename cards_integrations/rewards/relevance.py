"""Whether an answer speaks about what was asked: the cosine of their embeddings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cards_integrations.models.local.embedded import MINILM
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.rewards.base import Loader, Reward, RewardModel
from cards_integrations.rewards.registry import register_reward


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
        from cards_integrations.rewards.scorers.embedding import Embedder
        from cards_integrations.rewards.scorers.relevance import Relevance

        spec = LocalModel(model=self.model, revision=self.revision, trust_remote_code=self.trust_remote_code)
        return Relevance(self.name, Embedder.of(loader.models, spec))
