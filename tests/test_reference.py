"""The engine writes, token for token, what a naive transcription of the paper writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import reference
from conftest import Start
from speculator import Eager
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from cards_integrations.decoding import Boundary, Cards, FixedLength, Punctuation, Uncertainty
from cards_integrations.engine import Request
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward
from cards_integrations.trace import Alignment

BOUNDARIES: list[Boundary] = [
    Uncertainty(threshold=2.95, min_length=2, max_length=8),
    Uncertainty(measure="max_probability", threshold=0.815, min_length=1, max_length=6),
    Uncertainty(measure="evidential", threshold=0.62, min_length=2, max_length=7),
    FixedLength(length=3),
    Punctuation(min_length=1, max_length=6),
]
TARGETS = {"llama": 0.5, "gpt2": 1.5}  # about the 0.8 quantile of each reward model
ROOM = 20  # max_tokens
SAMPLER = Sampler(temperature=1.0, top_k=40)


@dataclass
class Case:
    request: Request
    expected: list[int]
    segments: list[list[reference.Draft]]


@dataclass
class Cases:
    model: str
    of: list[Case]

    @property
    def requests(self) -> list[Request]:
        return [case.request for case in self.of]


def methods(target: float) -> list[Cards]:
    """16 settings: each boundary soft and hard, the paper's, a cap met early, and targets out of reach."""
    both = [
        Cards(target_reward=target, beta=0.3, acceptance=rule, boundary=boundary)
        for boundary in BOUNDARIES
        for rule in ("soft", "hard")
    ]
    soft = Cards(target_reward=target, beta=0.3, boundary=BOUNDARIES[0])
    return [
        *both,
        Cards.paper(target_reward=target),
        Cards.paper(target_reward=target + 4),
        soft.model_copy(update={"max_rejections": 2}),
        soft.model_copy(update={"max_rejections": 0}),
        soft.model_copy(update={"alpha": 0.0}),
        Cards(target_reward=target + 9, acceptance="hard", boundary=FixedLength(length=4)),
    ]


def written_naively(
    model: str, classifier: str, prompt: str, methods: Sequence[Cards], max_tokens: int, sampler: Sampler
) -> Cases:
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = AutoModelForCausalLM.from_pretrained(model).eval(), tokenizer
    judge = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    prompt_ids = tokenizer(prompt)["input_ids"]
    cases = []
    for seed, method in enumerate(methods):
        loop = reference.plain(*plain, judge, prompt_ids, temperature=sampler.temperature, top_k=sampler.top_k)
        expected = loop.generate(prompt_ids, method, max_tokens, seed)
        request = Request(prompt, method, ClassifierReward(model=classifier), sampler, max_tokens, seed=seed)
        cases.append(Case(request, expected, loop.segments))
    return Cases(model, cases)


@pytest.fixture(scope="module", params=[*TARGETS])
def tiny_cases(request: pytest.FixtureRequest, models: Callable[..., str]) -> Cases:
    family = request.param
    folders = models(family), models(family, classifier=True)
    return written_naively(*folders, "w9 w20 w31 w5", methods(TARGETS[family]), ROOM, SAMPLER)


@pytest.fixture(scope="module")
def stories_cases(shared_models: Path) -> Cases:
    boundary = Uncertainty(threshold=2.5, max_length=16)
    chosen = [Cards(target_reward=0.7, beta=beta, boundary=boundary) for beta in (0.05, 0.1, 0.2)]
    folders = str(shared_models / "stories260k"), str(shared_models / "rm-sentiment-stories260k")
    return written_naively(*folders, "Tom was sad.", chosen, 40, Sampler(temperature=0.9))


def assert_same(written: Sequence[Alignment], cases: Cases) -> None:
    for alignment, case in zip(written, cases.of, strict=True):
        assert list(alignment.token_ids) == case.expected
        for segment, drafts in zip(alignment.segments, case.segments, strict=True):
            assert [list(d.token_ids) for d in segment.drafts] == [d.ids for d in drafts]
            assert {d.verdict for d in segment.drafts} == {d.verdict for d in drafts}
            assert [d.reward for d in segment.drafts] == pytest.approx([d.reward for d in drafts], abs=1e-4)


@pytest.mark.parametrize("width", [1, 8, "auto"])
def test_alone(tiny_cases: Cases, start: Start, width: int | str) -> None:
    engine = start(tiny_cases.model, width=width)
    assert_same([engine.run(request) for request in tiny_cases.requests], tiny_cases)


@pytest.mark.parametrize("width", [1, 8, "auto"])
def test_sixteen_at_once(tiny_cases: Cases, start: Start, width: int | str) -> None:
    engine = start(tiny_cases.model, width=width)
    assert len(tiny_cases.requests) == 16
    assert_same(engine.run_many(tiny_cases.requests), tiny_cases)


@pytest.mark.parametrize("width", [1, "auto"])
def test_trained_models(stories_cases: Cases, start: Start, width: int | str) -> None:
    engine = start(stories_cases.model, width=width)
    assert_same([engine.run(request) for request in stories_cases.requests], stories_cases)
    assert_same(engine.run_many(stories_cases.requests), stories_cases)


def test_drafting_ahead_of_every_verdict(tiny_cases: Cases, start: Start) -> None:
    """Candidates that follow unjudged ones are drafted and kept, in every way there is to end."""
    engine = start(tiny_cases.model)
    eager = Eager(engine, most=12, wait=3)
    written = [engine.run(request) for request in tiny_cases.requests]
    assert_same(written, tiny_cases)
    after_best = [
        candidate
        for alignment, kept in zip(written, eager.kept.values(), strict=True)
        for segment, candidate in zip(alignment.segments, kept[1:], strict=False)
        if all(draft.verdict != "accepted" for draft in segment.drafts)
    ]
    assert len(eager.ahead) > len(eager.adopted) > 16
    assert {candidate.finish for candidate in eager.adopted} == {None, "stop", "length"}
    assert any(candidate in eager.ahead for candidate in after_best)  # nobody could know that it would be the best
    assert any(candidate.index > 0 for candidate in eager.adopted)
    assert any(candidate.parent in eager.adopted for candidate in eager.adopted)


@pytest.mark.parametrize(("most", "wait"), [(100, 1), (40, 7)])
def test_drafting_ahead_sixteen_at_once(tiny_cases: Cases, start: Start, most: int, wait: int) -> None:
    engine = start(tiny_cases.model)
    eager = Eager(engine, most, wait)
    assert_same(engine.run_many(tiny_cases.requests), tiny_cases)
    assert len(eager.ahead) > len(eager.adopted) > 0


def test_the_cases_reach_every_rule(tiny_cases: Cases) -> None:
    segments = [drafts for case in tiny_cases.of for drafts in case.segments]
    drafts = [draft for segment in segments for draft in segment]
    kept = [draft for draft in drafts if draft.verdict != "rejected"]
    assert {draft.verdict for draft in drafts} == {"accepted", "rejected", "best"}
    assert {draft.ended for draft in kept} == {"boundary", "length", "eos"}
    assert len({len(draft.ids) for draft in kept}) >= 7
    assert any(len(segment) == 21 and segment[-1].verdict == "rejected" for segment in segments)  # an earlier is best
    assert any(len(case.expected) < ROOM for case in tiny_cases.of)
    assert any(len(case.expected) == ROOM for case in tiny_cases.of)
