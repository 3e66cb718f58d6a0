"""What runs in the next step: which candidates are drafted, and whether rewards are scored first.

This changes no text: a method examines the candidates of a segment in index order, whenever they were drafted. It
only decides how much is drafted in vain, and how long a request waits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np

from cards_integrations.engine.draft_pool import RankedCandidate, SegmentDrafts
from cards_integrations.engine.session import Session
from cards_integrations.models.base import Candidate
from cards_integrations.transformer.step_times import StepTimes

NEARLY = 0.95  # share of the highest gain per second that is good enough
PROBABLE = 0.5  # a candidate that is examined with at least this probability is always drafted


class Scheduler(Protocol):
    """Decides what a step does."""

    def candidates(self, sessions: Collection[Session]) -> list[Candidate]:
        """Choose the candidates to draft in the next step, and begin new ones."""

    def score_now(self, sessions: Collection[Session]) -> bool:
        """Decide whether to score now what waits for rewards, or to take another step first and score more at once."""


class FixedWidth:
    """Drafts a fixed number of candidates of every request's open segment, and scores each at once."""

    def __init__(self, width: int) -> None:
        self.width = width

    def candidates(self, sessions: Collection[Session]) -> list[Candidate]:
        chosen: list[Candidate] = []
        for session in sessions:
            drafts = session.pool.current
            if drafts is not None:
                if len(drafts.ahead) < self.width:
                    self._begin(drafts)
                chosen += drafts.drafting
        return chosen

    def _begin(self, drafts: SegmentDrafts) -> None:
        with drafts.pool.own_errors():
            while len(drafts.ahead) < self.width and drafts.vacancies > 0:
                drafts.begin()

    def score_now(self, sessions: Collection[Session]) -> bool:
        return True


class BestPerSecond:
    """Drafts the candidates that are most probably examined, as many as gain the most per second.

    Let P_1 >= P_2 >= ... be the probabilities that candidates are examined, and t(n) the time of a step with n
    candidates and of scoring their tokens. Then n is the largest number at which (P_1 + ... + P_n) / t(n) is highest,
    or nearly so: t(n) was measured on one text, while each step also has to read the texts of several requests.

    Drafting delays scores that this device has yet to compute. Once these are known, m candidates will be needed for
    certain. So if no candidate is probable before that, and (P_1 + ... + P_n) / t(n) < m / t(m), nothing is drafted.

    A call of the reward model has a fixed cost. It is made when the requests have waited for that long: a step counts
    with the probability that an answer goes on with a candidate whose reward is not known yet, divided by the number
    of requests.

    Args:
        times: Seconds of a step by its number of candidates.
    """

    def __init__(self, times: StepTimes) -> None:
        self.times = times
        self.step = 0.0  # seconds of the last step
        self.waited = 0.0  # seconds that requests have waited for rewards, as above

    def candidates(self, sessions: Collection[Session]) -> list[Candidate]:
        ranked = self._ranked(sessions)
        chosen = []
        for _, drafts, pending in ranked[: self._width(ranked, sessions)]:
            if pending is not None:
                chosen.append(pending.candidate)
                continue
            with drafts.pool.own_errors():
                chosen.append(drafts.begin().candidate)
        return chosen

    def _ranked(self, sessions: Collection[Session]) -> list[RankedCandidate]:
        """Return what could be drafted, the most probably examined first."""
        found: list[RankedCandidate] = []
        for session in sessions:
            if session.pool.current is not None:
                with session.pool.own_errors():  # the method's `passes` is called
                    found += list(session.pool.current.ranked_candidates(1.0, session.acceptance_rate.value))
        return sorted(found, key=lambda candidate: -candidate[0])

    def _width(self, ranked: Sequence[RankedCandidate], sessions: Collection[Session]) -> int:
        """Return how many of the ranked candidates make the most of a step; 0 to wait for scores instead."""
        if not ranked:
            return 0
        scoring = max([0.0, *(s.seconds_to_score.per_token for s in sessions if s.pool.current is not None)])
        gain = np.cumsum([reach for reach, *_ in ranked])
        drafting = self.times.upto(len(ranked))
        rates = gain / (drafting + scoring * np.arange(1, len(ranked) + 1))
        n = int(np.flatnonzero(rates >= NEARLY * rates.max())[-1]) + 1
        if ranked[0][0] < PROBABLE:
            needed = sum(map(_needed_once_scored, sessions))
            if rates[n - 1] < needed / (self.times.at(needed) + scoring * needed):
                return 0
        self.step = float(drafting[n - 1])
        return n

    def score_now(self, sessions: Collection[Session]) -> bool:
        asking = [session for session in sessions if session.scores and session.scores.waiting]
        for session in asking:
            with session.pool.own_errors():  # the method's `passes` is asked
                self.waited += session.pool.waiting(session.acceptance_rate.value) / len(sessions) * self.step
        if self.waited < max(session.seconds_to_score.fixed for session in asking):
            return False
        self.waited = 0.0
        return True


def _needed_once_scored(session: Session) -> int:
    """Return how many candidates will be examined for certain once scores are known that this device has to compute."""
    drafts = session.pool.current
    waits = session.scores is not None and session.scores.pending and session.seconds_to_score.fixed > 0
    return drafts.certain if waits and drafts is not None else 0
