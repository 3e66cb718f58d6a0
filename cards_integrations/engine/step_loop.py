"""The loop that drives the models: sample, score candidates that have ended, let the methods react, forward."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from cards_integrations.engine.preemption import Preemption
from cards_integrations.engine.scheduler import BestPerSecond, FixedWidth, Scheduler
from cards_integrations.engine.scoring import Scoring
from cards_integrations.engine.session import Session
from cards_integrations.engine.step_costs import SharedStepCosts
from cards_integrations.errors import CardsError, ModelError, SettingsError, said
from cards_integrations.models.base import Boundary, Context, LanguageModel, StepwiseModel
from cards_integrations.transformer.kv_memory import KVMemory
from cards_integrations.transformer.step_times import StepTimes

MAX_REMOTE = 64  # candidates of one request in a server, at most
REMOTE_STEP = StepTimes({1: 1.0, 16: 2.0})  # not seconds: a relative cost, so that few candidates are drafted in vain
ROUND_TRIP = StepTimes({1: 4.0, 2: 4.0})  # in the same unit: each round of drafts is a call of the server
log = logging.getLogger("cards_integrations")


class StepLoop:
    """All live requests, and the steps that they share. Implements `SessionHost`.

    Args:
        language_model: Where candidates are drafted.
        width: Candidates of a request at once, or "auto" (see `EngineSettings.width`).
        memory: The budget of all caches.
        on_failure: Called when the loop cannot go on.
    """

    def __init__(
        self, language_model: LanguageModel, width: int | str, memory: KVMemory,
        on_failure: Callable[[CardsError], None],
    ) -> None:  # fmt: skip
        self.language_model = language_model
        self.stepwise = language_model if isinstance(language_model, StepwiseModel) else None
        self.scheduler = self._schedule(width)
        self.scoring = Scoring(self.wake, self.memory_freed)
        self.live: dict[Context, Session] = {}  # in order of arrival
        self.preemption = Preemption(memory, self.live, self.stepwise)
        self._on_failure = on_failure
        self._work = asyncio.Event()

    def wake(self) -> None:
        """Note that there is something new to draft or to score."""
        self.preemption.stalled = self.preemption.held_back = False
        self._work.set()

    def memory_freed(self) -> None:
        """Note that less memory is held or promised than before: a request has ended, or a reward is known."""
        self.preemption.freed.set()
        self.wake()

    @property
    def measured_times(self) -> dict[int, float]:
        """Seconds of a step by its number of candidates; empty if that was not measured."""
        if self.stepwise is None or not isinstance(self.scheduler, BestPerSecond):
            return {}
        return self.scheduler.times.measured

    def step_costs(self, scoring: StepTimes) -> SharedStepCosts:
        """Return what steps cost now, with a reward model that takes these times."""
        if self.stepwise is None:
            return SharedStepCosts(REMOTE_STEP, ROUND_TRIP, len(self.live))
        if not isinstance(self.scheduler, BestPerSecond):
            raise SettingsError(
                "A budget of time goes by the times of steps, which are measured with EngineSettings(width='auto') "
                "only: use that, or a budget of tokens such as Cascade(budget='tokens:5'), or Cascade(plan=...)."
            )
        return SharedStepCosts(self.scheduler.times, scoring, len(self.live))

    def vacancies(self, context: Context, boundary: Boundary) -> int:
        """Return for how many more candidates of a request there is memory."""
        return MAX_REMOTE if self.stepwise is None else self.stepwise.vacancies(context, boundary)

    async def run(self) -> None:
        """Take steps for ever."""
        while True:
            await self._work.wait()
            try:
                turns = self.step()
            except BaseException as error:  # SystemExit would end this thread
                try:
                    self._fail(error)
                except BaseException as again:
                    return self._give_up(again)
                turns = 0
            if turns == 0:
                self._work.clear()
            for _ in range(max(1, turns)):
                await asyncio.sleep(0)

    def step(self) -> int:
        """Take one step: a forward, or what has to come before it.

        Returns:
            How many turns of the event loop methods and reward models get before the next step; 0 if there is nothing
            to do.
        """
        if self._sample():
            return 1  # methods that need no reward go on, and new requests may take the place of ended ones
        self.preemption.resume()
        candidates = self.scheduler.candidates(self.preemption.running)
        if self._sample():
            return 1
        candidates = self.preemption.to_draft(candidates)
        idle = self.stepwise is None or not self.stepwise.has_unread(candidates)
        if self._scores_wait() and (idle or self.scheduler.score_now(self.preemption.running)):
            preempted, asking = self.preemption.count, self.preemption.to_score()
            if asking:
                self.scoring.dispatch([session.scores for session in asking if session.scores])
                return 2  # the rewards score, and then the methods react
            if self.preemption.count > preempted:
                return 1  # the candidates of a preempted request have no part in this step
        if idle:
            return 0
        self.stepwise.forward(candidates)  # type: ignore[union-attr]  # it is not idle
        return 1

    def _sample(self) -> bool:
        """Sample a token of each candidate; True if one has ended."""
        ended = self.language_model.sample()
        for candidate in ended:
            session = self.live.get(candidate.context)
            if session is not None and candidate.error is not None:
                session.fail(candidate.error)
            elif session is not None:
                with session.pool.own_errors():
                    session.pool.candidate_ended(candidate)
        return bool(ended)

    def _scores_wait(self) -> bool:
        return any(session.scores and session.scores.waiting for session in self.preemption.running)

    def _fail(self, error: BaseException) -> None:
        """Let an error in the model's forward reach all live requests; the next request finds clean rows."""
        log.exception("the language model failed")
        wrapped = ModelError(f"The language model failed: {said(error)}")
        wrapped.__cause__ = error
        for session in self.live.values():
            session.fail(wrapped)
        if self.stepwise is not None:
            self.stepwise.reset()

    def _give_up(self, error: BaseException) -> None:
        """Tell every request that nothing can be drafted any more."""
        failure = ModelError(f"The engine cannot go on: {said(error)}")
        self._on_failure(failure)
        for session in self.live.values():
            session.fail(failure)

    def _schedule(self, width: int | str) -> Scheduler:
        if isinstance(width, int):
            return FixedWidth(width)
        return BestPerSecond(REMOTE_STEP if self.stepwise is None else self.stepwise.step_times())
