"""The scale of a reward is measured once, whoever waits for it; and the search rule that needs none."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import statistics
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import internals
import pytest
import tiny
from conftest import Start
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, optimize, stats

from cards_integrations.decoding import Cards, FixedLength, OptimalStopping, Sampling
from cards_integrations.decoding.base import Scale
from cards_integrations.decoding.stopping import pooled_std
from cards_integrations.engine import Engine, Request, scale_store, scales
from cards_integrations.errors import CardsTimeout, EngineClosed, RewardError
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import (
    ClassifierReward,
    FunctionReward,
    GateReward,
    LengthReward,
    MinReward,
    PatternReward,
    Reward,
    WeightedReward,
)
from cards_integrations.rewards.prompts import PLAIN, WITH_CONTEXT
from cards_integrations.trace import Alignment, Guidance

PROMPT = "w9 w20 w31 w5"
SEGMENTS = FixedLength(length=4)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where scales are remembered, empty at first."""
    monkeypatch.setattr(scale_store, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "scales"


@pytest.fixture
def judge(models: Callable[..., str]) -> ClassifierReward:
    return ClassifierReward(model=models("llama", classifier=True))


class Words:
    """A reward function, its score the number of words; it counts the prompts of measurements that it sees."""

    __name__ = "words"

    def __init__(self) -> None:
        self.measured: list[str] = []
        self.wait: threading.Event | None = None
        self.begun = threading.Event()
        self.broken = False
        self.found: list[float] = []

    def __call__(self, prompt: str, texts: list[str]) -> list[float]:
        if prompt == PROMPT or texts == [scales.TRIAL]:
            return [float(len(text.split())) for text in texts]
        self.begun.set()
        self.measured.append(prompt)
        if self.wait is not None:
            assert self.wait.wait(60)
        if self.broken:
            raise ZeroDivisionError("no idea")
        self.found += [float(len(text.split())) for text in texts]
        return self.found[-len(texts) :]


def request(reward: Reward, seed: int = 0, tokens: int = 12, **more: Any) -> Request:
    decoding = Cards(max_rejections=3, boundary=SEGMENTS)
    return Request(PROMPT, decoding, reward, Sampler(temperature=1.2), tokens, seed=seed, **more)


def scale_of(engine: Engine, reward: Reward) -> Scale:
    """The one that requests get."""
    return internals.run_inside(engine, internals.worker(engine).scales.of(reward))


# --- measured once ---


def test_a_reward_without_a_scale_is_measured_once(start: Start, models: Callable[..., str]) -> None:
    engine, words = start(models("llama")), Words()
    reward = FunctionReward(function=words)
    answers = [engine.run(request(reward, seed)) for seed in range(3)]
    assert sorted(words.measured) == sorted(PLAIN)
    assert len(set(words.found)) > 1
    scale = scale_of(engine, reward)
    assert scale.mean == pytest.approx(statistics.fmean(words.found))
    assert scale.std == pytest.approx(statistics.stdev(words.found))
    target = scale.mean + 1.5 * scale.std
    by_hand = Cards(target_reward=target, beta=scale.std / 5, max_rejections=3, boundary=SEGMENTS)
    for seed, answer in enumerate(answers):
        told = engine.run(Request(PROMPT, by_hand, reward, Sampler(temperature=1.2), 12, seed=seed))
        assert told.token_ids == answer.token_ids
        assert [s.threshold for s in told.segments] == pytest.approx([s.threshold for s in answer.segments])


def test_target_and_beta_of_one_s_own_spare_the_measurement(start: Start, models: Callable[..., str]) -> None:
    engine, words = start(models("llama")), Words()
    reward = FunctionReward(function=words)
    for decoding in (Cards(target_reward=3, beta=1), Cards(target_reward=3, acceptance="hard")):
        assert engine.run(Request(PROMPT, decoding, reward, max_tokens=4)).text
    assert words.measured == []
    for half in (Cards(target_reward=3), Cards(beta=1), Cards(acceptance="hard")):
        assert half.needs_scale


def test_a_published_scale_is_not_measured(start: Start, models: Callable[..., str]) -> None:
    engine, words = start(models("llama")), Words()
    reward = FunctionReward(function=words, scale=(4.0, 2.0))
    answer = engine.run(request(reward))
    assert words.measured == []
    told = Cards(target_reward=7.0, beta=0.4, max_rejections=3, boundary=SEGMENTS)
    assert answer.token_ids == engine.run(Request(PROMPT, told, reward, Sampler(temperature=1.2), 12, seed=0)).token_ids


async def test_many_requests_wait_for_one_measurement(start: Start, models: Callable[..., str]) -> None:
    engine, words = start(models("llama"), max_rows=4), Words()
    reward = FunctionReward(function=words)
    answers = await asyncio.gather(*(engine.arun(request(reward, seed)) for seed in range(12)))
    assert sorted(words.measured) == sorted(PLAIN)
    assert [a.token_ids for a in answers] == [engine.run(request(reward, seed)).token_ids for seed in range(12)]


def test_one_row_is_enough_to_measure(start: Start, models: Callable[..., str]) -> None:
    engine, words = start(models("llama"), max_rows=1), Words()
    assert len(engine.run_many([request(FunctionReward(function=words), seed, timeout=60) for seed in range(3)])) == 3


def test_the_weights_of_a_composite_do_not_depend_on_the_units_of_its_parts(
    start: Start, models: Callable[..., str]
) -> None:
    """Each part is measured, once, and standardised."""
    first, second = Words(), Words()

    def in_thousands(prompt: str, texts: list[str]) -> list[float]:
        return [1000 * value + 5 for value in second(prompt, texts)]

    parts = [FunctionReward(function=first), FunctionReward(function=in_thousands)]
    engine = start(models("llama"))
    decoding = Cards(target_reward=9.0, beta=0.5, max_rejections=2, boundary=SEGMENTS)
    answer = engine.run(Request(PROMPT, decoding, WeightedReward(rewards=parts), max_tokens=12, seed=1))
    assert len(first.measured) == len(second.measured) == len(PLAIN)
    mean, spread = statistics.fmean(first.found), statistics.stdev(first.found)
    for segment in answer.segments:
        for draft in segment.drafts:
            words, thousands = draft.parts["function words"], draft.parts["function in_thousands"]
            assert thousands == 1000 * words + 5
            assert draft.reward == pytest.approx((words - mean) / spread)
    engine.run(Request(PROMPT, decoding, MinReward(rewards=parts), max_tokens=4, seed=1))
    assert len(first.measured) == len(second.measured) == len(PLAIN)  # for another composite, too


def test_a_composite_on_auto_is_measured_with_its_standardised_parts(start: Start, models: Callable[..., str]) -> None:
    engine, words = start(models("llama")), Words()
    reward = WeightedReward(rewards=[FunctionReward(function=words)], weights=(3.0,))
    engine.run(request(reward))
    assert len(words.measured) == 2 * len(PLAIN)  # the part, and then the whole
    whole = scale_of(engine, reward)
    assert len(words.measured) == 2 * len(PLAIN)
    assert (whole.mean, whole.std) == pytest.approx((0.0, 3.0), abs=1e-6)


def test_the_scale_of_a_gate_is_that_of_its_inner_reward(start: Start, models: Callable[..., str]) -> None:
    engine, words = start(models("llama")), Words()
    inner = FunctionReward(function=words)
    closed = PatternReward(forbidden=".")  # nearly always
    gate = GateReward(gate=closed, reward=GateReward(gate=closed, reward=inner))
    engine.run(request(gate))
    assert len(words.measured) == len(PLAIN)
    assert scale_of(engine, gate) == scale_of(engine, inner)
    assert scale_of(engine, gate).mean > 0
    published = GateReward(gate=closed, reward=inner.model_copy(update={"scale": (1.5, 2.5)}))
    assert scale_of(engine, published) == Scale(mean=1.5, std=2.5)


def test_a_gate_may_publish_a_scale_of_its_own(start: Start, models: Callable[..., str]) -> None:
    engine, words = start(models("llama")), Words()
    gate = GateReward(gate=LengthReward(target=3), reward=FunctionReward(function=words), scale=(4.0, 2.0))
    engine.run(request(gate))
    assert words.measured == []
    assert scale_of(engine, gate) == Scale(mean=4.0, std=2.0)


@pytest.mark.parametrize("kind", [WeightedReward, MinReward])
def test_what_a_gate_closes_is_no_measure_inside_a_composite(
    start: Start, models: Callable[..., str], kind: Any
) -> None:
    engine = start(models("llama"))
    gate = GateReward(gate=PatternReward(forbidden=r"\bw1\d\b"), reward=LengthReward(target=20, scale=(-1.0, 1.0)))
    reward = kind(rewards=[gate])
    engine.run(request(reward))
    assert scale_of(engine, reward).std < 100


def test_a_reward_is_measured_on_the_prompts_that_suit_it(start: Start, models: Callable[..., str]) -> None:
    class Grounded(Reward):
        kind: Literal["grounded"] = "grounded"

        @property
        def prompts(self) -> list[tuple[str, tuple[str, ...]]]:
            return [(f"Context: {context}\n{question}", (context,)) for question, context in WITH_CONTEXT]

        def score(self, prompt: str, responses: list[str]) -> list[float]:
            seen.append(prompt)
            return [float(len(response)) for response in responses]

    seen: list[str] = []
    engine = start(models("llama"))
    engine.run(request(Grounded()))
    assert {prompt for prompt in seen if prompt != PROMPT} == {prompt for prompt, _ in Grounded().prompts}


def test_a_constant_reward_works_and_warns(
    start: Start, models: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    reward = FunctionReward(function=lambda prompt, texts: [2.5] * len(texts))
    for whole in (reward, WeightedReward(rewards=[reward]), MinReward(rewards=[reward, LengthReward(target=9)])):
        engine = start(models("llama"))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "cards_integrations"):
            answer = engine.run(request(whole))
        assert "cannot guide: it gives every plain answer 2.5" in caplog.text
        assert scale_of(engine, reward) == Scale(mean=2.5, std=0.0)
        if not isinstance(whole, MinReward):
            assert {draft.verdict for segment in answer.segments for draft in segment.drafts} == {"accepted"}


# --- remembered ---


def test_a_second_engine_reads_what_the_first_has_measured(
    start: Start, models: Callable[..., str], judge: ClassifierReward, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = start(models("llama"))
    answer = first.run(request(judge))
    [file] = cache.iterdir()
    assert Scale.model_validate_json(file.read_text()) == scale_of(first, judge)
    first.close()
    second = start(models("llama"))
    caplog.clear()
    with caplog.at_level(logging.INFO, "cards_integrations"):
        again = second.run(request(judge))
    assert "measuring" not in caplog.text
    assert again.token_ids == answer.token_ids
    assert scale_of(second, judge) == Scale.model_validate_json(file.read_text())


def test_a_scale_belongs_to_one_model_and_one_reward(
    start: Start, models: Callable[..., str], judge: ClassifierReward, cache: Path, tmp_path: Path
) -> None:
    start(models("llama")).run(request(judge))
    start(tiny.save(tmp_path / "another", tiny.causal(seed=5), tiny.words())).run(request(judge))
    start(models("llama")).run(request(judge.model_copy(update={"output": "probability"})))
    start(models("llama")).run(request(judge.model_copy(update={"granularity": "sentence"})))
    assert len(list(cache.iterdir())) == 4
    start(models("llama")).run(request(GateReward(gate=LengthReward(target=9), reward=judge)))
    assert len(list(cache.iterdir())) == 4


def test_a_remembered_target_and_beta_are_used(
    start: Start, models: Callable[..., str], judge: ClassifierReward, cache: Path
) -> None:
    engine = start(models("llama"))
    engine.run(request(judge))
    [file] = cache.iterdir()
    file.write_text(Scale(mean=0, std=1, target=-90.0, beta=0.25).model_dump_json())
    before = engine.run(request(judge))
    assert before.guidance is not None
    assert before.guidance.target_origin == "measured"  # a running engine does not look again
    engine.close()
    engine = start(models("llama"))
    answer = engine.run(request(judge))
    assert answer.guidance == Guidance(-90.0, 0.25, "calibrated", "calibrated")
    assert answer.segments[-1].threshold == pytest.approx(-90 if len(answer.token_ids) == 12 else -45, abs=45)
    assert {d.verdict for segment in answer.segments for d in segment.drafts} == {"accepted"}
    assert engine.run(request(judge.model_copy(update={"scale": (50.0, 1.0)}))).token_ids == answer.token_ids


def unstored(prompt: str, texts: list[str]) -> list[float]:
    return [float(len(text)) for text in texts]


def test_code_is_measured_anew_in_every_engine(start: Start, models: Callable[..., str], cache: Path) -> None:
    """What a function does may have changed since."""
    words = Words()
    for _ in range(2):
        start(models("llama")).run(request(FunctionReward(function=words)))
        start(models("llama")).run(request(WeightedReward(rewards=[FunctionReward(function=unstored)])))
    assert len(words.measured) == 2 * len(PLAIN)
    assert not cache.exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"mean": 1}', b'{"mean": "NaN", "spread": 1}', b"\xff\xfe\0", None]
)
def test_a_corrupt_file_is_ignored_and_replaced(
    start: Start, models: Callable[..., str], judge: ClassifierReward, cache: Path, content: bytes | None
) -> None:
    engine = start(models("llama"))
    engine.run(request(judge))
    expected = scale_of(engine, judge)
    [file] = cache.iterdir()
    file.unlink()
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    fresh = start(models("llama"))
    assert fresh.run(request(judge)).text
    assert scale_of(fresh, judge) == expected
    if content is not None:
        assert Scale.model_validate_json(file.read_text()) == expected


