"""A guard takes off what is wrong with an answer, costs no forward, and leaves a fluent one its reward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Start
from internals import assert_idle
from naive import ids, log_p

from cards_integrations.decoding import Cards, FixedLength
from cards_integrations.engine import Engine, EngineSettings, Request, scale_store
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import (
    NAMED,
    ClassifierReward,
    FluencyReward,
    FunctionReward,
    GateReward,
    GuardedReward,
    MinReward,
    PatternReward,
    Reward,
    WeightedReward,
)
from cards_integrations.rewards.registry import held_out_for
from cards_integrations.rewards.scorers.repetition import repeated_share
from cards_integrations.trace import Alignment

PROMPT = "w9 w20 w31 w5"
WORDS = tiny.words()
GOOD = "They serve warm bread with herbs, and the room is quiet."
GAMED = "A luxurious and elegant blend of elegant and luxurious."
LOOP = " ".join(["very good"] * 40)


@pytest.fixture(autouse=True)
def scales_of_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_store, "cache_dir", lambda: tmp_path / "cache")


@pytest.fixture(scope="module")
def engine(models: Callable[..., str]) -> Iterator[Engine]:
    engine = Engine(LocalModel(model=models("llama")), EngineSettings(dtype="float32", width=4))
    yield engine
    engine.close()


def count(prompt: str, texts: list[str]) -> list[float]:
    """How often a word is there: searched for, it is repeated."""
    return [float(sum(word in ("w7", "w8") for word in text.split())) for text in texts]


def again(prompt: str, texts: list[str]) -> list[float]:
    """How many words have occurred before: what nobody wants, and a reward may nevertheless like."""
    return [(len(words) - len(set(words))) / 8 for words in map(str.split, texts)]


def known(prompt: str, texts: list[str]) -> list[float]:
    """Whether a word is there."""
    return [float("w7" in text.split()) for text in texts]


def ask(reward: Reward, seed: int = 0, decoding: Any = None, tokens: int = 24, **options: Any) -> Request:
    method = decoding or Cards(target_reward=2.0, beta=0.3, max_rejections=6, boundary=FixedLength(length=4))
    return Request(PROMPT, method, reward, Sampler(temperature=1.2), tokens, seed=seed, **options)


# --- fluency ---


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        ("", 0), ("very", 0), (GOOD, 0),
        (GAMED, 1 / 32),  # in another order; of the 32 n-grams that a beginning is taken to become
        ("the end of the day, at the end of the year", 2 / 32), ("the end of the day", 0),
        ("one two three four. One two, three!", 1 / 32),
        (LOOP, 76 / 78),
        ("smol.smol.smol.smol.smol", 2 / 32), ("it's 'quoted' it's \u2018quoted\u2019 it's", 1 / 32),
        ("不错不错不错", 0),
    ],
)  # fmt: skip
def test_repetition_by_hand(engine: Engine, text: str, repeated: float) -> None:
    assert engine.score(FluencyReward(), PROMPT, [text]) == pytest.approx([-repeated])


def test_a_beginning_is_not_condemned_for_what_a_whole_answer_is_forgiven(engine: Engine) -> None:
    rest = " ".join(f"x{i}" for i in range(60))
    begun, whole = engine.score(FluencyReward(), PROMPT, [GAMED, f"{GAMED} {rest}"])
    assert begun == pytest.approx(-1 / 32)
    assert begun < whole < 0


@pytest.mark.parametrize("width", [1, 8])
def test_log_p_is_that_of_the_drafting_and_costs_no_forward(
    start: Start, models: Callable[..., str], width: int
) -> None:
    engine, model = start(models("llama"), width=width), tiny.causal()
    reward = FluencyReward(n=20, least_log_p=-2.0)  # n-grams that are not repeated here

    def naive(whole: list[int]) -> float:
        return -max(0.0, -2.0 * len(whole) - log_p(model, ids(PROMPT), whole)) / max(32, len(whole))

    answers = engine.run_many([ask(reward, seed, tokens=40) for seed in range(4)])
    for answer in answers:
        assert (answer.usage.rm_tokens, answer.usage.rm_forwards) == (0, 0)
        whole: list[int] = []
        for segment in answer.segments:
            for draft in segment.drafts:
                drafted = [*whole, *(i for i in draft.token_ids if i != tiny.EOS)]
                assert draft.reward == pytest.approx(naive(drafted), abs=1e-4)
            whole += segment.token_ids
    assert any(draft.reward for a in answers for segment in a.segments for draft in segment.drafts)
    texts = ["w7 w8 w9", "", "w45 w44 w43 w7 w8 w9"]
    assert engine.score(reward, PROMPT, texts) == pytest.approx([naive(ids(text)) for text in texts], abs=1e-4)
    assert_idle(engine)


def test_a_text_that_a_stop_string_cut_is_read(engine: Engine) -> None:
    reward = FluencyReward(least_log_p=-2.0)
    answers = engine.run_many([ask(reward, seed, stop=("w1",)) for seed in range(6)])
    cut = [answer for answer in answers if answer.usage.rm_tokens]
    assert cut
    for answer in cut:
        assert engine.score(reward, PROMPT, [answer.text]) == pytest.approx([answer.reward], abs=1e-4)
    assert_idle(engine)


# --- guarded ---


def test_a_fluent_answer_has_the_reward_itself(engine: Engine, models: Callable[..., str]) -> None:
    judge = ClassifierReward(model=models("llama", classifier=True), scale=(0.2, 2.0))
    guarded = GuardedReward(reward=judge, weight=10)
    texts = ["w7 w8 w9", "w7 w8 w9 w10 w7 w8 w9 w10", "", LOOP]
    own, fluency = (engine.score(reward, PROMPT, texts) for reward in (judge, FluencyReward()))
    expected = [value + 10 * 2.0 * guard for value, guard in zip(own, fluency, strict=True)]
    assert engine.score(guarded, PROMPT, texts) == pytest.approx(expected, abs=1e-4)
    answer = engine.run(ask(guarded))
    assert answer.rewards.keys() == {judge.name, "fluency"}
    assert answer.reward == pytest.approx(answer.rewards[judge.name] + 20 * answer.rewards["fluency"], abs=1e-4)


def test_what_a_guard_praises_adds_nothing(engine: Engine) -> None:
    own = FunctionReward(function=count, scale=(0.0, 1.0))
    guarded = GuardedReward(reward=own, guard=PatternReward(wanted=["w9"], forbidden=["w10"]), weight=3)
    assert engine.score(guarded, PROMPT, ["w7 w9", "w7", "w7 w10"]) == [1.0, 1.0, -2.0]


def test_its_scale_is_that_of_what_it_guards(engine: Engine) -> None:
    published = GuardedReward(reward=FunctionReward(function=count, scale=(1.0, 0.5)))
    answer = engine.run(ask(published, decoding=Cards(boundary=FixedLength(length=4))))
    assert answer.guidance is not None
    assert (answer.guidance.target, answer.guidance.target_origin) == (1.75, "published")
    assert answer.guidance.beta == pytest.approx(0.1)
    before = engine.inspect().measured_scales
    engine.score(GuardedReward(reward=FunctionReward(function=count)), PROMPT, ["w7"])
    assert engine.inspect().measured_scales == before + 1  # that of the reward, and not that of the guard


@pytest.mark.parametrize(
    "wrap",
    [
        lambda r: WeightedReward(rewards=[r, FluencyReward(scale=(0, 0.1))]),
        lambda r: MinReward(rewards=[r, FluencyReward(scale=(0, 0.1))]),
        lambda r: GateReward(gate=FluencyReward(), threshold=-0.05, reward=r),
        lambda r: GuardedReward(reward=WeightedReward(rewards=[r]), guard=FluencyReward(least_log_p=-3)),
        lambda r: WeightedReward(rewards=[GuardedReward(reward=r)]),
    ],
)
def test_it_can_be_joined_with_any_reward(engine: Engine, wrap: Callable[[Reward], Reward]) -> None:
    reward = wrap(FunctionReward(function=known, scale=(0.5, 0.5)))
    fluent, looping = engine.score(reward, PROMPT, ["w7 w8 w9 w10", "w7 w8 " * 20])
    assert fluent > looping
    answer = engine.run(ask(reward))
    assert engine.score(reward, PROMPT, [answer.text]) == pytest.approx([answer.reward], abs=1e-4)
    assert_idle(engine)


def test_guided_answers_repeat_themselves_less_with_a_guard(engine: Engine) -> None:
    own = FunctionReward(function=again, scale=(1.0, 0.5))

    def run(reward: Reward) -> list[Alignment]:
        method = Cards(target_reward=4.0, beta=0.1, max_rejections=8, boundary=FixedLength(length=4))
        requests = [ask(reward, seed, method, tokens=32) for seed in range(8)]
        return engine.run_many([replace(each, sampler=Sampler(temperature=0.5)) for each in requests])

    gamed, guarded = run(own), run(GuardedReward(reward=own, weight=40))
    before, after = (sum(repeated_share(answer.text) for answer in found) / 8 for found in (gamed, guarded))
    assert before > 0.1
    assert after < before / 3


# --- the embedded default ---


def test_the_embedded_default_is_guarded_and_has_a_judge() -> None:
    sentiment = NAMED["sentiment"]
    assert isinstance(sentiment, GuardedReward)
    assert sentiment.guard == FluencyReward()
    assert sentiment.scale_source == sentiment.reward
    for reward in (sentiment, sentiment.reward, GuardedReward(reward=sentiment.reward, weight=3)):
        assert held_out_for(reward) == NAMED["sentiment-minilm"]
    assert held_out_for(NAMED["sentiment-minilm"]) is None
