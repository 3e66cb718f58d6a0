"""A calibration looks at a reward that does not guide, and keeps the target before that one's peak."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import faces
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression

from cards_integrations import CardsLLM
from cards_integrations.decoding import Cards, FixedLength
from cards_integrations.engine import EngineSettings, scale_store
from cards_integrations.errors import ModelError, SettingsError
from cards_integrations.rewards import HELD_OUT, NAMED, ClassifierReward, GuardedReward
from cards_integrations.rewards.base import Instant, Loader, Reward, RewardModel
from cards_integrations.study.held_out import HeldOutCurve, Level, unimodal
from cards_integrations.study.metrics import Mean, mean, points, repeated_3grams

PROMPTS = [f"Hello {name}" for name in ("Tom", "Lily", "Ben", "Sue", "Mom", "Dad", "Ann", "Max")]
LIMIT = 0.1


def vowels(text: str) -> float:
    return sum(map(text.lower().count, "aeiou")) / max(8, len(text))


class Vowels(Reward):
    """Their share, or how near it is to a limit, or how few they are."""

    kind: str = "vowels"
    wanted: Literal["many", "some", "few"] = "many"

    def build(self, loader: Loader) -> RewardModel:
        scores = {"many": lambda x: x, "some": lambda x: -abs(x - LIMIT), "few": lambda x: -x}
        return Instant(self.name, lambda response: scores[self.wanted](vowels(response.text)))


@pytest.fixture(autouse=True)
def scales_of_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_store, "cache_dir", lambda: tmp_path / "cache")


@pytest.fixture(scope="module")
def llm() -> Iterator[CardsLLM]:
    settings = EngineSettings(device="cpu", dtype="float32", width=4)
    with CardsLLM(
        model=faces.endless_model(), reward=Vowels(), decoding=Cards(max_rejections=4), max_tokens=16, engine=settings
    ) as llm:
        yield llm


def curve(*values: float, guide: tuple[float, ...] = (), noise: float = 0.01) -> HeldOutCurve:
    """A curve whose first value is that of plain answers."""
    random, levels = np.random.default_rng(0), []
    for i, value in enumerate(values):
        by_prompt = tuple(value + random.normal(0, noise, 8))
        levels.append(
            Level(
                target=float(i) if i else None, beta=0.1 if i else None, reward=mean([guide[i] if guide else float(i)]),
                held_out=Mean(value, value - 0.1, value + 0.1), win_rate=Mean(0.5, 0.4, 0.6) if i else None,
                repeated_3grams=0.0, distinct_2=1.0, log_p_per_token=-1.0, tokens=10, looked_at_tokens=10.0 * i,
                out_of_reach=0.0, by_prompt=by_prompt,
            )
        )  # fmt: skip
    return HeldOutCurve(Vowels(), tuple(levels))


# --- the curve ---


@given(st.lists(st.floats(-10, 10, allow_subnormal=False), min_size=1, max_size=7))
def test_one_peak_is_fitted_by_least_squares(values: list[float]) -> None:
    def loss(fit: Any) -> float:
        return float(np.square(np.asarray(fit) - values).sum())

    found = unimodal(values)
    steps = np.sign(np.diff(found).round(12))
    assert not any(a < 0 < b for i, a in enumerate(steps) for b in steps[i + 1 :])
    best = min(
        loss([*isotonic_regression(values[:k]).x, *isotonic_regression(values[k:], increasing=False).x])
        if 0 < k < len(values)
        else loss(isotonic_regression(values, increasing=bool(k)).x)
        for k in range(len(values) + 1)
    )
    assert loss(found) == pytest.approx(best, abs=1e-6)


def test_the_target_is_the_lowest_one_as_good_as_the_peak() -> None:
    found = curve(0.0, 0.5, 0.8, 0.8001, 0.6, 0.3)
    assert found.peak.target == 3.0
    assert found.chosen == 2.0
    assert found.parting is not None
    assert found.parting.target == 5.0
    assert [found.is_beyond(target) for target in (1.0, 2.0, 3.0, 4.0, 5.0)] == [False] * 3 + [True] * 2
    assert "target 3" in found.conclusion
    assert "+2" in found.conclusion
    assert "-0.5" in found.conclusion


def test_what_is_not_seen_is_not_said() -> None:
    rising = curve(0.0, 0.2, 0.4, 0.6)
    assert (rising.peak.target, rising.chosen, rising.parting) == (3.0, 3.0, None)
    assert "still rises" in rising.conclusion
    noisy = curve(0.0, 0.5, 0.499, 0.498, noise=0.3)
    assert noisy.parting is None
    assert "clear fall was not seen" in noisy.conclusion
    falling_guide = curve(0.0, 0.5, 0.1, guide=(0.0, 1.0, 0.5))
    assert falling_guide.parting is None  # both fall: nothing is gamed
    useless = curve(0.5, 0.2, 0.1)
    assert (useless.peak.target, useless.chosen) == (None, 1.0)


def test_numbers_by_hand() -> None:
    assert repeated_3grams("a b c d") == 0.0
    assert repeated_3grams("A b c a B c") == pytest.approx(100 / 4)
    assert repeated_3grams("") == 0.0
    assert [points(1, 2), points(2, 1), points(1, 1)] == [0.0, 1.0, 0.5]


# --- the calibration ---


def test_the_target_before_the_peak_is_chosen(llm: CardsLLM, tmp_path: Path) -> None:
    found = llm.calibrate(PROMPTS, held_out=Vowels(wanted="some"), candidates=2, progress=False, remember=False)
    held_out = found.held_out
    assert held_out is not None
    plain, *levels = held_out.levels
    assert [level.target for level in levels] == pytest.approx(
        [found.scale.mean + stds * found.scale.std for stds in (0.5, 1.0, 1.5, 2.0, 2.5)]
    )
    assert plain.target is None
    assert plain.looked_at_tokens == plain.tokens
    assert levels[-1].reward.value > plain.reward.value + found.scale.std
    assert found.decoding.target_reward == found.chosen.target == held_out.chosen
    again = llm.align_batch(PROMPTS, range(len(PROMPTS)), decoding=found.decoding)
    chosen = next(level for level in levels if level.target == found.chosen.target)
    assert chosen.by_prompt == pytest.approx([-abs(vowels(a.text) - LIMIT) for a in again])
    assert chosen.repeated_3grams == pytest.approx(np.mean([repeated_3grams(a.text) for a in again]))
    assert chosen.win_rate is not None
    assert chosen.win_rate.value == np.mean(
        [points(*pair) for pair in zip(chosen.by_prompt, plain.by_prompt, strict=True)]
    )
    assert str(held_out) in str(found)
    found.save(tmp_path / "curve.csv")
    with (tmp_path / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["chosen"] for row in rows].count("True") == 1
    assert [float(row["held_out"]) for row in rows] == pytest.approx([e.held_out.value for e in held_out.levels])
    found.save(tmp_path / "report.html")
    assert len(found.plot().axes) == 5
    without = llm.calibrate(PROMPTS, held_out=None, candidates=2, progress=False, remember=False)
    assert without.held_out is None
    with pytest.raises(SettingsError, match="held_out"):
        without.save(tmp_path / "curve.csv")


def test_a_target_that_was_asked_for_is_lowered_where_it_harms(llm: CardsLLM) -> None:
    asked: dict[str, Any] = {"quantile": 0.95, "candidates": 2, "progress": False, "remember": False}
    harmed, helped = (llm.calibrate(PROMPTS, held_out=Vowels(wanted=each), **asked) for each in ("few", "many"))
    assert helped.held_out is not None
    assert helped.chosen.target == helped.held_out.targets[-1]
    assert harmed.chosen.target < helped.chosen.target
    assert any("lowered" in warning for warning in harmed.warnings)
    assert any("than plain answers have" in warning for warning in harmed.warnings)
    assert not any("lowered" in warning for warning in helped.warnings)


def test_the_judge_of_a_named_guide_is_looked_at_where_it_is_there(
    llm: CardsLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"targets": [0.1], "candidates": 2, "progress": False, "remember": False}
    assert llm.calibrate(PROMPTS, **asked).held_out is None  # nobody's judge is known
    monkeypatch.setitem(NAMED, "vowels", Vowels())
    monkeypatch.setitem(NAMED, "judge", Vowels(wanted="some"))
    monkeypatch.setitem(HELD_OUT, "vowels", "judge")
    found = llm.calibrate(PROMPTS, reward=GuardedReward(reward="vowels"), **asked)
    assert found.held_out is not None
    assert found.held_out.reward == NAMED["judge"]
    monkeypatch.setitem(NAMED, "judge", ClassifierReward(model="no-such/model"))
    without = llm.calibrate(PROMPTS, **asked)
    assert without.held_out is None
    assert any("no-such/model" in warning for warning in without.warnings)
    with pytest.raises(ModelError, match="no-such/model"):
        llm.calibrate(PROMPTS, held_out="judge", **asked)


def test_a_target_out_of_reach_is_said(llm: CardsLLM) -> None:
    found = llm.calibrate(
        PROMPTS, held_out=Vowels(), targets=[5.0], candidates=2, progress=False, remember=False,
    )  # fmt: skip
    assert found.held_out is not None
    assert found.held_out.levels[1].out_of_reach == 1.0
    assert any("100% of the answers at the chosen target have no accepted segment" in w for w in found.warnings)
    assert any("of the segments are predicted" in warning for warning in found.warnings)
    shares = [choice.predicted.best_of_rejected for choice in found.curve]
    assert 0 <= shares[0] < 0.2 < shares[-1] <= 1


def test_an_answer_says_that_its_target_was_out_of_reach(llm: CardsLLM) -> None:
    boundary = FixedLength(length=8)
    high, low = (
        llm.align("Hello", seed=1, decoding=Cards(target_reward=target, beta=0.01, max_rejections=2, boundary=boundary))
        for target in (5.0, -5.0)
    )
    assert high.out_of_reach
    assert {segment.drafts[-1].verdict for segment in high.segments} <= {"best", "rejected"}
    assert not low.out_of_reach
    assert not llm.align("Hello", seed=1, decoding="sampling").out_of_reach
    assert not llm.align("Hello", seed=1, decoding="best_of_n").out_of_reach
