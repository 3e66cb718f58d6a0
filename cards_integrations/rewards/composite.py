"""Rewards made of other rewards: each part has its own view of the conversation and of the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Len

from cards_integrations.rewards.base import Conversation, Response, Reward, RewardLoader, RewardModel, scores
from cards_integrations.rewards.registry import AnyReward
from cards_integrations.transformer.step_times import StepTimes

if TYPE_CHECKING:
    from cards_integrations.transformer.kv_memory import CacheNeed


class Composite(RewardModel):
    """A model over `models`; `responses.state` are the parts' responses (None where one was not asked)."""

    across_requests = True

    def __init__(self, name: str, models: Sequence[RewardModel]) -> None:
        self.name = name
        self.models = models
        self.labels = _distinct([model.name for model in models])

    @property
    def step_times(self) -> StepTimes | None:
        known = [model.step_times for model in self.models if model.step_times is not None]
        return StepTimes.together(known) if known else None

    def cache_needs(self, conversation: Conversation, tokens: int) -> list[CacheNeed]:
        return [need for model in self.models for need in model.cache_needs(conversation, tokens)]

    def view(self, which: int, conversation: Conversation) -> Conversation:
        """The conversation as a part sees it."""
        return Conversation(conversation.prompt, conversation.usage, conversation.context)

    def open(self, conversation: Conversation) -> None:
        conversation.state = []
        try:
            for which, model in enumerate(self.models):
                own = self.view(which, conversation)
                model.open(own)
                conversation.state.append(own)
        except Exception:
            self.close(conversation)
            raise

    def close(self, conversation: Conversation) -> None:
        for model, own in zip(self.models, conversation.state or (), strict=False):
            model.close(own)
        conversation.state = None

    def keep(self, response: Response) -> None:
        for model, own in zip(self.models, response.state or (), strict=False):
            if own is not None:
                model.keep(own)

    def drop(self, response: Response) -> None:
        for model, own in zip(self.models, response.state or (), strict=False):
            if own is not None:
                model.drop(own)
        response.state = None

    async def part(self, which: int, responses: Sequence[Response]) -> list[float]:
        """Scores of one part; also left in `parts` of each response."""
        model = self.models[which]
        groups: dict[Any, list[Response]] = {}
        for response in responses:
            response.state = response.state or [None] * len(self.models)
            own = Response(
                response.conversation.state[which], response.text, response.ids, response.log_likelihood,
                response.finished,
            )  # fmt: skip
            if response.parent is not None and response.parent.state:
                own.parent = response.parent.state[which]
            response.state[which] = own
            groups.setdefault(None if model.across_requests else own.conversation, []).append(own)
        asked = list(groups.values())
        found = await _all(scores(model, group) for group in asked)
        score_of = {
            id(r): s for group, values in zip(asked, found, strict=True) for r, s in zip(group, values, strict=True)
        }
        values = []
        for response in responses:
            own = response.state[which]
            values.append(score_of[id(own)])
            response.parts[self.labels[which]] = score_of[id(own)]
            response.parts.update({f"{self.labels[which]} / {name}": value for name, value in own.parts.items()})
        return values

    async def every_part(self, responses: Sequence[Response]) -> list[list[float]]:
        """Scores of all parts, asked at the same time: a list for each part."""
        return await _all(self.part(which, responses) for which in range(len(self.models)))


async def _all(work: Any) -> list[Any]:
    """All results; the first error, but only once nothing of it runs any more."""
    found = await asyncio.gather(*work, return_exceptions=True)
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found


def _distinct(names: list[str]) -> list[str]:
    return [f"{name} #{names[:i].count(name) + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)]


Parts = Annotated[tuple[AnyReward, ...], Len(1)]


class CompositeReward(Reward):
    """Settings with `rewards`, each of which is standardised: (reward - mean) / spread of plain answers."""

    standardises: ClassVar[bool] = True

    rewards: Parts

    @property
    def name(self) -> str:
        return f"{self.kind} ({', '.join(reward.name for reward in self.rewards)})"

    @property
    def parts(self) -> tuple[Reward, ...]:
        return self.rewards

    def with_parts(self, parts: Sequence[Reward]) -> Reward:
        return self.model_copy(update={"rewards": tuple(parts)})

    def combine(self, values: Sequence[float]) -> float:
        """The score of an answer from the standardised ones of its parts."""
        raise NotImplementedError

    def build(self, loader: RewardLoader) -> RewardModel:
        return Combined(self, [loader[reward] for reward in self.rewards])


class Combined(Composite):
    """All parts are asked, and the settings say what comes of it."""

    def __init__(self, settings: CompositeReward, models: Sequence[RewardModel]) -> None:
        super().__init__(settings.name, models)
        self.settings = settings
        self.scales = [reward.scale or (0.0, 1.0) for reward in settings.rewards]

    async def score(self, responses: Sequence[Response]) -> list[float]:
        found = await self.every_part(responses)
        standardised = [
            [(value - mean) / (spread or 1.0) for value in values]
            for (mean, spread), values in zip(self.scales, found, strict=True)
        ]
        return [self.settings.combine(each) for each in zip(*standardised, strict=True)]
