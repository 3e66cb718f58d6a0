"""What runs in the next step: by the times that were measured, and the chance that a candidate is examined."""

from __future__ import annotations

import json
import math
import platform
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import internals
import numpy as np
import pytest
import tiny
from conftest import Start

from cards_integrations.chat.stop_strings import StopStrings
from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.chat.tool_formats import FORMATS
from cards_integrations.chat.tool_reader import ToolReader
from cards_integrations.decoding import BestOfN, FixedLength
from cards_integrations.engine import Request, idle
from cards_integrations.engine.draft_pool import MIN_REACH, PendingDraft, SegmentDrafts
from cards_integrations.engine.scheduler import BestPerSecond
from cards_integrations.engine.session import AcceptanceRate, Session
from cards_integrations.engine.step_costs import SharedStepCosts
from cards_integrations.errors import CardsError
from cards_integrations.models.base import Context
from cards_integrations.models.local.language_model import LocalLanguageModel
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.settings import Placement
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward, Conversation, FunctionReward, RewardLoader
from cards_integrations.trace import Usage
from cards_integrations.transformer.step_times import POINTS, StepTimes, confirm, is_plausible, step_times

# --- times ---


def test_step_times_between_and_beyond_the_measured_ones() -> None:
    seconds = StepTimes({16: 2.5, 1: 1.0, 64: 7.3}).upto(100)
    assert len(seconds) == 100
    assert [seconds[n - 1] for n in (1, 8, 16, 40, 64, 100)] == pytest.approx([1.0, 1.7, 2.5, 4.9, 7.3, 10.9])


def test_a_larger_step_is_never_held_to_be_shorter() -> None:
    seconds = StepTimes({1: 2.0, 16: 1.5, 64: 1.8}).upto(200)
    assert (np.diff(seconds) >= 0).all()
    assert seconds[-1] == 2.0


def test_step_times_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cards_integrations.transformer.step_times.cache_dir", lambda: tmp_path / "new")
    model, asked = tiny.causal(), []

    def measure(tokens: int) -> float:
        asked.append(tokens)
        return 0.5 + tokens

    found = [step_times(what, model, measure).upto(70).tolist() for what in ("drafting", "drafting", "scoring")]
    assert asked == [*POINTS, *POINTS]
    assert found[0] == found[1] == [0.5 + n for n in range(1, 71)]
    (tmp_path / "new" / "step_times.json").write_text("{ half a fi")
    assert step_times("drafting", model, measure).upto(70).tolist() == found[0]
    assert asked == [*POINTS, *POINTS, *POINTS]


@pytest.mark.parametrize("damage", ["list", "no times", "no numbers", "not a number", "other points", "no seconds"])
def test_damaged_step_times_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setenv("CARDS_CACHE_DIR", str(tmp_path))
    model, file = tiny.causal(), tmp_path / "step_times.json"
    expected = step_times("drafting", model, float).upto(70).tolist()
    whole = file.read_text()
    [key] = json.loads(whole)
    damaged: dict[str, Any] = {
        "list": [key],
        "no times": {key: None},
        "no numbers": {key: {"1": "long", "16": [], "64": {}}},
        "not a number": {key: {"1": math.nan, "16": 16.0, "64": 64.0}},
        "other points": {key: {"1": 1.0}},
        "no seconds": {key: dict.fromkeys(map(str, POINTS), 0.0)},
    }
    file.write_text(json.dumps(damaged[damage]))
    assert step_times("drafting", model, float).upto(70).tolist() == expected
    assert file.read_text() == whole


SLOW = {1: 0.40, 16: 0.21, 64: 0.81, 256: 2.4}  # on a busy machine
FAST = {1: 0.040, 16: 0.055, 64: 0.064, 256: 0.19}  # the same, on a quiet one


@pytest.fixture
def remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CARDS_CACHE_DIR", str(tmp_path))
    return tmp_path / "step_times.json"


@pytest.mark.parametrize(
    ("seconds", "right"),
    [(FAST, True), (SLOW, False), ({1: 1, 16: 16, 64: 64}, True), ({1: 1, 16: 40, 64: 64}, False),
     ({1: 1, 16: 0.9, 64: 0.85}, True), ({1: 1, 16: 1.1, 64: 0.7}, False)],
)  # fmt: skip
def test_what_cannot_be_right(seconds: dict[int, float], right: bool) -> None:
    assert is_plausible(seconds) == right


