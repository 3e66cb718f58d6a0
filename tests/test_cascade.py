"""Cascade: what its plans cost, and that a plan with a seed is a text; its search itself is in test_methods.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Start
from internals import assert_idle

from cards_integrations.decoding import AdaSearch, Cascade, as_decoding
from cards_integrations.decoding.search_plan import CountedTokens, plan_search
from cards_integrations.engine import Chunk, Request
from cards_integrations.errors import SettingsError
from cards_integrations.models.local import language_model
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward, FunctionReward
from cards_integrations.rewards.scorers import incremental
from cards_integrations.trace import Alignment, SearchPlan, SearchRound
from cards_integrations.transformer.step_times import StepTimes

PROMPT = "w9 w20 w31 w5"
ROOM = 36


@dataclass(frozen=True)
class Linear:
    """Step costs of a device that reads weights, and computes tokens."""

    fixed: float
    per_token: float
    reward: float = 1.0  # its size over that of the language model
    requests: int = 1

    def draft(self, width: int) -> float:
        return self.fixed + self.per_token * width * self.requests

    def score(self, tokens: int) -> float:
        return self.reward * (self.fixed + self.per_token * tokens * self.requests)


WIDE = Linear(3.4, 0.0174)
DEVICES = [WIDE, Linear(20, 1.1), Linear(3.4, 0.0174, requests=16), Linear(3.4, 0.0174, reward=0.0), Linear(1, 1)]


def cost(plan: SearchPlan, device: Linear) -> float:
    drafting = sum(each.tokens * device.draft(each.width) for each in plan.rounds)
    return drafting + sum(device.score(each.tokens * each.width) for each in plan.rounds if each.width > 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 7, 96, 1000])
@pytest.mark.parametrize("budget", [1.0, 1.1, 1.4, 3.0, 10.0])
def test_a_plan_costs_what_it_may(device: Linear, tokens: int, budget: float) -> None:
    plan = plan_search(budget, device, tokens)
    assert sum(each.tokens for each in plan.rounds) == tokens
    assert all(1 <= each.survivors <= each.width for each in plan.rounds)
    assert plan.rounds[-1].survivors == 1
    assert cost(plan, device) <= budget * tokens * device.draft(1) * (1 + 1e-9)


@pytest.mark.parametrize("device", DEVICES[:4])
def test_a_plan_spends_its_budget(device: Linear) -> None:
    assert cost(plan_search(3.0, device, 96), device) > 0.93 * 3.0 * 96 * device.draft(1)


def test_nothing_to_spend_is_a_plain_answer() -> None:
    assert plan_search(1.0, WIDE, 96) == SearchPlan((SearchRound(96, 1, 1),))
    assert plan_search(1.0, CountedTokens(), 96) == SearchPlan((SearchRound(96, 1, 1),))


def test_a_plan_is_narrower_beside_others() -> None:
    widths = [max(each.width for each in plan_search(1.4, Linear(3.4, 0.0174, 1.0, n), 96).rounds) for n in (1, 2, 16)]
    assert widths[0] > widths[1] > widths[2] > 1


def test_rounds_follow_from_the_price_of_a_reward() -> None:
    rounds = [len(plan_search(1.4, Linear(3.4, 0.0174, size), 96).rounds) for size in (0.0, 1.0, 2.0, 4.0, 8.0)]
    assert rounds == sorted(rounds, reverse=True)
    assert len(set(rounds)) == 4


def of_length(prompt: str, texts: Sequence[str]) -> list[float]:
    return [sum(map(ord, text)) % 97 / 97 for text in texts]


def flat(prompt: str, texts: Sequence[str]) -> list[float]:
    return [1.0] * len(texts)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model that knows no end of sequence, and a reward model for its texts."""
    folder, words = tmp_path_factory.mktemp("endless"), tiny.words(eos_token=None)
    model = tiny.save(folder / "model", tiny.causal(eos_token_id=None), words)
    return model, tiny.save(folder / "judge", tiny.classifier(), words)


