"""What runs in the next step: which candidates are drafted, and whether rewards are scored first.

None of it changes a text: a method looks at the candidates of a segment in index order, whatever was
drafted when. It decides only how much is drafted that nobody will look at, and how long one waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from cards_integrations.engine.draft_pool import Drafts, Pending, Question
from cards_integrations.engine.session import Session
from cards_integrations.models.base import Candidate
from cards_integrations.transformer.step_times import StepTimes


class Scheduler(Protocol):
    def candidates(self, sessions: Iterable[Session]) -> list[Candidate]:
        """Those to draft in the next step; begins new ones."""

    def score_now(self, questions: Sequence[Question], sessions: int) -> bool:
        """Score these, or take one more step first and see more of them come?"""


class FixedWidth:
    """So many candidates of the open segment of every request, and each scored at once."""

    def __init__(self, width: int) -> None:
        self.width = width

    def candidates(self, sessions: Iterable[Session]) -> list[Candidate]:
        chosen = []
        for session in sessions:
            drafts = session.drafting
            if drafts is not None:
                while len(drafts.ahead) < self.width and drafts.vacancies > 0:
                    drafts.begin()
                chosen += [pending.candidate for pending in drafts.ahead if not pending.ended]
        return chosen

    def score_now(self, questions: Sequence[Question], sessions: int) -> bool:
        return True


class BestPerSecond:
    """The candidates that are most probably looked at, as many as make the most of a step.

    With the probabilities P_1 >= P_2 >= ... of being looked at, and the time t(n) of a step with n
    candidates and of the scoring of their tokens, n maximises (P_1 + ... + P_n) / t(n).

    Scoring has a fixed cost, too, so it begins when the requests that wait for it have waited as
    long as that takes, each weighted with its share of the steps.
    """

    def __init__(self, times: StepTimes) -> None:
        self.times = times
        self.step = 0.0  # seconds of the last one
        self.waited = 0.0

    def candidates(self, sessions: Iterable[Session]) -> list[Candidate]:
        found: list[tuple[float, Drafts, Pending | None]] = []
        scoring = 0.0
        for session in sessions:
            if session.drafting is not None:
                found += session.drafting.prospects(1.0, session.rate.value)
                scoring = max(scoring, session.seconds_to_score.per_token)
        if not found:
            return []
        found.sort(key=lambda prospect: -prospect[0])
        gain = np.cumsum([reach for reach, *_ in found])
        drafting = self.times.upto(len(found))
        n = int(np.argmax(gain / (drafting + scoring * np.arange(1, len(found) + 1)))) + 1
        self.step = float(drafting[n - 1])
        return [(pending or drafts.begin()).candidate for _, drafts, pending in found[:n]]

    def score_now(self, questions: Sequence[Question], sessions: int) -> bool:
        self.waited += sum(question.blocks for question in questions) / sessions * self.step
        if self.waited < max(question.session.seconds_to_score.fixed for question in questions):
            return False
        self.waited = 0.0
        return True
