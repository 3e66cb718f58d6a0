"""A model made of others: each has its own view of the conversation and of the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

from cards_integrations.rewards.base import Conversation, Response, RewardModel, scores
from cards_integrations.transformer.step_times import StepTimes

if TYPE_CHECKING:
    from cards_integrations.transformer.kv_memory import CacheNeed


@dataclass
class PartViews:
    """An open conversation, and its scored responses, as each part sees them."""

    conversations: list[Conversation] = field(default_factory=list)
    responses: dict[Response, list[Response | None]] = field(default_factory=dict)
    """For each response that of each part; None for a part that was not asked."""


class Composite(RewardModel):
    """A model made of `models`, its parts. `score` of a subclass asks some or all of them, and combines the scores."""

    across_requests = True
    owns_parts: ClassVar[bool] = False
    """True if the parts are its own; False if they come from its loader, and may serve others."""

    def __init__(self, name: str, models: Sequence[RewardModel]) -> None:
        self.name = name
        self.models = models
        self.labels = _distinct([model.name for model in models])
        self.views: dict[Conversation, PartViews] = {}

    @property
    def reads_states(self) -> bool:
        return any(model.reads_states for model in self.models)

    @property
    def step_times(self) -> StepTimes | None:
        known = [model.step_times for model in self.models if model.step_times is not None]
        return StepTimes.together(known) if known else None

    @property
    def cache_bytes(self) -> int:
        return sum(model.cache_bytes for model in self.models) if self.owns_parts else 0

    def release(self) -> None:
        for model in self.models if self.owns_parts else ():
            model.release()

    def cache_needs(self, conversation: Conversation, tokens: int) -> list[CacheNeed]:
        return [need for model in self.models for need in model.cache_needs(conversation, tokens)]

    def growth(self, responses: Sequence[Response]) -> int:
        return sum(
            model.growth([self.response_view(part, response) for response in responses])
            for part, model in enumerate(self.models)
        )

    def preempt(self, conversation: Conversation) -> None:
        for model, view in zip(self.models, self.views[conversation].conversations, strict=True):
            model.preempt(view)

    def resume(self, conversation: Conversation) -> None:
        for model, view in zip(self.models, self.views[conversation].conversations, strict=True):
            model.resume(view)

    def conversation_view(self, part: int, conversation: Conversation) -> Conversation:
        """Make the conversation that a part sees."""
        return Conversation(conversation.prompt, conversation.usage, conversation.context)

    def response_view(self, part: int, response: Response) -> Response:
        """Make the response that a part sees."""
        views = self.views[response.conversation]
        parent = views.responses.get(response.parent) if response.parent is not None else None
        return Response(
            views.conversations[part],
            response.text,
            response.ids,
            response.log_likelihood,
            response.finished,
            parent=parent[part] if parent else None,
            states=response.states,
        )

    def open(self, conversation: Conversation) -> None:
        views = self.views[conversation] = PartViews()
        try:
            for part, model in enumerate(self.models):
                view = self.conversation_view(part, conversation)
                model.open(view)
                views.conversations.append(view)
        except Exception:
            self.close(conversation)
            raise

    def close(self, conversation: Conversation) -> None:
        if (views := self.views.pop(conversation, None)) is not None:
            for model, view in zip(self.models, views.conversations, strict=False):  # fewer if one refused the prompt
                model.close(view)

    def keep(self, response: Response) -> None:
        for model, view in self._forget(response):
            model.keep(view)

    def drop(self, response: Response) -> None:
        for model, view in self._forget(response):
            model.drop(view)

    def _forget(self, response: Response) -> list[tuple[RewardModel, Response]]:
        """Return the models that were asked about a response, each with its view of it."""
        views = self.views.get(response.conversation)
        seen = views.responses.pop(response, None) if views else None
        return [(model, view) for model, view in zip(self.models, seen or (), strict=False) if view is not None]

    async def score_part(self, part: int, responses: Sequence[Response]) -> list[float]:
        """Score responses by one part, and add its scores to their `parts`."""
        label, views = self.labels[part], [self._remembered_view(part, response) for response in responses]
        score_of = await _scores_by_response(self.models[part], views)
        for response, view in zip(responses, views, strict=True):
            response.parts[label] = score_of[view]
            response.parts.update({f"{label} / {name}": value for name, value in view.parts.items()})
        return [score_of[view] for view in views]

    async def score_parts(self, responses: Sequence[Response]) -> list[list[float]]:
        """Score responses by all parts at the same time; return a list for each part."""
        return await _all(self.score_part(part, responses) for part in range(len(self.models)))

    def _remembered_view(self, part: int, response: Response) -> Response:
        view = self.response_view(part, response)
        views = self.views[response.conversation].responses.setdefault(response, [None] * len(self.models))
        views[part] = view
        return view


async def _scores_by_response(model: RewardModel, responses: Sequence[Response]) -> dict[Response, float]:
    """Score responses, in one call or in one for each conversation."""
    groups: dict[Conversation | None, list[Response]] = {}
    for response in responses:
        groups.setdefault(None if model.across_requests else response.conversation, []).append(response)
    found = await _all(scores(model, group) for group in groups.values())
    return dict(zip(chain(*groups.values()), chain(*found), strict=True))


async def _all(work: Any) -> list[Any]:
    """Return all results, or raise the first error once nothing of it runs any more."""
    found = await asyncio.gather(*work, return_exceptions=True)
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found


def _distinct(names: list[str]) -> list[str]:
    return [f"{name} #{names[:i].count(name) + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)]