def test_a_folder_that_cannot_be_written_harms_nothing(
    start: Start, models: Callable[..., str], judge: ClassifierReward, cache: Path
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in place of the folder")
    assert start(models("llama")).run(request(judge)).text


class Opaque(Reward):
    """With a setting that JSON does not have."""

    kind: Literal["opaque"] = "opaque"
    how: Callable[[str], float]

    def score(self, prompt: str, responses: list[str]) -> list[float]:
        return [self.how(response) for response in responses]


def test_a_reward_that_has_no_json_is_measured_all_the_same(start: Start, models: Callable[..., str]) -> None:
    assert start(models("llama")).run(request(Opaque(how=lambda text: float(len(text))))).text


def test_what_another_process_stores_changes_no_answer_of_this_one(
    start: Start, models: Callable[..., str], judge: ClassifierReward
) -> None:
    engine, store = start(models("llama")), scale_store.ScaleStore()
    model = engine.model
    store.put(model, judge, Scale(mean=0.0, std=1.0))
    gate = GateReward(gate=LengthReward(target=3), reward=judge)
    whole = WeightedReward(rewards=[judge])
    before = [engine.run(request(reward, seed)).to_dict() for reward in (judge, gate, whole) for seed in range(2)]
    store.put(model, judge, Scale(mean=5.0, std=3.0, target=-90.0, beta=9.0))
    store.put(model, whole, Scale(mean=5.0, std=3.0, target=-90.0, beta=9.0))
    after = [engine.run(request(reward, seed)).to_dict() for reward in (judge, gate, whole) for seed in range(2)]
    assert [a["segments"] for a in after] == [b["segments"] for b in before]
    assert [a["guidance"] for a in after] == [b["guidance"] for b in before]


def test_what_this_process_calibrates_holds_at_once(
    start: Start, models: Callable[..., str], judge: ClassifierReward
) -> None:
    engine = start(models("llama"))
    engine.run(request(judge))
    scale_store.ScaleStore().calibrate(engine.model, judge, Scale(mean=0.0, std=1.0, target=-90.0, beta=0.25))
    assert engine.run(request(judge)).guidance == Guidance(-90.0, 0.25, "calibrated", "calibrated")


def test_the_trace_says_what_guided_an_answer_and_where_it_came_from(
    start: Start, models: Callable[..., str], judge: ClassifierReward
) -> None:
    engine = start(models("llama"))
    asked = request(judge)
    measured = engine.run(asked)
    scale = scale_of(engine, judge)
    expected = Guidance(scale.mean + 1.5 * scale.std, scale.std / 5, "measured", "measured")
    assert measured.guidance == expected
    assert measured.to_dict()["guidance"]["target_origin"] == "measured"
    engine.close()
    engine = start(models("llama"))
    assert engine.run(asked).guidance == replace(expected, target_origin="remembered", beta_origin="remembered")
    published = request(FunctionReward(function=Words(), scale=(4.0, 2.0)))
    assert engine.run(published).guidance == Guidance(7.0, 0.4, "published", "published")
    told = replace(published, decoding=Cards(target_reward=2.0, boundary=SEGMENTS))
    assert engine.run(told).guidance == Guidance(2.0, 0.4, "given", "published")
    hard = replace(published, decoding=Cards(target_reward=2.0, acceptance="hard", boundary=SEGMENTS))
    assert engine.run(hard).guidance == Guidance(2.0, None, "given", None)
    constant = request(FunctionReward(function=Words(), scale=(4.0, 0.0)))
    assert engine.run(constant).guidance == Guidance(4.0, 0.7, "published", "default")
    assert engine.run(replace(published, decoding=Sampling())).guidance is None


def test_the_files_of_scales_have_a_bound_and_calibrations_go_last(cache: Path) -> None:
    store, model = scale_store.ScaleStore(), LocalModel(model="m/m")
    chosen = [LengthReward(target=target) for target in range(1, 31)]
    for reward in chosen:
        store.put(model, reward, Scale(mean=0.0, std=1.0, target=2.0, beta=1.0))
    measured = [LengthReward(target=target) for target in range(100, 100 + 2 * scale_store.MAX_FILES)]
    for reward in measured:
        store.put(model, reward, Scale(mean=0.0, std=1.0))
    assert len(list(cache.iterdir())) <= scale_store.MAX_FILES
    assert all(store.get(model, reward) is not None for reward in [*chosen, *measured[-50:]])
    assert store.get(model, measured[0]) is None


def test_an_engine_remembers_the_scales_of_so_many_rewards(start: Start, models: Callable[..., str]) -> None:
    engine = start(models("llama"))
    own = internals.worker(engine).scales
    known = [
        run_known(engine, LengthReward(target=n, scale=(0.0, float(n)))) for n in range(1, scales.MAX_LOOKED_UP + 50)
    ]
    assert known[-1] == (Scale(mean=0.0, std=scales.MAX_LOOKED_UP + 49.0), "published")
    assert len(own.looked_up) == scales.MAX_LOOKED_UP


def run_known(engine: Engine, reward: Reward) -> Any:
    return internals.run_inside(engine, internals.worker(engine).scales.known(reward))


# --- giving up, and failing ---


def test_a_reward_that_always_fails_fails_before_anything_is_drafted_for_its_scale(
    start: Start, models: Callable[..., str]
) -> None:
    def has_no_idea(prompt: str, texts: list[str]) -> list[float]:
        raise ZeroDivisionError("no idea")

    engine = start(models("llama"))
    with pytest.raises(RewardError, match=r"has_no_idea.*ZeroDivisionError: no idea"):
        engine.run(request(FunctionReward(function=has_no_idea)))
    state = engine.inspect()
    assert (state.tokens, state.forwards) == (0, 0)


async def until(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 60)


@pytest.mark.parametrize("how", ["cancelled", "timed out"])
async def test_the_first_who_waits_may_give_up(start: Start, models: Callable[..., str], how: str) -> None:
    engine, words = start(models("llama")), Words()
    engine.loaded()
    words.wait = threading.Event()
    reward = FunctionReward(function=words)
    first = asyncio.create_task(engine.arun(request(reward, timeout=2.0 if how == "timed out" else None)))
    await until(words.begun)
    second = asyncio.create_task(engine.arun(request(reward, 1)))
    await asyncio.sleep(0.05)
    if how == "cancelled":
        first.cancel()
    with pytest.raises(asyncio.CancelledError if how == "cancelled" else CardsTimeout):
        await first
    words.wait.set()
    assert (await second).text
    assert sorted(words.measured) == sorted(PLAIN)


async def test_nobody_may_wait_any_more_and_still_it_is_measured_once(start: Start, models: Callable[..., str]) -> None:
    engine, words = start(models("llama")), Words()
    engine.loaded()
    words.wait = threading.Event()
    only = asyncio.create_task(engine.arun(request(FunctionReward(function=words))))
    await until(words.begun)
    only.cancel()
    await asyncio.gather(only, return_exceptions=True)
    words.wait.set()
    assert (await engine.arun(request(FunctionReward(function=words)))).text
    assert sorted(words.measured) == sorted(PLAIN)


async def test_an_error_while_measuring_reaches_all_and_the_next_request_tries_again(
    start: Start, models: Callable[..., str]
) -> None:
    engine, words = start(models("llama")), Words()
    reward = FunctionReward(function=words)
    words.broken = True
    for _ in range(2):
        words.wait = threading.Event()
        words.begun.clear()
        tasks = [asyncio.create_task(engine.arun(request(reward, seed))) for seed in range(3)]
        await until(words.begun)
        words.wait.set()  # not before all wait
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(error) for error in found] == [RewardError] * 3
        assert all("function words" in str(error) and "no idea" in str(error) for error in found)
    assert len(words.measured) == 2  # once for all who waited, twice in all
    words.broken = False
    assert (await engine.arun(request(reward))).text


