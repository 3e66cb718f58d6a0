"""What runs in the next step: which candidates are drafted, and whether rewards are scored first.

None of it changes a text: a method looks at the candidates of a segment in index order, whatever was
drafted when. It decides only how much is drafted that nobody will look at, and how long one waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cards_integrations.models.base import Candidate
from cards_integrations.session import Drafts, Pending, Question, Session


class Scheduler(Protocol):
    def candidates(self, sessions: Iterable[Session]) -> list[Candidate]:
        """Those to draft in the next step; begins new ones."""

    def score_now(self, questions: Sequence[Question], sessions: int) -> bool:
        """Score these, or take one more step first and see more of them come?"""

    def stepped(self, seconds: float, candidates: int) -> None:
        """How long the last step took, with all that belongs to it but scoring."""

    def scored(self, seconds: float, tokens: int) -> None:
        """How long the last scoring took."""


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

    def stepped(self, seconds: float, candidates: int) -> None: ...

    def scored(self, seconds: float, tokens: int) -> None: ...


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


class Line:
    """seconds = fixed + each * size, fitted to what was measured; the past fades."""

    def __init__(self, fade: float = 0.05) -> None:
        self.fade = fade
        self.weight = self.x = self.y = self.xx = self.xy = 0.0

    def add(self, size: float, seconds: float) -> None:
        keep = 1 - self.fade
        self.weight = keep * self.weight + self.fade
        self.x = keep * self.x + self.fade * size
        self.y = keep * self.y + self.fade * seconds
        self.xx = keep * self.xx + self.fade * size * size
        self.xy = keep * self.xy + self.fade * size * seconds

    @property
    def each(self) -> float:
        spread = self.weight * self.xx - self.x**2
        slope = (self.weight * self.xy - self.x * self.y) / spread if spread > 0 else 0.0
        return max(0.0, min(slope, self.y / self.x if self.x else 0.0))

    @property
    def fixed(self) -> float:
        return (self.y - self.each * self.x) / self.weight if self.weight else 0.0


class BestPerSecond:
    """The candidates that are most probably looked at, as many as make the most of a step.

    With the probabilities P_1 >= P_2 >= ... of being looked at, and the time t(n) of a step with n
    candidates, n maximises (P_1 + ... + P_n) / t(n). Besides the forward, t(n) has what else each
    candidate was seen to cost a step, and the scoring of its token.

    Scoring has a fixed cost, too, so it begins when the requests that wait for it have waited as
    long as that takes, each weighted with its share of the step.
    """

    def __init__(self, times: StepTimes) -> None:
        self.times = times
        self.besides = Line()
        self.scoring = Line()
        self.step = 0.0
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
        each = self.besides.each + self.scoring.each
        seconds = self.times.upto(len(found)) + self.besides.fixed + each * np.arange(1, len(found) + 1)
        best = int(np.argmax(gain / seconds)) + 1
        return [(pending or drafts.begin()).candidate for _, drafts, pending in found[:best]]

    def score_now(self, questions: Sequence[Question], sessions: int) -> bool:
        waiting = sum(question.blocks for question in questions)
        self.waited += waiting / sessions * self.step
        if self.waited < self.scoring.fixed:
            return False
        self.waited = 0.0
        return True

    def stepped(self, seconds: float, candidates: int) -> None:
        self.step += 0.1 * (seconds - self.step)
        self.besides.add(candidates, max(0.0, seconds - self.times.upto(candidates)[-1]))

    def scored(self, seconds: float, tokens: int) -> None:
        self.scoring.add(tokens, seconds)