def request(method: Cascade, reward: Any, seed: int = 0, max_tokens: int = ROOM) -> Request:
    return Request(PROMPT, method, reward, Sampler(temperature=1.0), max_tokens, seed=seed)


def drafted(plan: SearchPlan) -> int:
    return sum(each.tokens * each.width for each in plan.rounds)


def test_tokens_are_counted(endless: tuple[str, str], start: Start) -> None:
    engine, reward = start(endless[0], width=2), ClassifierReward(model=endless[1])
    for budget in (1, 2.5, 5):
        answer = engine.run(request(Cascade(budget=f"tokens:{budget}"), reward))
        assert answer.plan is not None
        assert answer.usage.drafted_tokens == drafted(answer.plan) <= budget * ROOM
        assert len(answer.token_ids) == ROOM
    assert_idle(engine)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    times = StepTimes({n: 3.4e-3 + 17.4e-6 * n for n in (1, 16, 64)})
    for module in (language_model, incremental):
        monkeypatch.setattr(module, "step_times", lambda what, model, measure: times)


def milliseconds(answer: Alignment) -> float:
    usage = answer.usage
    return 3.4 * (usage.lm_forwards + usage.rm_forwards) + 0.0174 * (usage.lm_tokens + usage.rm_tokens)


def test_an_answer_takes_the_time_that_it_may(endless: tuple[str, str], start: Start, timed: None) -> None:
    engine, reward = start(endless[0]), ClassifierReward(model=endless[1])
    plain = 96 * WIDE.draft(1)
    for budget in (1.2, 1.4, 2.0):
        answer = engine.run(request(Cascade(budget=budget), reward, max_tokens=96))
        assert budget - 0.06 < milliseconds(answer) / plain < budget + 0.06


def test_a_budget_that_buys_nothing_is_told_once(
    endless: tuple[str, str], start: Start, timed: None, caplog: pytest.LogCaptureFixture
) -> None:
    engine, reward = start(endless[0]), ClassifierReward(model=endless[1])
    for budget in (1.01, 1.01, 1.0, "tokens:1", 2.0):
        answer = engine.run(request(Cascade(budget=budget), reward))
        assert answer.plan is not None
        assert (drafted(answer.plan) > ROOM) == (budget == 2.0)
    told = [record.getMessage() for record in caplog.records]
    two = (ROOM * WIDE.draft(2) + WIDE.score(2 * ROOM)) / (ROOM * WIDE.draft(1))
    [said] = [each for each in told if "buys no second draft" in each]
    assert said.startswith("budget=1.01 ")
    assert f"costs {two:.1f} times a plain one" in said


def test_those_that_begin_together_count_each_other(endless: tuple[str, str], start: Start, timed: None) -> None:
    engine, reward = start(endless[0]), ClassifierReward(model=endless[1])
    by_time = Cascade(budget=1.4)
    alone = engine.run(request(by_time, reward))
    plans = {answer.plan for answer in engine.run_many([request(by_time, reward, seed) for seed in range(6)])}
    [together] = plans
    assert alone.plan is not None
    assert together is not None
    assert drafted(together) < drafted(alone.plan)


@pytest.mark.parametrize("width", [1, "auto"])
def test_a_plan_and_a_seed_are_a_text(endless: tuple[str, str], start: Start, width: int | str) -> None:
    reward = ClassifierReward(model=endless[1])
    engine = start(endless[0], width=width)
    first = [engine.run(request(Cascade(budget="tokens:4"), reward, seed)) for seed in range(3)]
    assert len({answer.text for answer in first}) == 3
    for answer in first:
        again = request(Cascade(plan=answer.plan), reward, answer.seed)
        others = [request(Cascade(budget=f"tokens:{n}"), reward, n) for n in (2, 3)]
        for same in (engine.run(again), engine.run_many([*others, again])[-1]):
            assert (same.text, same.plan, same.token_ids) == (answer.text, answer.plan, answer.token_ids)
    assert_idle(engine)