async def test_an_error_that_nobody_waited_for_is_not_given_to_the_next(
    start: Start, models: Callable[..., str]
) -> None:
    engine, words = start(models("llama")), Words()
    engine.loaded()
    words.wait, words.broken = threading.Event(), True
    only = asyncio.create_task(engine.arun(request(FunctionReward(function=words))))
    await until(words.begun)
    only.cancel()
    await asyncio.gather(only, return_exceptions=True)
    words.wait.set()
    await internals.until(lambda: engine.inspect().measured_scales == 0)
    words.broken = False
    assert (await engine.arun(request(FunctionReward(function=words)))).text


async def test_closing_while_measuring(start: Start, models: Callable[..., str]) -> None:
    engine, words = start(models("llama")), Words()
    engine.loaded()
    words.wait = threading.Event()
    reward = FunctionReward(function=words)
    try:
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(engine.arun(request(reward, seed))) for seed in range(2)]
        tasks.append(
            asyncio.create_task(asyncio.to_thread(engine.score, WeightedReward(rewards=[reward]), "w6", ["w7"]))
        )
        await until(words.begun)
        await asyncio.to_thread(engine.close)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(error) for error in found] == [EngineClosed] * 3
    finally:
        words.wait.set()


# --- optimal stopping: the rule ---


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cost", [1e-4, 0.01, 0.1, 0.4, 1.0, 5.0, 60.0])
def test_the_reservation_value_balances_gain_and_cost(batch: int, cost: float) -> None:
    """E[max(M - xi, 0)] by numerical integration over the density of the highest of `batch` normals."""
    mean, spread, length = -2.0, 0.7, 9.0
    price = cost * spread / (batch * length)

    def surplus(z: float) -> float:
        def gain(m: float) -> float:
            return (m - z) * batch * float(stats.norm.pdf(m) * stats.norm.cdf(m) ** (batch - 1))

        expected, _ = integrate.quad(gain, max(z, -12), max(z, -12) + 24, limit=200)
        return float(expected) - cost

    exact = mean + spread * optimize.brentq(surplus, -100, 10)
    xi = OptimalStopping(price=price, batch=batch).reservation(mean, spread, length)
    assert xi == pytest.approx(exact, abs=0.003 * spread)


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.floats(0.5, 60), st.floats(1e-6, 1e3), st.integers(1, 8))
def test_the_reservation_value_is_of_the_rewards_own_unit(
    mean: float, spread: float, length: float, price: float, batch: int
) -> None:
    rule, dearer = OptimalStopping(price=price, batch=batch), OptimalStopping(price=2 * price, batch=batch)
    value = rule.reservation(mean, spread, length)
    assert rule.reservation(mean + 5, spread, length) == pytest.approx(value + 5, rel=1e-9, abs=1e-6)
    scaled = OptimalStopping(price=3 * price, batch=batch).reservation(3 * mean, 3 * spread, length)
    assert scaled == pytest.approx(3 * value, rel=1e-9, abs=1e-6)
    assert dearer.reservation(mean, spread, length) <= value
    assert rule.reservation(mean, spread, 2 * length) <= value


