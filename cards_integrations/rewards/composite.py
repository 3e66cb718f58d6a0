"""Rewards made of other rewards: each part has its own view of the conversation and of the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Len

from cards_integrations.rewards.base import Conversation, Response, Reward, RewardLoader, RewardModel, scores
from cards_integrations.rewards.registry import AnyReward
from cards_integrations.transformer.step_times import StepTimes

if TYPE_CHECKING:
    from cards_integrations.transformer.kv_memory import CacheNeed


@dataclass
class PartViews:
    """A conversation as each part sees it, and of each scored response as well (None where a part was not asked)."""

    conversations: list[Conversation] = field(default_factory=list)
    responses: dict[Response, list[Response | None]] = field(default_factory=dict)


class Composite(RewardModel):
    """A model over `models`, each with its own view of the conversation and of the answers."""

    across_requests = True

    def __init__(self, name: str, models: Sequence[RewardModel]) -> None:
        self.name = name
        self.models = models
        self.labels = _distinct([model.name for model in models])
        self.views: dict[Conversation, PartViews] = {}

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
        views = self.views[conversation] = PartViews()
        try:
            for which, model in enumerate(self.models):
                own = self.view(which, conversation)
                model.open(own)
                views.conversations.append(own)
        except Exception:
            self.close(conversation)
            raise

    def close(self, conversation: Conversation) -> None:
        if (views := self.views.pop(conversation, None)) is not None:
            for model, own in zip(self.models, views.conversations, strict=False):  # fewer if one refused the prompt
                model.close(own)

    def keep(self, response: Response) -> None:
        for model, own in self._forget(response):
            model.keep(own)

    def drop(self, response: Response) -> None:
        for model, own in self._forget(response):
            model.drop(own)

    def _forget(self, response: Response) -> list[tuple[RewardModel, Response]]:
        """The models that scored a response, each with its view of it."""
        views = self.views.get(response.conversation)
        owns = views.responses.pop(response, None) if views else None
        return [(model, own) for model, own in zip(self.models, owns or (), strict=False) if own is not None]

    def response_view(self, which: int, response: Response) -> Response:
        """The response as a part sees it."""
        views = self.views[response.conversation]
        above = views.responses.get(response.parent) if response.parent is not None else None
        return Response(
            views.conversations[which],
            response.text,
            response.ids,
            response.log_likelihood,
            response.finished,
            parent=above[which] if above else None,
        )

    async def part(self, which: int, responses: Sequence[Response]) -> list[float]:
        """Scores of one part; also left in `parts` of each response."""
        label, owns = self.labels[which], [self._remembered_view(which, response) for response in responses]
        score_of = await _scores_by_response(self.models[which], owns)
        for response, own in zip(responses, owns, strict=True):
            response.parts[label] = score_of[own]
            response.parts.update({f"{label} / {name}": value for name, value in own.parts.items()})
        return [score_of[own] for own in owns]

    def _remembered_view(self, which: int, response: Response) -> Response:
        own = self.response_view(which, response)
        owns = self.views[response.conversation].responses.setdefault(response, [None] * len(self.models))
        owns[which] = own
        return own

    async def every_part(self, responses: Sequence[Response]) -> list[list[float]]:
        """Scores of all parts, asked at the same time: a list for each part."""
        return await _all(self.part(which, responses) for which in range(len(self.models)))


async def _scores_by_response(model: RewardModel, responses: Sequence[Response]) -> dict[Response, float]:
    """The score of each response, in one call or in one for each conversation."""
    groups: dict[Conversation | None, list[Response]] = {}
    for response in responses:
        groups.setdefault(None if model.across_requests else response.conversation, []).append(response)
    found = await _all(scores(model, group) for group in groups.values())
    return dict(zip(chain(*groups.values()), chain(*found), strict=True))


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
