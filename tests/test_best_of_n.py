"""Best-of-N writes, token for token, the best of N answers that plain forwards draw."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import reference
from conftest import Start
from speculator import Watch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from cards_integrations.decoding import BestOfN, FixedLength
from cards_integrations.engine import Request
from cards_integrations.models.local.language_model import LONG
from cards_integrations.models.randomness import Uniforms
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward, FunctionReward
from cards_integrations.trace import Alignment

PROMPT = "w9 w20 w31 w5"
SEEDS = range(2)
SAMPLER = Sampler(temperature=1.0)
N = 8
SHORT_ROOM, LONG_ROOM = 40, LONG + 14


@dataclass
class Naive:
    """The first N drafts of each seed, with their rewards."""

    model: str
    classifier: str
    room: int
    drafts: dict[int, list[reference.Draft]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        judge = AutoModelForSequenceClassification.from_pretrained(self.classifier).eval()
        prompt = tokenizer(PROMPT)["input_ids"]
        plain = AutoModelForCausalLM.from_pretrained(self.model).eval()
        loop = reference.plain(plain, tokenizer, judge, prompt, temperature=1.0)
        for seed in SEEDS:
            whole = FixedLength(length=self.room)
            self.drafts[seed] = [loop.draft(prompt, [], whole, self.room, Uniforms(seed, 0, i)) for i in range(N)]
            for draft in self.drafts[seed]:
                draft.reward = loop.reward(draft.ids)

    def request(self, seed: int, n: int) -> Request:
        reward = ClassifierReward(model=self.classifier)
        return Request(PROMPT, BestOfN(n=n), reward, SAMPLER, self.room, seed=seed)

    def assert_best(self, alignment: Alignment, n: int) -> None:
        expected = self.drafts[alignment.seed][:n]
        best = max(expected, key=lambda draft: draft.reward)
        assert list(alignment.token_ids) == best.ids
        assert alignment.reward == pytest.approx(best.reward, abs=1e-4)
        assert alignment.finish_reason == ("stop" if best.ended == "eos" else "length")
        [segment] = alignment.segments
        assert [list(draft.token_ids) for draft in segment.drafts] == [draft.ids for draft in expected]
        assert [draft.reward for draft in segment.drafts] == pytest.approx([d.reward for d in expected], abs=1e-4)
        assert alignment.usage.drafts == n


@pytest.fixture(scope="module", params=[SHORT_ROOM, LONG_ROOM], ids=["short", "long"])
def naive(request: pytest.FixtureRequest, models: Callable[..., str]) -> Naive:
    return Naive(models("llama"), models("llama", classifier=True), request.param)


@pytest.mark.parametrize("width", [1, "auto", N])
def test_the_best_of_all_is_kept(naive: Naive, start: Start, width: int | str) -> None:
    """Long candidates draft in rows of their own, and that changes nothing."""
    engine = start(naive.model, width=width)
    watch = Watch(engine)
    for n in (1, N):
        for seed in SEEDS:
            naive.assert_best(engine.run(naive.request(seed, n)), n)
    assert (watch.rows > 1) == (naive.room > LONG)
    assert watch.rows == N or naive.room <= LONG or width != N
    for alignment in engine.run_many([naive.request(seed, N) for seed in SEEDS]):
        naive.assert_best(alignment, N)


def test_the_cases_end_in_both_ways(naive: Naive) -> None:
    drafts = [draft for drafts in naive.drafts.values() for draft in drafts]
    best = [max(range(N), key=lambda i: drafts[i].reward) for drafts in naive.drafts.values()]
    assert {draft.ended for draft in drafts} == {"eos", "length"}
    assert len(set(best)) > 1
    assert all(len(draft.ids) == naive.room for draft in drafts if draft.ended == "length")


@pytest.mark.parametrize("width", [1, "auto"])
def test_ties_go_to_the_first(models: Callable[..., str], start: Start, width: int | str) -> None:
    """Rewards of two values only: among the many with the higher one, the first is kept."""

    def parity(prompt: str, texts: list[str]) -> list[float]:
        return [float(len(text.split()) % 2) for text in texts]

    engine, tied = start(models("llama"), width=width), 0
    for seed in range(4):
        judge = FunctionReward(function=parity)
        alignment = engine.run(Request(PROMPT, BestOfN(n=12), judge, SAMPLER, 12, seed=seed))
        drafts = alignment.segments[0].drafts
        rewards = [-math.inf if draft.reward is None else draft.reward for draft in drafts]
        first = rewards.index(max(rewards))
        assert [draft.verdict for draft in drafts] == ["best" if i == first else "rejected" for i in range(12)]
        assert alignment.token_ids == drafts[first].token_ids
        tied += rewards.count(rewards[first]) > 1 and first > 0
    assert tied > 0