def test_before_a_spread_is_known_nothing_is_good_enough() -> None:
    rule = OptimalStopping(price=1.0)
    assert rule.reservation(3.0, None, 5.0) == math.inf
    assert rule.reservation(3.0, 0.0, 5.0) == 3.0


@given(st.lists(st.lists(st.floats(-100, 100), max_size=5), max_size=5))
def test_the_spread_is_pooled_over_segments(segments: list[list[float]]) -> None:
    several = [rewards for rewards in segments if len(rewards) > 1]
    found = pooled_std([rewards for rewards in segments if rewards])
    if not several:
        assert found is None
    else:
        squares = sum(statistics.variance(rewards) * (len(rewards) - 1) for rewards in several)
        assert found == pytest.approx(math.sqrt(squares / sum(len(r) - 1 for r in several)), rel=1e-6, abs=1e-6)


# --- optimal stopping: through the engine ---


def searching(reward: Reward, price: float, seed: int = 0, batch: int = 1, rejections: int = 5) -> Request:
    rule = OptimalStopping(price=price, batch=batch)
    decoding = Cards(acceptance=rule, max_rejections=rejections, boundary=SEGMENTS)
    return Request(PROMPT, decoding, reward, Sampler(temperature=1.2), 24, seed=seed)


def numbers(answer: Alignment) -> list[int]:
    return [len(segment.drafts) for segment in answer.segments]


