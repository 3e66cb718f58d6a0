"""Calibration foresees what CARDS then does, follows the scale of a reward, and says where it cannot know."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from typer.testing import CliRunner

from cards_integrations import CardsLLM
from cards_integrations.cli import app, main
from cards_integrations.decoding import Cards, Uncertainty
from cards_integrations.engine import EngineSettings, scale_store
from cards_integrations.errors import SettingsError
from cards_integrations.rewards import ClassifierReward, FunctionReward, WeightedReward
from cards_integrations.study.calibration import Calibration
from cards_integrations.study.simulation import Prediction
from cards_integrations.trace import Alignment

WHO = ["Tom", "Lily", "The big dog", "Mom", "A little bird", "Ben", "The old man", "Sue"]
DID = ["went to the park", "found a box", "was very sad", "saw a cat", "had a red ball", "wanted to play",
       "made a cake", "looked at the rain"]  # fmt: skip
PROMPTS = random.Random(0).sample([f"{who} {did}" for did in DID for who in WHO], 64)
LEARNT_ON, TRIED_ON = PROMPTS[:40], PROMPTS[40:]
FAST = EngineSettings(dtype="float32")


@pytest.fixture(autouse=True)
def scales_of_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_store, "cache_dir", lambda: tmp_path / "cache")


@pytest.fixture(scope="module")
def stories(shared_models: Path) -> Iterator[CardsLLM]:
    judge = ClassifierReward(model=str(shared_models / "rm-sentiment-stories260k"))
    with CardsLLM(
        model=str(shared_models / "stories260k"), reward=judge, max_tokens=48, temperature=0.9, engine=FAST,
        decoding=Cards(boundary=Uncertainty(threshold=2.9)),
    ) as llm:  # fmt: skip
        yield llm


@pytest.fixture(scope="module")
def by_default(stories: CardsLLM) -> Calibration:
    """The calibration that nothing is asked of."""
    return stories.calibrate(LEARNT_ON, progress=False, remember=False)


@pytest.fixture
def words(models: Callable[..., str]) -> Iterator[CardsLLM]:
    """A random model, and a reward that counts a word."""
    reward = FunctionReward(function=lambda prompt, texts: [float(text.count("w1")) for text in texts])
    with CardsLLM(model=models("llama"), reward=reward, max_tokens=16, engine=FAST) as llm:
        yield llm


def measured(answers: list[Alignment]) -> Prediction:
    drafts = [draft for answer in answers for segment in answer.segments for draft in segment.drafts]
    return Prediction(
        sum(draft.verdict == "accepted" for draft in drafts) / len(drafts),
        statistics.fmean(len(answer.token_ids) for answer in answers),
        sum(len(draft.token_ids) for draft in drafts) / len(answers),
        1 + len(drafts) / len(answers),
        statistics.fmean(answer.reward or 0 for answer in answers),
    )


def test_what_is_predicted_is_what_happens_on_other_prompts(stories: CardsLLM) -> None:
    budget = 3.0
    found = stories.calibrate(LEARNT_ON, budget=budget, progress=False)
    assert found.chosen.predicted.drafted_tokens <= budget * found.plain.kept_tokens
    answers = stories.align_batch(TRIED_ON * 4, range(1000, 1000 + 4 * len(TRIED_ON)), decoding=found.decoding)
    happened, predicted = measured(answers), found.chosen.predicted
    assert happened.acceptance == pytest.approx(predicted.acceptance, rel=0.25)
    assert happened.drafted_tokens == pytest.approx(predicted.drafted_tokens, rel=0.25)
    assert happened.rm_calls == pytest.approx(predicted.rm_calls, rel=0.25)
    assert happened.reward == pytest.approx(predicted.reward, abs=0.4 * found.scale.std)
    assert happened.reward > found.scale.mean


def test_another_scale_gives_the_same_answers(stories: CardsLLM, by_default: Calibration) -> None:
    """The same reward times 100 plus 7."""
    own = stories.reward
    assert isinstance(own, ClassifierReward)
    other = WeightedReward(rewards=[own.model_copy(update={"scale": (-0.07, 0.01)})], weights=[1.0])
    one, two = by_default, stories.calibrate(LEARNT_ON, reward=other, progress=False)
    assert two.scale.mean == pytest.approx(100 * one.scale.mean + 7, rel=1e-3)
    assert two.chosen.target == pytest.approx(100 * one.chosen.target + 7, rel=1e-3)
    assert two.chosen.beta == pytest.approx(100 * one.chosen.beta, rel=1e-3)
    assert two.chosen.predicted.acceptance == pytest.approx(one.chosen.predicted.acceptance, abs=0.02)


def test_a_wanted_reward_costs_more_the_higher_it_is(stories: CardsLLM) -> None:
    low, high = (stories.calibrate(LEARNT_ON, goal=wanted, progress=False, remember=False) for wanted in (0.1, 0.5))
    assert low.chosen.predicted.reward >= 0.1
    assert high.chosen.predicted.reward >= 0.5
    assert low.chosen.predicted.drafted_tokens < high.chosen.predicted.drafted_tokens
    unreachable = stories.calibrate(LEARNT_ON, goal=99.0, progress=False, remember=False)
    assert any("99" in warning for warning in unreachable.warnings)


def test_a_wanted_segment_length(stories: CardsLLM) -> None:
    short, long = (stories.calibrate(LEARNT_ON, segment_length=n, progress=False, remember=False) for n in (6.0, 14.0))
    assert statistics.fmean(short.segment_lengths) == pytest.approx(6, rel=0.2)
    assert statistics.fmean(long.segment_lengths) == pytest.approx(14, rel=0.2)
    assert short.boundary.threshold < long.boundary.threshold
    with pytest.raises(SettingsError, match="segment_length=99"):
        stories.calibrate(LEARNT_ON, segment_length=99, progress=False)


def test_auto_takes_what_was_remembered(stories: CardsLLM) -> None:
    found = stories.calibrate(LEARNT_ON, quantile=0.6, progress=False)
    auto = stories.align(TRIED_ON[0], seed=3, decoding=Cards(boundary=found.boundary))
    assert auto.token_ids == stories.align(TRIED_ON[0], seed=3, decoding=found.decoding).token_ids
    assert auto.segments[-1].threshold is not None
    assert auto.segments[-1].threshold <= found.chosen.target
    assert found.chosen.target == pytest.approx(found.scale.mean, abs=found.scale.std)


def test_a_beginning_that_says_nothing_is_warned_of(words: CardsLLM) -> None:
    """The reward of a text is a hash of it."""
    found = words.calibrate(
        [f"w{i} w{i + 1}" for i in range(3, 43)], progress=False,
        reward=FunctionReward(function=lambda prompt, texts: [crc32(text.encode()) % 1000 for text in texts]),
    )  # fmt: skip
    assert any("best-of-N" in warning for warning in found.warnings)
    constant = words.calibrate(
        ["w3"] * 8, progress=False, reward=FunctionReward(function=lambda prompt, texts: [1.0] * len(texts))
    )
    assert any("cannot guide" in warning for warning in constant.warnings)


def test_settings_that_were_found_can_be_read(stories: CardsLLM, by_default: Calibration, tmp_path: Path) -> None:
    found = by_default
    found.to_yaml(tmp_path / "cards.yaml")
    read = CardsLLM.from_settings(tmp_path / "cards.yaml")
    assert (read.model, read.reward, read.decoding, read.max_tokens) == (
        stories.model, stories.reward, found.decoding, 48,
    )  # fmt: skip
    assert "# Predicted" in (tmp_path / "cards.yaml").read_text()
    for name in ("report.png", "report.html"):
        found.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 10_000
    hostile = found.reward.model_copy(update={"model": "<script>alert(1)</script>"})
    type(found)(**{**vars(found), "reward": hostile}).save(tmp_path / "hostile.html")
    assert "<script>" not in (tmp_path / "hostile.html").read_text()


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"budget": 2, "quantile": 0.5}, "one of"), ({"prompts": ["w1"]}, "at least 8"), ({"reward": None}, "reward")],
)
def test_bad_requests(words: CardsLLM, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        words.calibrate(asked.pop("prompts", ["w3"] * 8), progress=False, **asked)


# --- the command ---


def test_the_command(shared_models: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in LEARNT_ON[:8]))
    (tmp_path / "in.yaml").write_text(
        f"model: {shared_models / 'stories260k'}\nreward: {shared_models / 'rm-sentiment-stories260k'}\n"
    )
    ran = CliRunner().invoke(
        app,
        ["calibrate", "--config", f"{tmp_path / 'in.yaml'}", "--max-tokens", "24", "--budget", "3", "--json",
         "--prompts", f"{tmp_path / 'prompts.jsonl'}", "--out", f"{tmp_path / 'out.yaml'}",
         "--report", f"{tmp_path / 'out.html'}"],
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    decoding: Any = CardsLLM.from_settings(tmp_path / "out.yaml").decoding
    assert json.loads(ran.stdout)["decoding"]["target_reward"] == decoding.target_reward
    assert (tmp_path / "out.html").exists()


def test_the_command_ends_with_one_line_and_a_code(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["cards", "calibrate", "--prompts", "nowhere.txt"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "nowhere.txt" in capsys.readouterr().err
