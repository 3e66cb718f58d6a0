"""The formulas of the paper, each by itself: uncertainty, threshold, acceptance, sampling, randomness, stops."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy, kstest

from cards_integrations.chat.stop_strings import StopStrings
from cards_integrations.decoding import (
    Acceptance,
    Cards,
    FixedLength,
    OptimalStopping,
    Punctuation,
    Threshold,
    Uncertainty,
)
from cards_integrations.decoding.base import Scale
from cards_integrations.errors import SettingsError
from cards_integrations.models.randomness import Uniforms
from cards_integrations.models.sampling import Sampler, _largest, draw
from cards_integrations.uncertainty import uncertainty

LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=30)
REWARD = st.floats(-1e3, 1e3)

# --- where a segment ends ---


@given(LOGITS)
def test_uncertainty_is_read_from_the_raw_logits(values: list[float]) -> None:
    logits = torch.tensor([values, values[::-1]])
    p = torch.tensor(values, dtype=torch.double).softmax(-1)
    expected: dict[Any, float] = {
        "entropy": entropy(p.numpy()),
        "max_probability": 1 - float(p.max()),
        "evidential": len(values) / sum(max(v, 0) + 1 for v in values),
    }
    for measure, value in expected.items():
        assert uncertainty(measure, logits, logits.log_softmax(-1)).tolist() == pytest.approx([value] * 2, abs=1e-4)


def test_a_segment_ends_at_the_threshold_itself() -> None:
    uniform = torch.ones(2, 8)
    uniform[1, 0] = 6.0
    for measure in ("entropy", "max_probability", "evidential"):
        reached = float(uncertainty(measure, uniform, uniform.log_softmax(-1))[0])
        assert Uncertainty(measure=measure, threshold=reached).ends_before(
            uniform, uniform.log_softmax(-1), [0, 1]
        ).tolist() == [True, False]
        assert Uncertainty(measure=measure, threshold=reached + 1e-4).ends_before(
            uniform, uniform.log_softmax(-1), [0, 1]
        ).tolist() == [False, False]


def test_other_boundaries() -> None:
    assert Punctuation().ends_after("The end.")
    assert not Punctuation().ends_after("The end. ")
    assert Punctuation(marks=("\n\n",)).ends_after("a\n\n")
    assert FixedLength(length=5).min_tokens == FixedLength(length=5).max_tokens == 5
    assert FixedLength(length=5).ends_before(torch.zeros(1, 8), torch.zeros(1, 8), [0]) is None


@pytest.mark.parametrize(
    "wrong",
    [{"min_length": 9, "max_length": 8}, {"min_length": 0}, {"threshold": math.nan}, {"measure": "guess"}, {"size": 3}],
)
def test_wrong_boundaries(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        Uncertainty.model_validate(wrong)


# --- the threshold and the two rules ---


@given(REWARD, REWARD, st.floats(0, 1), st.integers(1, 500))
def test_the_threshold_rises_to_the_target(prompt: float, target: float, alpha: float, length: int) -> None:
    threshold = Threshold.adaptive(prompt, target, alpha, length)
    taus = [threshold.at(tokens) for tokens in range(length + 1)]
    start = (1 - alpha) * prompt + alpha * target
    assert taus[0] == pytest.approx(min(start, target), abs=1e-9)
    assert taus[-1] == pytest.approx(target, abs=1e-9)
    assert max(taus) <= target
    assert all(b >= a - 1e-6 for a, b in pairwise(taus))
    half = length // 2
    assert taus[half] == pytest.approx(min(start + half * (target - start) / length, target), abs=1e-9)


@given(REWARD, REWARD, st.floats(1e-3, 1e3))
def test_acceptance(reward: float, threshold: float, beta: float) -> None:
    soft, hard = Acceptance("soft", beta), Acceptance("hard", beta)
    assert soft.probability(reward, threshold) == pytest.approx(math.exp(min(0.0, (reward - threshold) / beta)))
    assert hard.probability(reward, threshold) == (reward >= threshold)
    chance = soft.probability(reward, threshold)
    assert soft(reward, threshold, math.nextafter(chance, 0)) or chance == 0
    assert not soft(reward, threshold, chance) or chance == 1


def test_the_paper_s_settings() -> None:
    paper = Cards.paper(target_reward=9.0)
    assert (paper.target_reward, paper.alpha, paper.beta, paper.max_rejections) == (9.0, 0.5, 0.7, 20)
    assert paper.boundary == Uncertainty(measure="entropy", threshold=3.0, min_length=4, max_length=64)
    assert paper.acceptance == "soft"


def test_auto_follows_the_scale_of_the_reward() -> None:
    class Scaled:
        reward_scale: Scale | None = Scale(mean=1.0, std=0.5)

    scaled: Any = Scaled()
    target, beta = Cards().target_and_beta(scaled)
    assert 1.0 < target <= 2.0
    assert 0 < beta < 0.5
    assert Cards(target_reward=7.0, beta=0.2).target_and_beta(scaled) == (7.0, 0.2)
    Scaled.reward_scale = Scale(mean=1.0, std=0.5, target=3.0, beta=0.25)  # a calibration has chosen
    assert Cards().target_and_beta(scaled) == (3.0, 0.25)
    assert Cards(target_reward=7.0, beta=0.2).target_and_beta(scaled) == (7.0, 0.2)
    Scaled.reward_scale = Scale(mean=1.0, std=0.0)  # nothing to go by
    assert Cards().target_and_beta(scaled) == (1.0, 0.7)


def test_which_settings_need_the_scale() -> None:
    assert Cards().needs_scale
    assert Cards(target_reward=1.0).needs_scale
    assert Cards(beta=1.0).needs_scale
    assert not Cards(target_reward=1.0, beta=1.0).needs_scale
    assert not Cards(target_reward=1.0, acceptance="hard").needs_scale
    assert not Cards(acceptance=OptimalStopping(price=0.1)).needs_scale


def test_a_search_rule_takes_no_settings_of_quasi_rejection() -> None:
    rule = OptimalStopping(price=0.1)
    for unused in ({"target_reward": 2.0}, {"alpha": 0.1}, {"beta": 0.3}):
        with pytest.raises(SettingsError, match=f"OptimalStopping.* no use of {min(unused)}: leave"):
            Cards(acceptance=rule, **unused)
    saved = Cards(acceptance=rule).model_dump()
    assert Cards(**saved) == Cards(acceptance=rule)  # its defaults are no choice


# --- tokens ---


@settings(max_examples=50)
@given(LOGITS, st.integers(0, 12), st.floats(0.1, 3))
def test_each_token_gets_its_share_of_the_uniforms(values: list[float], top_k: int, temperature: float) -> None:
    """Uniforms on a fine grid: every token is drawn as often as its probability says, to one point of the grid."""
    grid = 2000
    logits = torch.tensor(values)
    uniforms = ((torch.arange(grid, dtype=torch.double) + 0.5) / grid).tolist()
    drawn = draw([Sampler(temperature=temperature, top_k=top_k)] * grid, logits[None], [0] * grid, uniforms)
    assert drawn.tolist() == sorted(drawn.tolist())  # in order of their id
    shares = torch.bincount(drawn, minlength=len(values)) / grid
    kept = logits.topk(top_k).indices if 0 < top_k < len(values) else torch.arange(len(values))
    expected = torch.zeros(len(values), dtype=torch.double)
    expected[kept] = (logits[kept].double() / temperature).softmax(-1)
    assert (shares - expected).abs().max() < 1.01 / grid


def test_the_ends_of_the_unit_interval() -> None:
    logits, rows, ends = torch.tensor([[-1e4, 1.0, 2.0, -1e4]]), [0, 0], [0.0, 1 - 2**-53]
    assert draw([Sampler(temperature=1.0, top_k=0)] * 2, logits, rows, ends).tolist() == [1, 2]
    assert draw([Sampler(temperature=0)] * 2, logits, rows, ends).tolist() == [2, 2]


def test_the_largest_logits_of_a_large_vocabulary() -> None:
    torch.manual_seed(0)
    for vocabulary in (128 * 40, 128 * 41, 128 * 400, 128 * 400 + 1):
        logits = torch.randn(5, vocabulary)
        logits[0, :60] += 100  # many of them in one block
        assert torch.equal(_largest(logits, 40).sort().values, logits.topk(40).indices.sort().values)


def test_uniforms_depend_on_their_place_only() -> None:
    forwards, backwards = Uniforms(7, 1, 2), Uniforms(7, 1, 2)
    there = [forwards[i] for i in range(200)]
    back = [backwards[i] for i in reversed(range(200))]
    assert there == back[::-1]
    assert forwards.verdict == backwards.verdict == Uniforms(7 + 2**64, 1, 2).verdict
    streams = [Uniforms(seed, segment, draft) for seed in range(12) for segment in range(12) for draft in range(12)]
    numbers = [stream.verdict for stream in streams] + [stream[i] for stream in streams for i in range(4)]
    assert len(set(numbers)) == len(numbers)
    assert kstest(numbers, "uniform").pvalue > 0.01


# --- stop strings ---


@given(st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=8), st.text("ab ", min_size=1, max_size=5))
def test_nothing_is_shown_that_a_stop_string_takes_back(pieces: list[str], stop: str) -> None:
    stops, text = StopStrings((stop, "never")), ""
    shown = 0
    for piece in pieces:
        before, text = len(text), text + piece
        at = stops.find(text, before)
        assert (at if at is not None else -1) == text.find(stop)
        if at is not None:
            assert at >= shown
            return
        shown = len(text) - stops.held_back(text)
        held = text[shown:]
        assert held == max((s for s in (stop[:n] for n in range(len(stop))) if text.endswith(s)), key=len)