def test_a_plan_goes_through_settings() -> None:
    method = Cascade(plan=SearchPlan((SearchRound(4, 3, 2), SearchRound(4, 6, 1))))
    assert as_decoding(method.model_dump_json()) == method
    assert as_decoding({"method": "cascade", "budget": "2"}) == Cascade(budget=2.0)


def test_a_longer_answer_goes_on_with_the_best(endless: tuple[str, str], start: Start) -> None:
    plan = SearchPlan((SearchRound(4, 6, 3), SearchRound(4, 6, 3)))
    answer = start(endless[0]).run(request(Cascade(plan=plan), FunctionReward(function=of_length)))
    assert [len(segment.token_ids) for segment in answer.segments] == [4, 4, ROOM - 8]
    assert answer.usage.drafted_tokens == 2 * 4 * 6 + ROOM - 8
    last = answer.segments[1]
    assert last.reward == max(draft.reward or 0.0 for draft in last.drafts)


def test_where_nothing_is_gained_less_is_drafted(endless: tuple[str, str], start: Start) -> None:
    engine, plan = start(endless[0]), SearchPlan(tuple(SearchRound(6, 8, 3) for _ in range(6)))
    same = engine.run(request(Cascade(plan=plan), FunctionReward(function=flat)))
    assert same.usage.drafted_tokens == 6 * (8 + 5 * 4)
    other = engine.run(request(Cascade(plan=plan), FunctionReward(function=of_length)))
    assert other.usage.drafted_tokens == 6 * 8 * 6


def test_what_all_prefixes_share_is_streamed(endless: tuple[str, str], start: Start) -> None:
    chunks: list[Chunk] = []
    plan = SearchPlan(tuple(SearchRound(4, 6, 2) for _ in range(9)))
    engine = start(endless[0])
    answer = engine.run(request(Cascade(plan=plan), ClassifierReward(model=endless[1])), chunks.append)
    assert "".join(chunk.text for chunk in chunks) == answer.text
    assert len(chunks) == 9
    assert all(chunk.segment == segment for chunk, segment in zip(chunks, answer.segments, strict=True))


def test_without_times_there_is_no_budget_of_time(endless: tuple[str, str], start: Start) -> None:
    engine, reward = start(endless[0], width=2), FunctionReward(function=of_length)
    with pytest.raises(SettingsError, match=r"width='auto'.*budget='tokens:5'"):
        engine.run(request(Cascade(budget=1.4), reward))
    assert engine.run(request(Cascade(budget="tokens:2"), reward)).text
    assert_idle(engine)


@pytest.mark.parametrize("budget", [0.5, "tokens", "tokens:0.5", "tokens:-1", "1.4x", float("nan"), "0.2", 1e9])
def test_budgets_that_mean_nothing(budget: Any) -> None:
    with pytest.raises(SettingsError, match="budget"):
        Cascade(budget=budget)


def test_greedy_text_is_that_of_the_model(models: Callable[..., str], start: Start, tmp_path: Path) -> None:
    engine = start(models("llama"))
    asked = [
        Request(PROMPT, Cascade(budget=b), FunctionReward(function=of_length), Sampler(temperature=0), 12, seed=1)
        for b in ("tokens:1", "tokens:6")
    ]
    plain, wide = engine.run_many(asked)
    assert plain.text == wide.text
    assert_idle(engine)


def test_schedules_of_blocks() -> None:
    def widths(**settings: Any) -> list[tuple[int, int, int]]:
        rounds = AdaSearch(**settings).plan_for(96).rounds
        return [(each.tokens, each.width, each.survivors) for each in rounds]

    assert widths() == [(32, 27, 1), (32, 14, 1), (32, 7, 1)]
    assert widths(schedule="growth", beams=3) == [(32, 7, 3), (32, 14, 3), (32, 27, 1)]
    assert widths(schedule="uniform", n=5, blocks=4, beams=9) == [(24, 5, 5)] * 3 + [(24, 5, 1)]
    assert AdaSearch(blocks=8).plan_for(3).rounds[-1].tokens == 1
