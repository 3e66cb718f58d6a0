"""A Python callable as a reward."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

from cards_integrations.models.chat import as_text
from cards_integrations.models.loading import ModelLoader
from cards_integrations.rewards.base import Response, Reward, RewardModel


class FunctionReward(Reward):
    """`function(prompt, responses) -> list[float]`, sync (run in a thread) or async.

    `prompt` is the user's text, or the whole conversation with roles if it has several messages.
    The reward of the prompt alone is `function(prompt, [""])`.
    """

    kind: Literal["function"] = "function"
    function: Callable[[str, list[str]], Any]

    @property
    def name(self) -> str:
        return f"function {getattr(self.function, '__name__', repr(self.function))}"

    def build(self, loader: ModelLoader) -> RewardModel:
        return FunctionModel(self)


class FunctionModel(RewardModel):
    def __init__(self, settings: FunctionReward) -> None:
        self.name = settings.name
        self.function = settings.function

    async def score(self, responses: Sequence[Response]) -> list[float]:
        prompt, texts = as_text(responses[0].conversation.prompt), [r.text for r in responses]
        if inspect.iscoroutinefunction(self.function):
            scores = await self.function(prompt, texts)
        else:
            scores = await asyncio.to_thread(self.function, prompt, texts)
        responses[0].conversation.usage.rm_forwards += 1
        return list(scores)
