"""The protocol of reward models: settings that build a model, and a model that scores answers.

A reward model sees whole answers so far (kept text plus candidate). It may keep a state for each
request, which is how a decoder classifier scores a candidate by its new tokens only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from cards_integrations.models.base import Message
from cards_integrations.models.loading import ModelLoader
from cards_integrations.trace import Usage

if TYPE_CHECKING:
    from cards_integrations.models.kv_cache import TreeCache
    from cards_integrations.models.step_times import StepTimes


@dataclass(eq=False)
class Conversation:
    """The request that answers belong to."""

    prompt: str | list[Message]
    usage: Usage
    state: Any = None  # the reward model's own


@dataclass(eq=False)
class Response:
    """An answer so far. `ids` are the language model's own tokens, or None if the text was cut."""

    conversation: Conversation
    text: str
    ids: list[int] | None = None
    state: Any = None  # the reward model's own


class RewardModel(ABC):
    """A loaded reward model. Called from the engine's thread; higher scores are better."""

    name: str
    across_requests: ClassVar[bool] = False
    """May one call of `score` take the answers of several requests?"""

    @property
    def times(self) -> StepTimes | None:
        """Seconds of a call by its number of tokens, if it keeps the language model's device busy."""
        return None

    def needs(self, tokens: int) -> list[tuple[TreeCache, int, int]]:
        """Rows and columns that a request of so many tokens takes in the caches of this model."""
        return []

    def open(self, conversation: Conversation) -> None:
        """A request begins."""

    @abstractmethod
    async def score(self, responses: Sequence[Response]) -> list[float]:
        """One finite float for each response."""

    def keep(self, response: Response) -> None:
        """The request goes on from this scored response."""

    def drop(self, response: Response) -> None:
        """This scored response was given up."""

    def close(self, conversation: Conversation) -> None:
        """The request has ended."""


class Reward(BaseModel):
    """Settings of a reward model."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    kind: str
    scale: tuple[float, float] | None = None
    """Mean and spread of the reward over plain answers; what `Cards(target_reward="auto")` reads."""

    @property
    def name(self) -> str:
        """What errors and metadata call it."""
        return self.kind

    def build(self, loader: ModelLoader) -> RewardModel:
        """Load it; called once per engine, in the engine's thread."""
        raise NotImplementedError