def test_optimal_stopping_measures_nothing(start: Start, models: Callable[..., str]) -> None:
    engine, words = start(models("llama")), Words()
    assert engine.run(searching(FunctionReward(function=words), 0.01)).text
    assert words.measured == []
    assert not Cards(acceptance=OptimalStopping(price=0.1)).needs_scale


def test_a_price_in_standard_deviations_is_one_in_rewards(
    start: Start, models: Callable[..., str], judge: ClassifierReward
) -> None:
    engine, spread = start(models("llama")), 0.3
    scaled = judge.model_copy(update={"scale": (0.0, spread)})
    in_rewards = searching(scaled, 0.02 * spread)
    rule = OptimalStopping(price=0.02, unit="std")
    assert Cards(acceptance=rule).needs_scale
    in_spreads = replace(in_rewards, decoding=in_rewards.decoding.model_copy(update={"acceptance": rule}))
    one, other = engine.run_many([in_rewards, in_spreads])
    assert (one.text, numbers(one)) == (other.text, numbers(other))
    assert min(numbers(one)) < 6


def test_as_long_as_no_spread_is_known_there_is_no_threshold(
    start: Start, models: Callable[..., str], judge: ClassifierReward
) -> None:
    answer = start(models("llama")).run(searching(judge, 0.01, rejections=0))
    assert {segment.threshold for segment in answer.segments} == {None}
    assert json.dumps(answer.to_dict(), allow_nan=False)
    assert answer.text.split()[0] in answer._repr_html_()