def test_what_cannot_be_right_is_measured_again(remembered: Path) -> None:
    tries = iter([SLOW, FAST])
    now: dict[int, float] = {}

    def measure(tokens: int) -> float:
        if tokens == 1:
            now.update(next(tries))
        return now[tokens]

    assert step_times("drafting", tiny.causal(), measure).fixed == FAST[1]
    [(key, found)] = json.loads(remembered.read_text()).items()
    assert found == {str(n): seconds for n, seconds in FAST.items()}
    remembered.write_text(json.dumps({key: SLOW}))  # as an earlier version has left it
    assert step_times("drafting", tiny.causal(), FAST.__getitem__).fixed == FAST[1]


def test_what_is_far_off_is_thrown_away_when_nothing_runs(remembered: Path) -> None:
    times = step_times("drafting", tiny.causal(), lambda n: 10 * FAST[n])
    assert times.fixed == 10 * FAST[1]
    measured = [lambda: FAST]
    times.unconfirmed = measured[0], times.unconfirmed[1]  # type: ignore[index]
    confirm(times, lambda: False)  # a request came
    assert times.fixed == 10 * FAST[1]
    confirm(times, lambda: True)
    assert times.fixed == FAST[1]
    confirm(times, lambda: pytest.fail("it is measured once"))
    assert step_times("drafting", tiny.causal(), lambda n: 99.0).fixed == FAST[1]


def test_what_is_about_the_same_stays(remembered: Path) -> None:
    times = step_times("drafting", tiny.causal(), FAST.__getitem__)
    assert times.unconfirmed is not None
    times.unconfirmed = (lambda: {n: seconds / 1.2 for n, seconds in FAST.items()}), times.unconfirmed[1]
    confirm(times, lambda: True)
    assert times.fixed == FAST[1]


