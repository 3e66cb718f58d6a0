"""Requests take memory as they grow; when it ends, the newest wait and are computed again, with the same texts."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import internals
import pytest
import tiny
from conftest import Start
from speculator import Watch

from cards_integrations.chat.grammar import Grammar
from cards_integrations.decoding import (
    BestOfN,
    Cards,
    Cascade,
    Decoding,
    FixedLength,
    Particles,
    Rain,
    Sampling,
    SegmentBestOfN,
    SpeculativeRejection,
    TreeBoN,
    Uncertainty,
)
from cards_integrations.engine import Engine, Request
from cards_integrations.engine.step_loop import StepLoop
from cards_integrations.errors import EngineClosed, PromptError, RewardError
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import (
    ClassifierReward,
    FunctionReward,
    ImplicitReward,
    LengthReward,
    Response,
    Reward,
    WeightedReward,
)
from cards_integrations.rewards.scorers.incremental import Incremental
from cards_integrations.trace import Alignment

SAMPLER = Sampler(temperature=1.0)
UNCERTAIN = Uncertainty(threshold=2.95, min_length=2, max_length=8)
FIXED = FixedLength(length=12)
BUDGET = 180_000  # bytes; a row of 192 tokens takes 48 KiB
BUDGETS = {"sampling": 100_000, "rain": 260_000}
METHODS: list[Decoding] = [
    Sampling(),
    BestOfN(n=3),
    SegmentBestOfN(n=3, boundary=FIXED),
    Cards(target_reward=0.6, beta=0.3, boundary=UNCERTAIN),
    TreeBoN(n=4, children=2, boundary=FixedLength(length=24)),
    Cascade(budget="tokens:3"),
    Particles(n=4, boundary=FIXED),
    Rain(width=3, searches=3, boundary=FIXED),
    SpeculativeRejection(n=5),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("endless")
    tiny.save(
        folder / "model", tiny.causal(eos_token_id=None, max_position_embeddings=4096), tiny.words(eos_token=None)
    )
    tiny.save(
        folder / "other",
        tiny.causal(eos_token_id=None, max_position_embeddings=4096, seed=3),
        tiny.words(eos_token=None),
    )
    tiny.save(folder / "bytes", tiny.causal(vocab_size=280, max_position_embeddings=4096), tiny.byte_pairs())
    tiny.save(folder / "letters", tiny.classifier(vocab_size=280, max_position_embeddings=4096), tiny.byte_pairs())
    tiny.save(folder / "judge", tiny.classifier(max_position_embeddings=4096), tiny.words(eos_token=None))
    tiny.save(folder / "short", tiny.classifier(max_position_embeddings=128), tiny.words(eos_token=None))
    return folder


def words(count: int, seed: int) -> str:
    return " ".join(f"w{i}" for i in random.Random(seed).choices(range(6, 48), k=count))


def asked(decoding: Decoding, reward: Reward | None, count: int = 4, prompt: int = 12, **options: Any) -> list[Request]:
    """Short prompts with long answers: all begin at once, and do not end so."""
    base = Request("", decoding, reward, SAMPLER, **{"max_tokens": 80, "timeout": 100, **options})
    return [replace(base, prompt=words(prompt + seed, seed), seed=seed) for seed in range(count)]


def judge(folder: Path) -> ClassifierReward:
    return ClassifierReward(model=str(folder / "judge"))


def assert_equal(found: Sequence[Alignment], expected: Sequence[Alignment]) -> None:
    assert [a.token_ids for a in found] == [a.token_ids for a in expected]
    for one, other in zip(found, expected, strict=True):
        assert [s.reward for s in one.segments] == pytest.approx([s.reward for s in other.segments], abs=1e-4)
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-3)
        assert one.usage.drafts == other.usage.drafts


def assert_preempted_and_equal(start: Start, model: Path, requests: list[Request], budget: int = BUDGET) -> None:
    expected = start(str(model), width=4).run_many(requests)
    engine = start(str(model), width=4, kv_memory=budget)
    watch = Watch(engine)
    assert_equal(engine.run_many(requests), expected)
    assert engine.inspect().preempted > 0
    assert watch.bytes <= budget
    assert engine.inspect().idle


@pytest.mark.parametrize("decoding", METHODS, ids=lambda method: method.method)
def test_preempted_requests_write_the_same(folder: Path, start: Start, decoding: Decoding) -> None:
    reward = judge(folder) if decoding.needs_reward else None
    budget = BUDGETS.get(decoding.method, BUDGET)
    assert_preempted_and_equal(start, folder / "model", asked(decoding, reward), budget)


REWARDS = ("parts", "log p", "implicit", "window")


@pytest.mark.parametrize("kind", REWARDS)
def test_rewards_of_preempted_requests_are_the_same(folder: Path, start: Start, kind: str) -> None:
    own = judge(folder)
    rewards: dict[str, Reward] = {
        "parts": WeightedReward(rewards=[own, LengthReward(target=200)], weights=[1.0, 0.1]),
        "log p": ImplicitReward(tuned=str(folder / "model"), base=str(folder / "other")),
        "implicit": ImplicitReward(tuned=str(folder / "other"), base=str(folder / "model")),
        "window": ClassifierReward(model=str(folder / "short")),
    }
    decoding = Cards(target_reward=50.0, acceptance="hard", max_rejections=3, boundary=UNCERTAIN)
    requests = asked(decoding, rewards[kind], prompt=60 if kind == "window" else 12)
    assert_preempted_and_equal(start, folder / "model", requests)


def test_preempted_requests_follow_their_grammar(folder: Path, start: Start) -> None:
    grammar = Grammar.regex("[a-z ]{200}")
    reward = ClassifierReward(model=str(folder / "letters"))
    requests = asked(Cards(target_reward=50.0, max_rejections=3, boundary=UNCERTAIN), reward, grammar=grammar)
    assert_preempted_and_equal(start, folder / "bytes", requests)


def test_long_prompts_with_a_common_beginning(folder: Path, start: Start) -> None:
    """It is held once, and the newest are read again from it."""
    begin = words(400, 99)
    requests = [replace(each, prompt=f"{begin} {each.prompt}") for each in asked(Sampling(), None, max_tokens=300)]
    assert_preempted_and_equal(start, folder / "model", requests, 400_000)


async def test_a_preempted_request_can_be_cancelled_and_others_go_on(folder: Path, start: Start) -> None:
    requests = asked(Cards(target_reward=50.0, max_rejections=4, boundary=UNCERTAIN), judge(folder))
    expected = start(str(folder / "model"), width=4).run_many(requests)
    engine = start(str(folder / "model"), width=4, kv_memory=BUDGET)
    tasks = [asyncio.create_task(engine.arun(request)) for request in requests]
    await internals.until(lambda: bool(engine.inspect().preempted))
    for task in tasks[-2:]:
        task.cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(each, asyncio.CancelledError) for each in found[-2:])
    assert_equal([each for each in found if isinstance(each, Alignment)], expected[:-2])
    await internals.until(lambda: engine.inspect().idle)


def test_a_reward_that_asks_the_engine_is_not_blocked(folder: Path, start: Start) -> None:
    """Its own request is the newest, and the one that waits for it may be the oldest."""
    engine = start(str(folder / "model"), width=2, kv_memory=BUDGET)

    def asks(prompt: str, responses: list[str]) -> list[float]:
        return [
            float(len(engine.run(Request(r or "w9", Sampling(), max_tokens=8, seed=1)).token_ids)) for r in responses
        ]

    decoding = Cards(target_reward=50.0, max_rejections=1, boundary=FixedLength(length=40))
    answers = engine.run_many(asked(decoding, FunctionReward(function=asks)))
    assert [len(answer.token_ids) for answer in answers] == [80] * 4
    assert engine.inspect().preempted > 0


def test_what_rewards_ask_takes_memory_one_after_another(folder: Path, start: Start) -> None:
    """However many they are; each may take what all others together cannot spare, but no two do."""
    engine = start(str(folder / "model"), width=2, kv_memory=BUDGET)

    def asks(prompt: str, responses: list[str]) -> list[float]:
        asked = [Request(words(10, len(r)), Sampling(), max_tokens=300, seed=1) for r in responses]
        return [float(len(engine.run(each).token_ids)) for each in asked]

    watch = Watch(engine)
    decoding = Cards(target_reward=50.0, beta=1.0, max_rejections=0, boundary=FixedLength(length=40))
    answers = engine.run_many(asked(decoding, FunctionReward(function=asks), max_tokens=40))
    assert [len(answer.token_ids) for answer in answers] == [40] * 4
    assert watch.bytes < 1.5 * BUDGET


def test_likelihoods_that_have_to_be_read_count(folder: Path, start: Start) -> None:
    """A text that was cut, or part of one, is read again in a row of its own."""
    reward = ImplicitReward(tuned=str(folder / "model"), base=str(folder / "other"), granularity="sentence")
    engine = start(str(folder / "model"), width=2, kv_memory=500_000)
    watch = Watch(engine)
    decoding = Cards(target_reward=50.0, acceptance="hard", max_rejections=2, boundary=FixedLength(length=12))
    engine.run_many(asked(decoding, reward, count=8, prompt=150, max_tokens=30))
    assert watch.bytes <= 500_000
    assert engine.inspect().idle


def test_a_reward_whose_growth_cannot_be_told_harms_nobody(
    folder: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = asked(Cards(target_reward=50.0, max_rejections=2, boundary=UNCERTAIN), judge(folder))
    engine = start(str(folder / "model"), width=2)
    expected = engine.run_many(requests)

    def fails(self: Incremental, responses: Sequence[Response]) -> int:
        raise PromptError("a token that the model does not know")

    monkeypatch.setattr(Incremental, "growth", fails)
    assert_equal(engine.run_many(requests), expected)


def test_nothing_is_done_while_a_slow_reward_holds_the_memory(
    folder: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whoever waited begins as soon as it is free, not only when another request ends."""

    def slow(prompt: str, responses: list[str]) -> list[float]:
        time.sleep(0.1)
        return [0.0] * len(responses)

    reward = WeightedReward(rewards=[judge(folder), FunctionReward(function=slow)], weights=[1.0, 1.0])
    engine = start(str(folder / "model"), width=6, kv_memory=170_000)
    engine.score(judge(folder), "w7", ["w8"])  # loads it
    steps, step = [0], StepLoop.step

    def counted(self: StepLoop) -> int:
        steps[0] += 1
        return step(self)

    monkeypatch.setattr(StepLoop, "step", counted)
    decoding = SegmentBestOfN(n=6, boundary=FixedLength(length=12))
    long = engine.submit(Request(words(20, 1), decoding, reward, SAMPLER, 150, seed=1, timeout=100))
    while not engine.inspect().scoring:
        time.sleep(0.01)
    short = engine.submit(Request(words(100, 2), Sampling(), None, SAMPLER, 4, seed=2, timeout=100))
    assert len(short.result().token_ids) == 4
    assert not long.done()
    assert steps[0] <= long.result().usage.drafted_tokens + 100


def test_rewards_that_fail_while_others_are_preempted(folder: Path, start: Start) -> None:
    engine = start(str(folder / "model"), width=4, kv_memory=BUDGET)
    calls = 0

    def fails(prompt: str, responses: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls % 40 == 0:
            raise ValueError("no")
        return [float(len(r)) for r in responses]

    reward = WeightedReward(rewards=[judge(folder), FunctionReward(function=fails)], weights=[1.0, 1.0])
    found: list[Any] = engine.run_many(
        asked(Cards(target_reward=50.0, max_rejections=4, boundary=UNCERTAIN), reward), return_exceptions=True
    )
    assert any(isinstance(each, RewardError) for each in found)
    assert all(isinstance(each, RewardError | Alignment) for each in found)
    assert engine.inspect().preempted > 0
    assert engine.inspect().idle


def test_an_engine_that_closes_with_preempted_requests(folder: Path, start: Start) -> None:
    engine: Engine = start(str(folder / "model"), width=4, kv_memory=BUDGET)
    futures = [engine.submit(each) for each in asked(Sampling(), None, max_tokens=400)]
    while not engine.inspect().preempted:
        time.sleep(0.01)
    engine.close()
    assert all(isinstance(future.exception(), EngineClosed) for future in futures)