@pytest.mark.parametrize("batch", [1, 3])
def test_where_a_token_costs_a_fortune_one_batch_is_drafted(
    start: Start, models: Callable[..., str], judge: ClassifierReward, batch: int
) -> None:
    """And in the first segment as many as show a spread."""
    engine = start(models("llama"))
    for seed in range(4):
        first, *others = numbers(engine.run(searching(judge, 1e9, seed, batch)))
        assert first == max(2, batch)
        assert others
        assert set(others) == {batch}


def test_where_a_token_costs_next_to_nothing_all_are_drafted(
    start: Start, models: Callable[..., str], judge: ClassifierReward
) -> None:
    engine = start(models("llama"))
    for rejections in (0, 5):
        answer = engine.run(searching(judge, 1e-13, 1, rejections=rejections))
        assert set(numbers(answer)) == {rejections + 1}
        assert all("best" in {draft.verdict for draft in segment.drafts} for segment in answer.segments)


def test_between_the_two_the_price_decides(start: Start, models: Callable[..., str], judge: ClassifierReward) -> None:
    engine = start(models("llama"))
    drafted = [
        sum(sum(numbers(engine.run(searching(judge, price, seed, rejections=20)))) for seed in range(6))
        for price in (0.3, 0.05, 0.005)
    ]
    assert drafted[0] < drafted[1] < drafted[2]