def test_what_is_measured_while_the_engine_closes_is_not_told(
    start: Start, models: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    """Weights are freed at once; the thread that measures with them finds it out."""
    engine = start(models("llama"))
    drafting = internals.language_model(engine)
    engine.close()
    for measure in (drafting._time, drafting.transformer.time):
        with pytest.raises(CardsError):
            measure(16)
    assert caplog.records == []


def test_step_times_are_those_of_a_machine_and_not_of_a_container(
    remembered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_times("drafting", tiny.causal(), FAST.__getitem__)
    monkeypatch.setattr(platform, "node", lambda: "3f2a9c77b1d0")
    assert step_times("drafting", tiny.causal(), lambda n: 99.0).fixed == FAST[1]
    assert platform.node() not in remembered.read_text()


def test_processes_write_beside_each_other(remembered: Path) -> None:
    """Each has read the file before the others have written."""

    def others(tokens: int) -> float:
        if tokens == 64:
            step_times("scoring", tiny.causal(), FAST.__getitem__)
            step_times("drafting", tiny.causal(), lambda n: FAST[n] / 2)
        return FAST[tokens]

    assert step_times("drafting", tiny.causal(), others).fixed == FAST[1] / 2
    assert len(json.loads(remembered.read_text())) == 2
    assert step_times("scoring", tiny.causal(), lambda n: 99.0).fixed == FAST[1]


def test_an_idle_engine_measures_again(
    start: Start, models: Callable[..., str], remembered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idle, "IDLE_AFTER", 0.05)
    engine = start(models("llama"))
    judge = ClassifierReward(model=models("llama", classifier=True))
    asked = Request("w9", BestOfN(n=2), judge, max_tokens=3, seed=1)
    engine.loaded()
    [key] = json.loads(remembered.read_text())
    engine.close()
    remembered.write_text(json.dumps({key: dict.fromkeys(POINTS, 1000.0)}))
    engine = start(models("llama"))
    engine.loaded()
    times = internals.scheduler(engine).times  # type: ignore[attr-defined]
    assert times.fixed == 1000.0
    text = engine.run(asked).text
    internals.wait_until(lambda: times.fixed < 100.0)
    internals.wait_until(lambda: times.unconfirmed is None)
    assert engine.run(asked).text == text


# --- the choice ---


class Offered:
    """A request with candidates of given chances to be examined; some of them have begun."""

    def __init__(self, chances: list[float], begun: int, scoring: StepTimes) -> None:
        self.chances = chances
        self.begun = begun
        self.pool = self
        self.current = self
        self.acceptance_rate = AcceptanceRate()
        self.seconds_to_score = scoring
        self.scores = SimpleNamespace(waiting=[], pending=False)
        self.certain = 1
        self.blocked = 0.0

    def waiting(self, rate: float) -> float:
        return self.blocked

    def own_errors(self) -> Any:
        return nullcontext()

    def ranked_candidates(self, reach: float, rate: float) -> Iterator[tuple[float, Offered, Any]]:
        for index, chance in enumerate(self.chances):
            yield chance, self, SimpleNamespace(candidate=chance) if index < self.begun else None

    def begin(self) -> Any:
        self.begun += 1
        return SimpleNamespace(candidate=self.chances[self.begun - 1])


def test_the_most_gain_per_second_is_chosen() -> None:
    """Against all numbers of candidates, with made-up times of drafting and of scoring."""
    dice, sizes = random.Random(0), set()
    for _ in range(200):
        first, second, each = dice.random(), dice.random(), dice.random() / 20
        times = StepTimes({1: first, 16: first + second, 64: first + second + 1})
        scoring = StepTimes({1: 5.0, 16: 5.0 + 15 * each, 64: 5.0 + 63 * each})
        chances = [
            sorted((dice.random() ** 2 for _ in range(dice.randint(1, 12))), reverse=True)
            for _ in range(dice.randint(1, 5))
        ]
        sessions: Any = [Offered(row, dice.randint(0, len(row)), scoring) for row in chances]
        idle: Any = SimpleNamespace(pool=SimpleNamespace(current=None), scores=None)
        chosen: list[Any] = BestPerSecond(times).candidates([*sessions, idle])

        best = sorted((chance for row in chances for chance in row), reverse=True)
        gains = [sum(best[:n]) / (times.upto(n)[-1] + each * n) for n in range(1, len(best) + 1)]
        assert chosen == best[: len(chosen)]
        assert len(chosen) == max(n for n, gain in enumerate(gains, 1) if gain >= 0.95 * max(gains))
        sizes.add(len(chosen))
    assert len(sizes) > 10


def test_nothing_is_chosen_where_nothing_is_drafted() -> None:
    assert BestPerSecond(StepTimes({1: 1.0, 2: 1.0})).candidates([]) == []


def test_the_improbable_waits_for_verdicts_that_this_device_computes() -> None:
    linear, free = StepTimes({1: 1.0, 16: 16.0}), StepTimes({1: 0.0, 2: 0.0})
    wide = StepTimes({1: 1.0, 16: 1.01})
    for steps, chance, pending, costs, drafted in (
        (linear, 0.1, True, linear, False),
        (linear, 0.9, True, linear, True),  # it will be needed most probably
        (linear, 0.1, False, linear, True),  # nothing would come sooner
        (linear, 0.1, True, free, True),  # scored elsewhere
        (wide, 0.1, True, wide, True),  # forty for the price of one
    ):
        ahead: Any = Offered([chance] * 40, 0, costs)
        ahead.scores.pending = pending
        assert bool(BestPerSecond(steps).candidates([ahead])) == drafted


# --- scoring now, or later with others ---


def steps_until_scored(scheduler: BestPerSecond, waiting: float, sessions: int, scoring: float) -> int:
    """How many steps are taken before rewards are scored that hold up so many requests."""
    session = Offered([1.0], 1, StepTimes({1: scoring, 64: scoring}))
    session.scores.waiting, session.blocked = [0, 1, 2], waiting
    others = [SimpleNamespace(scores=None) for _ in range(sessions - 1)]
    live: Any = [session, *others]
    for steps in range(100):
        if scheduler.score_now(live):
            return steps
        scheduler.candidates(live[:1])
    return 100


@pytest.mark.parametrize(
    ("waiting", "sessions", "steps"),
    [(1, 1, 4), (8, 8, 4), (1, 2, 8), (4, 16, 16), (0.5, 1, 8), (0, 1, 100)],
    ids=["all", "all of many", "half", "a quarter", "perhaps", "nobody"],
)
def test_scoring_waits_until_waiting_has_cost_as_much(waiting: float, sessions: int, steps: int) -> None:
    """A step takes a quarter of the seconds that scoring takes at least; nothing is lost before the first."""
    scheduler = BestPerSecond(StepTimes({1: 0.25, 64: 0.25}))
    assert steps_until_scored(scheduler, waiting, sessions, scoring=1.0) == steps
    assert scheduler.waited == 0 or not waiting


@pytest.mark.parametrize("waiting", [0, 1])
def test_a_score_that_costs_nothing_is_asked_for_at_once(waiting: int) -> None:
    assert steps_until_scored(BestPerSecond(StepTimes({1: 1.0, 64: 2.0})), waiting, 1, scoring=0.0) == 0


# --- chances ---


def test_the_acceptance_rate_begins_with_a_quarter() -> None:
    rate = AcceptanceRate()
    assert rate.value == 0.25
    rate.update(4, passed=True)
    assert rate.value == 2 / 8
    rate.update(2, passed=False)
    assert rate.value == 2 / 10


class Host:
    """What a session needs of the engine, with a real language model."""

    def __init__(self) -> None:
        self.language_model = LocalLanguageModel(
            tiny.causal(eos_token_id=None), ChatTokenizer(tiny.words(eos_token=None)), "tiny"
        )

    def wake(self) -> None: ...

    def step_costs(self, scoring: StepTimes) -> SharedStepCosts:
        return SharedStepCosts(scoring, scoring, 1)

    def vacancies(self, context: Context, boundary: Any) -> int:
        return self.language_model.vacancies(context, boundary)

    def session(self) -> Session:
        """A request that waits for its rewards for ever."""
        context = Context("w9 w20", [9, 20], 20, Sampler(), StopStrings(), Usage())
        judge = FunctionReward(function=max).build(RewardLoader(ModelLoader(Placement())))
        return Session(
            self,
            context,
            0,
            Conversation(context.prompt, context.usage),
            judge,
            None,
            None,
            ToolReader(None, FORMATS["json"]),
        )

    def finish(self, drafts: SegmentDrafts, pending: PendingDraft) -> None:
        while not pending.ended:
            self.language_model.forward([pending.candidate])
            for candidate in self.language_model.sample():
                drafts.pool.candidate_ended(candidate)


def chances(drafts: SegmentDrafts, rate: float = 0.25) -> list[tuple[int, PendingDraft | None, float]]:
    return [(offer.number, pending, reach) for reach, offer, pending in drafts.ranked_candidates(1.0, rate)]


async def test_the_chance_that_a_candidate_is_examined() -> None:
    """All before it in its segment were rejected, and the one that it follows was not."""
    host = Host()
    drafts = host.session().drafts(FixedLength(length=2), limit=3, passes=lambda draft: draft.reward > 0)
    falling = [1, 0.75, 0.75**2]
    assert chances(drafts) == [(0, None, reach) for reach in falling]

    first, second = drafts.begin(), drafts.begin()
    assert chances(drafts) == [(0, first, 1), (0, second, 0.75), (0, None, 0.75**2)]

    host.finish(drafts, first)  # has no reward yet: others may follow it, if it passes
    kept = 0.25 + 0.75**3 / 3  # it passes, or all fail and it is the best
    after_first = [(1, None, kept * reach) for reach in falling]
    assert chances(drafts) == [*after_first, (0, second, 0.75), (0, None, 0.75**2)]

    first.score.set_result(-1.0)  # kept if the two others have less
    after_first = [(1, None, 0.75**2 / 3 * reach) for reach in falling]
    assert chances(drafts) == [(0, second, 1), *after_first, (0, None, 0.75)]

    host.finish(drafts, second)
    second.score.set_result(1.0)
    assert chances(drafts) == [(1, None, reach) for reach in falling]

    assert second.next_segment is not None
    child = second.next_segment.begin()
    assert child.candidate.before == second.candidate.ids
    host.finish(second.next_segment, child)
    assert child.response is not None  # it is scored as soon as only the turn of what it follows is missing
    expected = [(2, None, kept * reach) for reach in falling] + [(1, None, 0.75), (1, None, 0.75**2)]
    assert chances(drafts) == expected


async def test_what_follows_a_candidate_without_a_reward_is_not_scored() -> None:
    host = Host()
    drafts = host.session().drafts(FixedLength(length=2), limit=3, passes=lambda draft: draft.reward > 0)
    first, second = drafts.begin(), drafts.begin()
    host.finish(drafts, second)
    chances(drafts)
    assert second.next_segment is not None
    child = second.next_segment.begin()
    host.finish(second.next_segment, child)
    assert child.response is None
    second.score.set_result(1.0)
    chances(drafts)
    assert (first.ended, child.response is None) == (False, False)


async def test_the_best_of_the_rejected_is_followed_before_all_are_examined() -> None:
    """Whichever of the four is the best is kept: of those that are known, each with a quarter."""
    host = Host()
    session = host.session()
    drafts = session.drafts(FixedLength(length=2), limit=4, passes=lambda draft: draft.reward > 0)
    pending = [drafts.begin() for _ in range(4)]
    for each, reward in zip(pending[:3], [-3.0, -1.0, -2.0], strict=True):
        host.finish(drafts, each)
        each.score.set_result(reward)
    follows_best = [(1, None, 0.75 * 3 / 4 * 0.75**n) for n in range(4)]
    assert chances(drafts) == [(0, pending[3], 1), *follows_best]
    assert [each.next_segment is not None for each in pending] == [False, True, False, False]
    for _ in range(3):  # the same after they have been examined
        session.reject(await anext(drafts))
    assert chances(drafts) == [(0, pending[3], 1), *follows_best]
    host.finish(drafts, pending[3])
    pending[3].score.set_result(-0.5)
    assert chances(drafts) == [(1, None, 0.75**n) for n in range(4)]
    session.reject(await anext(drafts))
    ahead = pending[3].next_segment
    await session.keep_best()
    assert session.drafts(FixedLength(length=2), limit=4, passes=drafts.plan.passes) is ahead


async def test_the_chance_that_an_answer_waits_for_rewards() -> None:
    host = Host()
    session = host.session()
    assert session.pool.waiting(0.25) == 1.0  # for the reward of the prompt
    drafts = session.drafts(FixedLength(length=2), limit=3, passes=lambda draft: draft.reward > 0)
    first, second = drafts.begin(), drafts.begin()
    assert session.pool.waiting(0.25) == 0.0
    host.finish(drafts, second)
    best = 0.75**3 / 3  # of three that all fail
    assert session.pool.waiting(0.25) == 0.75 * 0.25 + best
    host.finish(drafts, first)
    assert session.pool.waiting(0.25) == 0.25 + 0.75 * 0.25 + 2 * best
    first.score.set_result(1.0)
    assert session.pool.waiting(0.25) == 0.0
    chances(drafts)
    assert first.next_segment is not None
    host.finish(first.next_segment, first.next_segment.begin())
    assert session.pool.waiting(0.25) == 0.25 + best


@pytest.mark.parametrize("rate", [0.0, 0.04, 0.25])
async def test_an_answer_waits_for_certain_if_all_of_its_candidates_do(rate: float) -> None:
    host = Host()
    session = host.session()
    drafts = session.drafts(FixedLength(length=2), limit=3, passes=lambda draft: draft.reward > 0)
    for pending in [drafts.begin() for _ in range(3)]:
        host.finish(drafts, pending)
    assert session.pool.waiting(rate) == pytest.approx(1)


async def test_what_is_hardly_examined_is_not_drafted() -> None:
    drafts = Host().session().drafts(FixedLength(length=2), limit=100, passes=lambda draft: True)
    assert [reach for _, _, reach in chances(drafts)] == [0.75**n for n in range(100) if 0.75**n >= MIN_REACH]


async def test_a_method_that_looks_at_everything_is_sure_of_all() -> None:
    host = Host()
    drafts = host.session().drafts(FixedLength(length=2), limit=4)
    assert chances(drafts) == [(0, None, 1)] * 4
    first = drafts.begin()
    host.finish(drafts, first)
    assert chances(drafts)[:4] == [(1, None, 0.25)] * 4  # one of the four is kept
    assert chances(drafts)[4:] == [(0, None, 1)] * 3
