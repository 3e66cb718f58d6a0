"""Requests for rewards: collected per request, grouped by reward model, and answered.

A reward model that can take responses of several requests at once gets them in one call. If that call fails,
each request is asked alone, so that an error reaches only the request that caused it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial

from cards_integrations.rewards.base import Response, RewardModel, scores


@dataclass(eq=False)
class ScoreRequest:
    """A response that waits for its score.

    Attributes:
        queue: The queue of the request that it belongs to.
        response: The answer so far that is to be scored.
        score: Resolved with the reward, or with the error of the reward model.
    """

    queue: ScoreQueue
    response: Response
    score: asyncio.Future[float]


class ScoreQueue:
    """The scores that one request has asked for and that no reward model has been given yet."""

    def __init__(self, reward_model: RewardModel, wake: Callable[[], None]) -> None:
        self.reward_model = reward_model
        self.across_requests = reward_model.across_requests
        self.waiting: list[ScoreRequest] = []
        self.under_way = 0  # scores that the reward model computes now
        self.promised = 0  # bytes by which the caches grow for these, at most
        self._growth: int | None = None
        self.caller = copy_context()  # functions of users see the context variables of their caller
        self._wake = wake

    @property
    def pending(self) -> bool:
        """True while a score is missing that was asked for."""
        return bool(self.waiting or self.under_way)

    @property
    def growth(self) -> int:
        """Bytes by which the caches grow, at most, for the scores that wait."""
        if self._growth is None:
            try:
                self._growth = self.reward_model.growth([request.response for request in self.waiting])
            except Exception:
                self._growth = 0  # nothing will be computed: scoring raises the same error to its caller
        return self._growth

    def submit(self, response: Response, score: asyncio.Future[float] | None = None) -> asyncio.Future[float]:
        """Ask for the score of a response; it is scored together with those of other requests.

        Args:
            response: The answer so far.
            score: The future to resolve; a new one by default.
        """
        score = score or asyncio.get_running_loop().create_future()
        self.waiting.append(ScoreRequest(self, response, score))
        self._growth = None
        self._wake()
        return score

    def dispatched(self) -> None:
        """Note that all that waited has been given to the reward model; `answered` follows for each."""
        self.promised += self.growth
        self.under_way += len(self.waiting)
        self.waiting, self._growth = [], None

    def answered(self) -> None:
        """Note that the reward model has finished one response."""
        self.under_way -= 1
        if not self.under_way:
            self.promised = 0

    def fail(self, error: Exception) -> None:
        """Let everything that waits raise."""
        for request in self.waiting:
            if not request.score.done():
                request.score.set_exception(error)

    def cancel(self) -> None:
        """Give up everything that waits."""
        for request in self.waiting:
            request.score.cancel()


class Scoring:
    """Calls the reward models, in tasks of the engine's loop.

    Args:
        wake: Called when there are new scores.
        on_end: Called when a reward model has finished a group.
    """

    def __init__(self, wake: Callable[[], None], on_end: Callable[[], None]) -> None:
        self._wake = wake
        self._on_end = on_end
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself holds tasks weakly

    @property
    def calls(self) -> int:
        """Calls of reward models that are under way."""
        return len(self._tasks)

    def dispatch(self, queues: Sequence[ScoreQueue]) -> None:
        """Give what waits in these queues to the reward models: one call for each group that can be scored together."""
        groups: dict[tuple[RewardModel, ScoreQueue | None], list[ScoreRequest]] = {}
        for queue in queues:
            alone = None if queue.across_requests else queue
            if queue.waiting:
                groups.setdefault((queue.reward_model, alone), []).extend(queue.waiting)
                queue.dispatched()
        for (reward_model, alone), group in groups.items():
            context = None if alone is None else alone.caller.copy()
            task = asyncio.get_running_loop().create_task(self._score_group(reward_model, group), context=context)
            self._tasks.add(task)
            task.add_done_callback(partial(self._ended, group))
            for request in group:
                request.score.add_done_callback(partial(_cancel_if_unwanted, task, group))

    def _ended(self, group: list[ScoreRequest], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        for request in group:
            request.queue.answered()
        self._on_end()

    async def _score_group(self, reward_model: RewardModel, group: list[ScoreRequest]) -> None:
        group = [request for request in group if not request.score.done()]
        if not group:
            return  # all given up by now
        try:
            found = await scores(reward_model, [request.response for request in group])
        except Exception as error:
            await self._fail_group(reward_model, group, error)
            return
        for request, value in zip(group, found, strict=True):
            if not request.score.done():
                request.score.set_result(value)
        self._wake()

    async def _fail_group(self, reward_model: RewardModel, group: list[ScoreRequest], error: Exception) -> None:
        """Score each request of a group alone, so that an error reaches only the request that caused it."""
        for request in group:
            reward_model.drop(request.response)
        queues = dict.fromkeys(request.queue for request in group)
        if len(queues) > 1:
            alone = [[request for request in group if request.queue is queue] for queue in queues]
            await asyncio.gather(*(self._score_group(reward_model, requests) for requests in alone))
            return
        for request in group:
            if not request.score.done():
                request.score.set_exception(error)


def _cancel_if_unwanted(task: asyncio.Task[None], group: list[ScoreRequest], _: asyncio.Future[float]) -> None:
    """Stop scoring a group once all its responses have been given up."""
    if all(request.score.done() for request in group):
        task.cancel()