def by_the_book(answer: Alignment, price: float, batch: int, limit: int) -> None:
    """Replays every decision from the trace, with the spread and the values computed by other means."""
    assert answer.prompt_reward is not None
    before, segments = answer.prompt_reward, list[list[float]]()
    for segment in answer.segments:
        rewards = [draft.reward for draft in segment.drafts if draft.reward is not None]
        assert len(rewards) == len(segment.drafts)
        segments.append([])
        tokens = 0
        for n, draft in enumerate(segment.drafts, 1):
            segments[-1].append(rewards[n - 1])
            tokens += len(draft.token_ids)
            several = [each for each in segments if len(each) > 1]
            value = math.inf
            if several:
                freedom = sum(len(each) - 1 for each in several)
                spread = math.sqrt(sum(statistics.variance(each) * (len(each) - 1) for each in several) / freedom)
                mean = statistics.fmean([before, *rewards[:n]])
                value = OptimalStopping(price=price, batch=batch).reservation(mean, spread, tokens / n)
            assert draft.threshold == (None if value == math.inf else pytest.approx(value))
            stops = n % batch == 0 and max(rewards[:n]) >= value
            assert stops == (n == len(rewards) and "accepted" in {d.verdict for d in segment.drafts})
        assert stops or len(rewards) == limit
        [kept] = [draft for draft in segment.drafts if draft.verdict in ("accepted", "best")]
        assert (kept.text, kept.reward) == (segment.text, max(rewards))
        assert rewards.index(max(rewards)) == kept.index
        before = max(rewards)


