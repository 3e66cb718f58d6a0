"""What runs in the next step: which candidates are drafted, and whether rewards are scored first.

None of it changes a text: a method looks at the candidates of a segment in index order, whatever was
drafted when. It decides only how much is drafted that nobody will look at, and how long one waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from cards_integrations.models.base import Candidate
from cards_integrations.session import Drafts, Pending, Question, Session


class Scheduler(Protocol):
    def candidates(self, sessions: Iterable[Session]) -> list[Candidate]:
        """Those to draft in the next step; begins new ones."""

    def score_now(self, questions: Sequence[Question], sessions: int) -> bool:
        """Score these, or take one more step first and see more of them come?"""

    def took(self, what: Literal["step", "scoring"], seconds: float) -> None:
        """How long the last one took."""


class FixedWidth:
    """So many candidates of the open segment of every request, and each scored at once."""

    def __init__(self, width: int) -> None:
        self.width = width

    def candidates(self, sessions: Iterable[Session]) -> list[Candidate]:
        chosen = []
        for session in sessions:
            drafts = session.drafting
            if drafts is not None:
                while len(drafts.ahead) < self.width and drafts.begun < drafts.plan.limit:
                    drafts.begin()
                chosen += [pending.candidate for pending in drafts.ahead if not pending.ended]
        return chosen

    def score_now(self, questions: Sequence[Question], sessions: int) -> bool:
        return True

    def took(self, what: Literal["step", "scoring"], seconds: float) -> None: ...


class StepTimes:
    """Seconds of a step by number of candidates, between and beyond the measured points."""

    def __init__(self, measured: dict[int, float]) -> None:
        self.rows = np.array(sorted(measured))
        self.seconds = np.maximum.accumulate([measured[n] for n in self.rows])

    def upto(self, rows: int) -> NDArray[np.float64]:
        """For 1, 2, ... `rows` candidates."""
        n = np.arange(1, rows + 1)
        slope = (self.seconds[-1] - self.seconds[-2]) / (self.rows[-1] - self.rows[-2])
        beyond = np.maximum(0, n - self.rows[-1]) * slope
        seconds: NDArray[np.float64] = np.interp(n, self.rows, self.seconds) + beyond
        return seconds


class BestPerSecond:
    """The candidates that are most probably looked at, as many as make the most of a step.

    With the probabilities P_1 >= P_2 >= ... of being looked at, and the time t(n) of a step with n
    candidates, n maximises (P_1 + ... + P_n) / t(n). Scoring costs about the same for one response
    as for many, so it begins when the requests that wait for it have waited as long as it takes,
    each weighted with its share of the step.
    """

    def __init__(self, times: StepTimes) -> None:
        self.times = times
        self.seconds = {"step": 0.0, "scoring": 0.0}
        self.waited = 0.0

    def candidates(self, sessions: Iterable[Session]) -> list[Candidate]:
        found: list[tuple[float, Drafts, Pending | None]] = []
        for session in sessions:
            if session.drafting is not None:
                found += session.drafting.prospects(1.0, session.rate.value)
        if not found:
            return []
        found.sort(key=lambda prospect: -prospect[0])
        gain = np.cumsum([reach for reach, *_ in found])
        best = int(np.argmax(gain / self.times.upto(len(found)))) + 1
        return [(pending or drafts.begin()).candidate for _, drafts, pending in found[:best]]

    def score_now(self, questions: Sequence[Question], sessions: int) -> bool:
        waiting = sum(question.blocks for question in questions)
        self.waited += waiting / sessions * self.seconds["step"]
        if self.waited < self.seconds["scoring"]:
            return False
        self.waited = 0.0
        return True

    def took(self, what: Literal["step", "scoring"], seconds: float) -> None:
        self.seconds[what] += 0.1 * (seconds - self.seconds[what])