@pytest.mark.parametrize(("price", "batch"), [(0.02, 1), (0.1, 1), (0.05, 3)])
def test_the_best_that_was_looked_at_is_kept_and_drafting_stops_when_it_should(
    start: Start, models: Callable[..., str], judge: ClassifierReward, price: float, batch: int
) -> None:
    engine = start(models("llama"))
    verdicts = set()
    for seed in range(6):
        answer = engine.run(searching(judge, price, seed, batch))
        by_the_book(answer, price, batch, limit=6)
        verdicts |= {draft.verdict for segment in answer.segments for draft in segment.drafts}
    assert verdicts == {"accepted", "rejected", "best"}


def test_the_text_depends_on_the_seed_alone(start: Start, models: Callable[..., str], judge: ClassifierReward) -> None:
    requests = [searching(judge, 0.03, seed, batch=1 + seed % 2) for seed in range(16)]
    narrow, wide, auto = start(models("llama"), width=1), start(models("llama"), width=8), start(models("llama"))
    expected = [narrow.run(one) for one in requests]
    for engine in (wide, auto):
        alone, together = [engine.run(one) for one in requests[:4]], engine.run_many(requests)
        assert [a.token_ids for a in alone] == [a.token_ids for a in expected[:4]]
        assert [a.token_ids for a in together] == [a.token_ids for a in expected]
        assert [numbers(a) for a in together] == [numbers(a) for a in expected]
    assert len({a.token_ids for a in expected}) > 12


def test_optimal_stopping_in_settings() -> None:
    decoding = Cards(acceptance=OptimalStopping(price=0.25, batch=2))
    assert Cards.model_validate(decoding.model_dump(mode="json")) == decoding
    assert Cards.model_validate_json(decoding.model_dump_json()) == decoding
    for bad in ({"price": 0}, {"price": math.nan}, {"price": math.inf}, {"price": 1, "batch": 0}, {}):
        with pytest.raises(ValueError, match=r"price|batch"):
            Cards(acceptance=bad)
