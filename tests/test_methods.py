"""Every method writes what a naive transcription of its paper writes, has its law, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import naive
import naive_methods
import numpy as np
import pytest
import reference
import tiny
import torch
from conftest import Start
from internals import assert_idle, caches, is_idle, until
from naive import Freed
from reference import Ids
from speculator import Eager, Watch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from cards_integrations.chat.grammar import Grammar
from cards_integrations.decoding import (
    METHODS,
    AdaSearch,
    Args,
    Cascade,
    Decoding,
    FixedLength,
    Particles,
    Punctuation,
    Rain,
    RejectionSampling,
    Sampling,
    SegmentBestOfN,
    SpeculativeRejection,
    TreeBoN,
    Uncertainty,
    as_decoding,
    particles,
)
from cards_integrations.decoding.base import Draft
from cards_integrations.decoding.resampling import (
    effective_sample_size,
    normalized,
    systematic_resampling,
    weighted_choice,
)
from cards_integrations.engine import Request
from cards_integrations.engine.request import Chunk
from cards_integrations.errors import CardsError, EngineClosed, RewardError, SettingsError
from cards_integrations.models.local.language_model import LONG
from cards_integrations.models.randomness import Uniforms
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward, FunctionReward, Reward, WeightedReward
from cards_integrations.settings import CardsSettings
from cards_integrations.trace import Alignment, SearchPlan, SearchRound

EAGER = {"attn_implementation": "eager"}  # what transformers 5.17 takes for Gemma 2 has no soft cap
PROMPT = "w9 w20 w31 w5"
PROMPT_TOKENS = 4
ROOM = 17  # max_tokens; no multiple of any length of a segment here
SAMPLER = Sampler(temperature=1.0, top_k=40)
MEMORY = 400_000  # bytes, for about two requests
STOP = ("7 w1", "w30")  # the first spans tokens
UNCERTAIN = Uncertainty(threshold=2.95, min_length=2, max_length=6)
SENTENCE = Punctuation(min_length=1, max_length=6)


# --- the same as a naive transcription ---


def plan(*rounds: tuple[int, int, int]) -> SearchPlan:
    """Of the tokens, the width and the survivors of each round."""
    return SearchPlan(tuple(SearchRound(*each) for each in rounds))


def methods(target: float) -> list[Decoding]:
    """Every method, with each boundary it can have; `target` is a reward that some answers reach."""
    return [
        RejectionSampling(target_reward=target, beta=0.4, max_rejections=4),
        RejectionSampling(target_reward=target + 0.3, acceptance="hard", max_rejections=3),
        SegmentBestOfN(n=3, boundary=UNCERTAIN),
        SegmentBestOfN(n=2, boundary=FixedLength(length=3)),
        SegmentBestOfN(n=4, boundary=SENTENCE),
        Args(k=4, weight=0.8),
        Args(k=6, weight=0.5, stochastic=True, temperature=0.8),
        SpeculativeRejection(n=6, checkpoint=3),
        SpeculativeRejection(n=5, checkpoint=4, fraction=0.3),
        SpeculativeRejection(n=3, checkpoint=5, fraction=0.0),
        TreeBoN(n=6, children=2, boundary=FixedLength(length=4)),
        TreeBoN(n=4, children=4, boundary=UNCERTAIN),
        TreeBoN(n=5, children=2, boundary=SENTENCE),
        Particles(n=4, beta=0.5, boundary=UNCERTAIN),
        Particles(n=5, beta=0.8, threshold=1.0, boundary=FixedLength(length=3)),
        Particles(n=3, beta=0.4, threshold=1.0, keep="best", boundary=SENTENCE),
        Particles(n=4, beta=1.0, threshold=0.0, boundary=FixedLength(length=4)),
        Cascade(plan=plan((4, 5, 2), (3, 6, 3), (3, 7, 2), (4, 8, 1))),
        Cascade(plan=plan((2, 3, 3), (3, 2, 2), (2, 1, 1), (2, 6, 4))),
        Cascade(plan=plan((6, 1, 1), (2, 4, 1), (1, 3, 2))),
        AdaSearch(n=4),
        AdaSearch(n=3, blocks=4, schedule="growth", beams=2),
        Rain(width=3, searches=4, boundary=FixedLength(length=3)),
        Rain(width=4, searches=6, explore=2.0, share=0.6, boundary=UNCERTAIN),
        Rain(width=2, searches=9, explore=4.0, value_threshold=target, boundary=SENTENCE),
        Rain(width=8, searches=3, boundary=FixedLength(length=1)),
    ]


def on_text(text: str) -> float:
    """A reward that only looks random."""
    return zlib.crc32(text.encode()) / 2**31


async def of_texts(prompt: str, texts: list[str]) -> list[float]:
    return [on_text(text) for text in texts]


@dataclass(repr=False)
class Judge:
    """A reward, and how it is by whole forwards: `score(ids, text, whole)`."""

    reward: Reward
    score: Callable[[Ids, str, bool], float]
    target: float = 1.0


@torch.inference_mode()
def full(classifier: Any, ids: Ids) -> float:
    """A classifier's logit for a whole text."""
    inputs = torch.tensor([ids])
    return float(classifier(inputs, attention_mask=torch.ones_like(inputs)).logits[0, 0])


def read_by(folder: str, before: str = PROMPT, after: str = "", own_ids: bool = True) -> Judge:
    """By a classifier that reads the model's ids, where they say all, or the text; `before` and `after` are around."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, **EAGER).eval()

    def ids(text: str) -> Ids:
        return list(tokenizer(text)["input_ids"]) if text else []

    def score(answer: Ids, text: str, whole: bool) -> float:
        read = ids(before) + answer if own_ids and whole else ids(before + text)
        return full(classifier, read + ids(after))

    return Judge(ClassifierReward(model=folder), score)


@dataclass(repr=False)
class Models:
    """A language model with its plain forwards, and judges of its texts."""

    folder: str
    judges: dict[str, Judge]
    known: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.plain = AutoModelForCausalLM.from_pretrained(self.folder, **EAGER).eval()
        self.prompt: Ids = self.tokenizer(PROMPT)["input_ids"]

    @torch.inference_mode()
    def next_logits(self, ids: Ids) -> torch.Tensor:
        """One forward over all of the text, remembered, as many methods begin with the same drafts."""
        if tuple(ids) not in self.known:
            self.known[tuple(ids)] = self.plain(torch.tensor([ids])).logits[0, -1]
        return self.known[tuple(ids)]

    def decode(self, ids: Ids) -> str:
        """The text of an answer: what follows that of the prompt."""
        return self.said([*self.prompt, *ids])[len(self.said(self.prompt)) :]

    def said(self, ids: Ids) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def loop(self, sampler: Sampler = SAMPLER, stop: tuple[str, ...] = ()) -> reference.Reference:
        settings = sampler.temperature, sampler.top_k, stop
        return reference.Reference(
            self.next_logits, lambda ids: 0.0, self.decode, self.tokenizer.eos_token_id, *settings
        )

    def case(self, judge: str, method: Decoding, seed: int, stop: tuple[str, ...] = (), **options: Any) -> Case:
        sampler, room = options.get("sampler", SAMPLER), options.get("room", ROOM)
        loop = self.loop(sampler, stop)
        chosen = self.judges[judge]
        request = naive_methods.Naive(loop, chosen.score, self.prompt, room, seed)
        last = request.run(method)
        if options.get("apart", True) and judge != "function" and request.ties and not isinstance(method, (Args, Rain)):
            return self.case(judge, method, seed + 1000, stop, **options)  # rounding would decide
        asked = Request(PROMPT, method, chosen.reward, sampler, room, stop, seed)
        return Case(asked, last, request, naive.log_p(self.plain, self.prompt, last.answer))

    def cases(self, judge: str, rain: tuple[bool, ...] = (False, True)) -> list[Case]:
        """Half of them with stop strings; `rain`: without RAIN, with it."""
        first = 50 * [*self.judges].index(judge)
        return [
            self.case(judge, method, first + i, STOP if i % 2 else ())
            for i, method in enumerate(methods(self.judges[judge].target))
            if isinstance(method, Rain) in rain
        ]


@dataclass(repr=False)
class Case:
    asked: Request
    last: naive_methods.Draft
    naive: naive_methods.Naive
    log_p: float

    def assert_same(self, alignment: Alignment) -> None:
        path = self.last.path
        assert list(alignment.token_ids) == self.last.answer
        assert alignment.text == self.last.text
        assert alignment.reward == pytest.approx(self.last.reward, abs=1e-4)
        assert alignment.finish_reason == ("length" if self.ended == "length" else "stop")
        assert alignment.log_likelihood == pytest.approx(self.log_p, abs=1e-3)
        assert alignment.usage.drafts == sum(map(len, self.naive.levels))
        for segment, kept in zip(alignment.segments, path, strict=True):
            assert list(segment.token_ids) == kept.ids
            assert [list(draft.token_ids) for draft in segment.drafts] == [draft.ids for draft in kept.level]
            assert [draft.verdict for draft in segment.drafts] == [draft.verdict for draft in kept.level]
            rewards = [draft.reward for draft in segment.drafts]
            assert rewards == pytest.approx([draft.reward for draft in kept.level], abs=1e-4)
            assert segment.reward == pytest.approx(kept.reward, abs=1e-4)
            assert kept.verdict != "rejected"

    @property
    def ended(self) -> str:
        if not self.last.whole:
            return "cut"
        return "length" if len(self.last.answer) == self.naive.max_tokens else "stop"


def judges(tmp: Path, models: Callable[..., str], family: str) -> dict[str, Judge]:
    """A decoder with the model's own tokenizer, as it is and with a template, and one with another; an encoder;
    a function."""
    other = tiny.save(tmp / "other", tiny.classifier(family, vocab_size=280), tiny.byte_pairs())
    encoder = tiny.save(tmp / "encoder", tiny.classifier("bert"), tiny.words())
    chat = models(family, classifier=True, chat_template=tiny.CHAT)
    function = Judge(FunctionReward(function=of_texts), lambda ids, text, whole: on_text(text))
    return {
        "decoder": read_by(models(family, classifier=True)),
        "chat": read_by(chat, f"<user> {PROMPT} </user>\n<assistant> ", " </assistant>\n"),
        "other": read_by(other, own_ids=False),
        "encoder": read_by(encoder, own_ids=False),
        "function": function,
    }


PAIRS = [
    ("llama", "decoder"), ("llama", "chat"), ("llama", "other"), ("llama", "encoder"),
    ("gpt2", "decoder"), ("gemma2", "decoder"), ("gemma2", "other"), ("mistral", "function"),
]  # fmt: skip


@pytest.fixture(scope="module")
def of_family(tmp_path_factory: pytest.TempPathFactory, models: Callable[..., str]) -> Callable[[str], Models]:
    made: dict[str, Models] = {}

    def of(family: str) -> Models:
        if family not in made:
            made[family] = Models(models(family), judges(tmp_path_factory.mktemp(family), models, family))
        return made[family]

    return of


@pytest.fixture(scope="module")
def cases_of(of_family: Callable[[str], Models]) -> Callable[[str, str], list[Case]]:
    made: dict[tuple[str, str], list[Case]] = {}

    def of(family: str, judge: str) -> list[Case]:
        if (family, judge) not in made:
            rain = (False,) if judge == "other" else (False, True)  # see test_rain_with_another_tokenizer
            made[family, judge] = of_family(family).cases(judge, rain)
        return made[family, judge]

    return of


@pytest.fixture(scope="module")
def llama(of_family: Callable[[str], Models]) -> Models:
    return of_family("llama")


Cases = Callable[[str, str], list[Case]]


def asked(cases: Sequence[Case]) -> list[Request]:
    return [case.asked for case in cases]


def assert_same(written: Sequence[Alignment], cases: Sequence[Case]) -> None:
    for alignment, case in zip(written, cases, strict=True):
        case.assert_same(alignment)


@pytest.mark.parametrize(("family", "judge"), PAIRS)
def test_mixed_methods_at_once(
    cases_of: Cases, models: Callable[..., str], start: Start, family: str, judge: str
) -> None:
    engine, cases = start(models(family)), cases_of(family, judge)
    watch = Watch(engine)
    assert_same(engine.run_many(asked(cases)), cases)
    assert watch.live == len(cases)
    assert_idle(engine)


@pytest.mark.parametrize("width", [1, "auto"])
def test_alone(cases_of: Cases, models: Callable[..., str], start: Start, width: int | str) -> None:
    engine, cases = start(models("llama"), width=width), cases_of("llama", "decoder")
    assert_same([engine.run(request) for request in asked(cases)], cases)
    assert_idle(engine)


@pytest.mark.parametrize("width", [1, 4])
def test_mixed_methods_of_a_width(cases_of: Cases, models: Callable[..., str], start: Start, width: int) -> None:
    engine, cases = start(models("gemma2"), width=width), cases_of("gemma2", "other")
    assert_same(engine.run_many(asked(cases)), cases)
    assert_idle(engine)


def test_beside_requests_that_draft_ahead(cases_of: Cases, models: Callable[..., str], start: Start) -> None:
    """Segments that are drafted ahead of a verdict, and trees, in one batch."""
    engine, cases = start(models("llama")), cases_of("llama", "decoder")
    eager = Eager(engine, most=40, wait=3)
    assert_same(engine.run_many(asked(cases)), cases)
    assert eager.adopted


def test_rows_of_their_own(llama: Models, start: Start) -> None:
    """Drafts of a level that are long are copies of the trunk, and their children go on in those."""
    long = LONG + 4
    cases = [
        llama.case("decoder", method, seed, room=long + 3, sampler=Sampler(temperature=0.7, top_k=12))
        for seed, method in enumerate(
            [
                SpeculativeRejection(n=3, checkpoint=long, fraction=0.0),
                TreeBoN(n=4, children=2, boundary=FixedLength(length=long)),
                Particles(n=3, beta=0.5, threshold=1.0, boundary=FixedLength(length=long)),
                Rain(width=3, searches=2, explore=9.0, boundary=FixedLength(length=long)),
                SegmentBestOfN(n=3, boundary=FixedLength(length=long)),
            ]
        )
    ]
    assert any(len(case.last.path) > 1 for case in cases)
    engine = start(llama.folder)
    watch = Watch(engine)
    assert_same([engine.run(request) for request in asked(cases)], cases)
    assert watch.rows >= 3
    assert_same(engine.run_many(asked(cases)), cases)
    assert_idle(engine)


def test_equal_drafts_are_one_with_their_share(llama: Models, start: Start) -> None:
    sampler = Sampler(temperature=0.8, top_k=4)
    method = Rain(width=6, searches=6, explore=5.0, share=0.0, boundary=FixedLength(length=1))
    cases = [llama.case("function", method, seed, sampler=sampler, room=8) for seed in range(6)]
    assert_same(start(llama.folder).run_many(asked(cases)), cases)
    levels = [[draft.text for draft in level] for case in cases for level in case.naive.levels]
    assert all(len(set(texts)) < 6 for texts in levels)


def test_after_the_cap_the_best_is_kept(llama: Models, start: Start) -> None:
    """Even where the last draft would be accepted."""
    method = RejectionSampling(target_reward=2.5, beta=1.2, max_rejections=1)
    cases = [llama.case("function", method, seed, room=4) for seed in range(24)]
    assert_same(start(llama.folder).run_many(asked(cases)), cases)
    lasts = [case.last.level[1] for case in cases if len(case.last.level) == 2]
    assert any(d.verdict == "rejected" and d.uniform < math.exp((d.reward - 2.5) / 1.2) for d in lasts)


def test_with_little_memory(cases_of: Cases, models: Callable[..., str], start: Start) -> None:
    """Requests wait, and the drafts of a level begin one after another."""
    cases = cases_of("llama", "decoder")
    engine = start(models("llama"), kv_memory=MEMORY)
    watch = Watch(engine)
    assert_same(engine.run_many(asked(cases)), cases)
    assert 0 < watch.live < len(cases)
    assert_idle(engine)


def test_the_cases_reach_every_end(cases_of: Cases) -> None:
    cases = [case for pair in PAIRS for case in cases_of(*pair)]
    for method in naive_methods.METHODS:
        mine = [case for case in cases if type(case.asked.decoding) is method]
        assert {case.ended for case in mine} == {"cut", "length", "stop"}, method
        if method is not RejectionSampling:
            assert max(len(case.last.path) for case in mine) > 3
            lengths = {len(draft.ids) for case in mine for draft in case.last.path}
            assert len(lengths) > 3 or method is Args
    verdicts = {draft.verdict for case in cases for level in case.naive.levels for draft in level}
    assert verdicts == {"accepted", "rejected", "best"}
    given_up = [sum(map(len, case.naive.levels)) - sum(len(d.level) for d in case.last.path) for case in cases]
    assert sum(drafts > 0 for drafts in given_up) > 5  # searched where nothing was kept


def test_greedy(llama: Models, start: Start) -> None:
    """Every draft is the same one, but for those of a rank."""
    greedy = Sampler(temperature=0)
    cases = [llama.case("function", method, seed, sampler=greedy) for seed, method in enumerate(methods(1.0))]
    engine = start(llama.folder)
    written = engine.run_many(asked(cases))
    assert_same(written, cases)
    texts = {alignment.text for alignment in written if alignment.method != "args"}
    assert texts == {engine.run(Request(PROMPT, Sampling(), sampler=greedy, max_tokens=ROOM)).text}


# --- what methods are where there is nothing to choose ---


@pytest.mark.parametrize(
    ("method", "first"),
    [
        (SegmentBestOfN(n=1, boundary=UNCERTAIN), 0),
        (TreeBoN(n=1, children=1, boundary=UNCERTAIN), 2**32),
        (Particles(n=1, beta=0.5, boundary=UNCERTAIN), 2**32),
        (Rain(searches=1, width=1, boundary=UNCERTAIN), 2**32),
        (SpeculativeRejection(n=1, checkpoint=4), 2**32),
    ],
)
def test_one_draft_is_plain_sampling(llama: Models, start: Start, method: Any, first: int) -> None:
    engine, loop = start(llama.folder), llama.loop()
    boundary = FixedLength(length=4) if isinstance(method, SpeculativeRejection) else method.boundary
    lengths = set()
    for seed in range(25):
        ids: Ids = []
        for number in range(first, first + ROOM):
            draft = loop.draft(llama.prompt, ids, boundary, ROOM, Uniforms(seed, number, 0))
            ids += draft.ids
            if draft.ended == "eos" or len(ids) == ROOM:
                break
        lengths.add(len(ids))
        request = Request(PROMPT, method, llama.judges["function"].reward, SAMPLER, ROOM, seed=seed)
        assert list(engine.run(request).token_ids) == ids
    assert len(lengths) > 1


def test_args_without_weight_is_greedy(llama: Models, start: Start) -> None:
    engine = start(llama.folder)
    for room in (3, ROOM):
        greedy = engine.run(Request(PROMPT, Sampling(), sampler=Sampler(temperature=0), max_tokens=room))
        args = Request(PROMPT, Args(weight=0.0, k=3), llama.judges["decoder"].reward, SAMPLER, room, seed=1)
        assert engine.run(args).token_ids == greedy.token_ids


def test_no_method_keeps_less_than_it_says(llama: Models, start: Start) -> None:
    """What is called best is the best of what it is chosen from; what is accepted has reached a hard target."""
    reward, seen = llama.judges["function"].reward, Counter[str]()
    requests = [Request(PROMPT, method, reward, SAMPLER, 12, seed=seed) for seed in range(4) for method in methods(1.2)]
    for request, alignment in zip(requests, start(llama.folder).run_many(requests), strict=True):
        last, method = alignment.segments[-1], request.decoding
        rewards = [draft.reward or 0.0 for draft in last.drafts]
        [kept] = [draft for draft in last.drafts if draft.verdict != "rejected"]
        assert (kept.reward, kept.token_ids) == (alignment.reward, last.token_ids)
        if isinstance(method, SegmentBestOfN) or (kept.verdict == "best" and isinstance(method, RejectionSampling)):
            assert alignment.reward == max(rewards)
        if isinstance(method, RejectionSampling) and kept.verdict == "accepted":
            assert alignment.reward is not None
            assert method.acceptance == "soft" or alignment.reward >= float(method.target_reward)
        seen[kept.verdict] += 1
    assert min(seen["best"], seen["accepted"]) > 10


# --- laws ---

NO_END = {
    "": {"a": 0.5, "b": 0.3, "c": 0.2},
    "a": {"a": 0.6, "b": 0.2, "c": 0.2},
    "b": {"a": 0.1, "b": 0.2, "c": 0.7},
    "c": {"a": 0.3, "b": 0.4, "c": 0.3},
}
WITH_END = {text: {"": 0.3, **{letter: 0.7 * p for letter, p in row.items()}} for text, row in NO_END.items()}
SCORES = {"a": -0.6, "b": 0.9, "c": 0.1, "aa": 0.2, "ab": 1.3, "ba": -0.4, "bc": 0.8, "cb": 1.1}
BETA = 0.6
SAMPLES = 4000

Law = dict[str, float]
Rows = dict[str, Law]


def score(text: str) -> float:
    return SCORES.get(text, 0.3)


def plain_law(rows: Rows) -> Law:
    """p(text), for texts of at most two letters."""
    found: Law = defaultdict(float)
    for one, p in rows[""].items():
        for other, q in (rows[one] if one else {"": 1.0}).items():
            found[one + other] += p * q
    return dict(found)


def tilted(law: Law) -> Law:
    weights = {text: p * math.exp(score(text) / BETA) for text, p in law.items()}
    return {text: weight / sum(weights.values()) for text, weight in weights.items()}


def texts(method: Decoding, rows: Rows, samples: int = SAMPLES) -> list[str]:
    """What a method writes with random drafts from a table."""
    dice, found = np.random.default_rng(5), []
    for _ in range(samples):
        table: Any = naive_methods.Table(rows, score, dice, 2)
        with pytest.raises(StopIteration):
            method.generate(table).send(None)  # nothing in it waits
        assert table.finished
        found.append(table.text)
    return found


def off(law: Law, found: list[str]) -> float:
    """Total variation to the law, in units of what chance alone exceeds once in a million."""
    seen = Counter(found)
    assert seen.keys() <= law.keys()
    far = sum(abs(p - seen[text] / len(found)) for text, p in law.items()) / 2
    chance = sum(math.sqrt(2 * p * (1 - p) / math.pi / len(found)) for p in law.values()) / 2
    return far / (chance + math.sqrt(math.log(1e6) / 2 / len(found)))


def law_of_two(rows: Rows, threshold: float) -> Law:
    """What two particles keep, exactly, one letter at a time."""
    found: Law = defaultdict(float)
    for one, p in rows[""].items():
        for other, q in rows[""].items():
            w = [math.exp((score(text) - score("")) / BETA) for text in (one, other)]
            share = w[0] / sum(w)
            branches = [((one, other), w, 1.0)]
            if (one or other) and 1 / (share**2 + (1 - share) ** 2) < 2 * threshold:
                both, neither = max(0.0, 2 * share - 1), max(0.0, 1 - 2 * share)
                branches = [((one, one), [1, 1], both), ((other, other), [1, 1], neither)]
                branches.append(((one, other), [1, 1], 1 - both - neither))
            for pair, weights, chance in branches:
                for moved, r in _moved(rows, pair):
                    gains = [
                        math.exp((score(text) - score(before)) / BETA) for text, before in zip(moved, pair, strict=True)
                    ]
                    at = [weight * gain for weight, gain in zip(weights, gains, strict=True)]
                    for text, weight in zip(moved, at, strict=True):
                        found[text] += p * q * chance * r * weight / sum(at)
    return dict(found)


def _moved(rows: Rows, pair: tuple[str, str]) -> Iterator[tuple[tuple[str, str], float]]:
    one, other = pair
    for a, p in (rows[one] if one else {"": 1.0}).items():
        for b, q in (rows[other] if other else {"": 1.0}).items():
            yield (one + a, other + b), p * q


def smc(n: int, threshold: float = 0.5, beta: float = BETA) -> Particles:
    return Particles(n=n, beta=beta, threshold=threshold, boundary=FixedLength(length=1))


@pytest.mark.law
@pytest.mark.parametrize("threshold", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("rows", [NO_END, pytest.param(WITH_END, id="with end")])
def test_two_particles_have_exactly_their_law(rows: Rows, threshold: float) -> None:
    law = law_of_two(rows, threshold)
    assert sum(law.values()) == pytest.approx(1)
    assert off(law, texts(smc(2, threshold), rows)) < 1
    assert off(plain_law(rows), texts(smc(1), rows)) < 1


@pytest.mark.law
@pytest.mark.parametrize("threshold", [0.0, 0.7, 1.0])
def test_many_particles_have_the_tilted_law(threshold: float) -> None:
    law = plain_law(NO_END)
    found = texts(smc(32, threshold), NO_END, 1200)
    assert off(tilted(law), found) < 1
    assert off(law, found) > 2


def wrong_resampling(weights: list[float], uniform: float) -> list[int]:
    return [*range(len(weights))]


def wrong_normalized(log_w: list[float]) -> list[float]:
    return [1 / len(log_w)] * len(log_w)


def wrong_best(weights: list[float], uniform: float) -> list[int]:
    return [weights.index(max(weights))] * len(weights)


@pytest.mark.law
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("systematic_resampling", wrong_resampling),
        ("systematic_resampling", wrong_best),
        ("normalized", wrong_normalized),
    ],
)
def test_wrong_particles_have_another_law(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(particles, name, wrong)
    assert off(law_of_two(NO_END, 1.0), texts(smc(2, 1.0), NO_END)) > 1
    assert off(tilted(plain_law(NO_END)), texts(smc(32, 1.0), NO_END, 1200)) > 1


@pytest.mark.law
def test_wrong_betas_have_another_law() -> None:
    assert off(tilted(plain_law(NO_END)), texts(smc(32, beta=2 * BETA), NO_END, 1200)) > 1
    assert off(law_of_two(NO_END, 1.0), texts(smc(2, 1.0, beta=2 * BETA), NO_END)) > 1


@pytest.mark.law
@pytest.mark.parametrize("cap", [200, 2])
def test_rejection_sampling_has_the_tilted_law_with_a_cap(cap: int) -> None:
    method = RejectionSampling(target_reward=max(SCORES.values()), beta=BETA, max_rejections=cap)
    p, target = plain_law(WITH_END), max(SCORES.values())
    passes = {text: math.exp((score(text) - target) / BETA) for text in p}
    lost = 1 - sum(p[text] * passes[text] for text in p)

    def none_above(text: str, equal: bool) -> float:
        """P(`cap` drafts are rejected, one more is drawn, and none of them is above the text's reward)."""
        low = [t for t in p if score(t) < score(text) or (equal and score(t) == score(text))]
        return sum(p[t] * (1 - passes[t]) for t in low) ** cap * sum(p[t] for t in low)

    law: Law = {}
    for text in p:
        ties = [t for t in p if score(t) == score(text)]
        best = none_above(text, True) - none_above(text, False)  # one of the ties, not always by the plain law
        law[text] = p[text] * passes[text] * sum(lost**k for k in range(cap)) + best * p[text] / sum(p[t] for t in ties)
    assert sum(law.values()) == pytest.approx(1)
    found = texts(method, WITH_END)
    assert off(law, found) < 1
    assert (off(tilted(p), found) < 1) == (cap == 200)


def test_systematic_draws_as_often_as_it_should() -> None:
    dice = np.random.default_rng(0)
    for n in (1, 2, 5, 8):
        for sharpness in (0.1, 1.0, 4.0):
            weights = normalized([*(sharpness * dice.standard_normal(n))])
            steps = 2000
            mean = np.zeros(n)
            for step in range(steps):
                chosen = systematic_resampling(weights, (step + 0.5) / steps)
                assert chosen == sorted(chosen)
                counts = np.bincount(chosen, minlength=n)
                assert len(chosen) == n
                least = np.floor([n * w - 1e-9 for w in weights])
                assert all((counts >= least) & (counts <= least + 1))
                mean += counts / steps
            assert mean == pytest.approx([n * w for w in weights], abs=2 / steps)
    assert systematic_resampling([0.0, 1.0, 0.0], 0.0) == [1, 1, 1]
    assert systematic_resampling([0.0, 1.0, 0.0], 0.999999) == [1, 1, 1]


def test_the_effective_sample_size() -> None:
    assert effective_sample_size([0.25] * 4) == pytest.approx(4)
    assert effective_sample_size([1.0, 0.0, 0.0]) == pytest.approx(1)
    assert effective_sample_size([0.5, 0.5, 0.0]) == pytest.approx(2)
    assert normalized([-1e6, -1e6 + math.log(3)]) == pytest.approx([0.25, 0.75])


def test_drawn_by_weight() -> None:
    drafts = [Draft(i, "", 0.0, 0, 0.0) for i in range(3)]
    steps = 1000
    seen = Counter(weighted_choice(drafts, [1.0, 0.0, 3.0], (i + 0.5) / steps).index for i in range(steps))
    assert seen == {0: 250, 2: 750}


# --- what is held, and what it costs ---


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model that knows no end of sequence, and a reward model for its texts."""
    size: dict[str, Any] = {"max_position_embeddings": 8192}
    words = tiny.words(eos_token=None)
    folder = tmp_path_factory.mktemp("endless")
    model = tiny.save(folder / "model", tiny.causal(**size, eos_token_id=None), words)
    return model, tiny.save(folder / "judge", tiny.classifier(**size), words)


SCORED: list[Decoding] = [
    RejectionSampling(target_reward=90.0, acceptance="hard", max_rejections=3),
    SegmentBestOfN(n=3, boundary=UNCERTAIN),
    Args(k=4),
    SpeculativeRejection(n=6, checkpoint=3, fraction=0.2),
    TreeBoN(n=6, children=2, boundary=FixedLength(length=4)),
    Particles(n=5, beta=0.5, threshold=1.0, boundary=UNCERTAIN),
    Rain(width=3, searches=4, boundary=FixedLength(length=3)),
    Cascade(plan=plan((4, 5, 2), (3, 6, 3), (3, 7, 2), (4, 8, 1))),
    AdaSearch(n=4),
]
named = pytest.mark.parametrize("method", SCORED, ids=lambda method: method.method)


def test_no_method_was_forgotten() -> None:
    assert {type(method) for method in SCORED} == naive_methods.METHODS.keys()
    assert {*METHODS} == {"cards", "sampling", "best_of_n", *(method.method for method in SCORED)}
    assert all(cls.model_fields["method"].default == name for name, cls in METHODS.items())


def fails_late(prompt: str, texts: list[str]) -> list[float]:
    if any(len(text.split()) > 8 for text in texts):
        raise ZeroDivisionError("no idea")
    return [0.0] * len(texts)


def weighted(judge: str, function: Callable[..., Any]) -> WeightedReward:
    parts = ClassifierReward(model=judge, scale=(0.0, 1.0)), FunctionReward(function=function, scale=(0.0, 1.0))
    return WeightedReward(rewards=parts, weights=(1.0, 1.0))


def zero(prompt: str, texts: list[str]) -> list[float]:
    return [0.0] * len(texts)


@named
@pytest.mark.parametrize("end", [e for e in Freed.ENDS if e != "the end"])
async def test_nothing_is_held_after(endless: tuple[str, str], start: Start, method: Decoding, end: str) -> None:
    model, judge = endless
    function = fails_late if end == "error" else zero
    rewards: list[Reward] = [weighted(judge, function), weighted(judge, function)]
    room = 40 if end == "error" else 3000
    requests = [Request(PROMPT, method, reward, SAMPLER, room, seed=seed) for seed, reward in enumerate(rewards)]
    await Freed(start(model, width=4)).after(end, requests)


@named
async def test_nothing_is_held_after_a_stream_is_closed(
    endless: tuple[str, str], start: Start, method: Decoding
) -> None:
    model, judge = endless
    engine = start(model)
    request = Request(PROMPT, method, ClassifierReward(model=judge), SAMPLER, 60, seed=1)
    stream = engine.stream(request)
    assert isinstance(next(stream), Chunk)
    stream.close()
    other = engine.astream(request)
    waiting = asyncio.ensure_future(anext(other))
    await until(lambda: engine.inspect().steps > 40)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await other.aclose()
    await until(lambda: is_idle(engine))


async def test_no_row_of_a_long_branch_is_held(endless: tuple[str, str], start: Start) -> None:
    model, judge = endless
    engine = start(model)
    watch = Watch(engine)
    method = TreeBoN(n=4, children=2, boundary=FixedLength(length=LONG + 4))
    task = asyncio.create_task(
        engine.arun(Request(PROMPT, method, ClassifierReward(model=judge), SAMPLER, 3000, seed=1))
    )
    await until(lambda: engine.inspect().steps > LONG + 10)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: is_idle(engine))
    assert watch.rows == 4


async def test_nothing_is_held_after_the_engine_is_closed(endless: tuple[str, str], start: Start) -> None:
    model, judge = endless
    engine = start(model)
    reward = weighted(judge, zero)
    tasks = [asyncio.create_task(engine.arun(Request(PROMPT, m, reward, SAMPLER, 3000, seed=1))) for m in SCORED]
    engine.loaded()
    await until(lambda: engine.inspect().steps > 10)
    held = caches(engine)
    await asyncio.to_thread(engine.close)
    assert [type(e) for e in await asyncio.gather(*tasks, return_exceptions=True)] == [EngineClosed] * len(SCORED)
    assert len(held) == 2
    assert not any(cache.blocks for cache in held)  # their memory is given back


def in_step(llama: Models, judge: str, method: Decoding) -> Case:
    """A case in which the first drafts end together, so that the prompt is read once; no text ends in padding,
    and without a suffix only what follows kept text is empty."""
    for seed in range(60):
        case = llama.case(judge, method, seed)
        first, *later = case.naive.levels
        drafts = [draft for level in later for draft in level]
        empty = judge == "decoder" and any(not draft.ids for draft in drafts)
        padded = any(draft.ids[-1:] == [tiny.PAD] for draft in [*first, *drafts])
        if len({len(draft.ids) for draft in first}) == 1 and not empty and not padded:
            return case
    raise AssertionError("no such seed")


TREES = [
    Args(k=4, weight=0.5),
    SpeculativeRejection(n=6, checkpoint=3),
    TreeBoN(n=6, children=2, boundary=FixedLength(length=4)),
    Particles(n=4, beta=0.8, boundary=FixedLength(length=3)),
    Rain(width=3, searches=4, explore=3.0, boundary=FixedLength(length=3)),
]


@pytest.mark.parametrize("wrap", [False, True], ids=["alone", "weighted"])
@pytest.mark.parametrize(
    ("judge", "method"),
    [(judge, method) for judge in ("chat", "decoder") for method in TREES if (judge, method) != ("decoder", TREES[0])],
)
def test_a_draft_costs_its_own_tokens(llama: Models, start: Start, method: Decoding, judge: str, wrap: bool) -> None:
    case = in_step(llama, judge, method)
    request = case.asked
    assert isinstance(request.reward, ClassifierReward)
    if wrap:
        request = replace(request, reward=weighted(request.reward.model, zero))
    alignment = start(llama.folder, width=64).run(request)
    case.assert_same(alignment)
    suffix, before = (1, 7) if judge == "chat" else (0, PROMPT_TOKENS)
    drafts = [draft for level in case.naive.levels for draft in level]
    asked_first = isinstance(method, Particles) * suffix  # the reward of the prompt
    assert max(len(draft.path) for draft in drafts) > 2
    expected = before + asked_first + sum(max(1, len(draft.ids) + suffix) for draft in drafts)
    assert alignment.usage.rm_tokens == expected
    assert alignment.usage.drafts == len(drafts)


def test_the_language_model_reads_each_token_once(llama: Models, start: Start) -> None:
    """The last token of a segment that ended by its length is read if something follows it."""
    for method in TREES:
        case = llama.case("decoder", method, 2)
        drafts = [draft for level in case.naive.levels for draft in level]
        parents = {id(draft.parent) for draft in drafts}
        full = [d for d in drafts if len(d.ids) == longest(method) or len(d.answer) == ROOM]
        unread = sum(id(draft) not in parents for draft in full)
        expected = PROMPT_TOKENS + sum(len(draft.ids) for draft in drafts) - unread
        assert start(llama.folder, width=64).run(case.asked).usage.lm_tokens == expected, method


def longest(method: Any) -> int:
    if isinstance(method, Args):
        return 1
    return int(method.checkpoint if isinstance(method, SpeculativeRejection) else method.boundary.max_tokens)


# --- what is not as it should be ---


def test_drafts_that_end_apart_read_the_prompt_once(llama: Models, start: Start) -> None:
    asked = Request(PROMPT, TreeBoN(n=4, children=2), llama.judges["chat"].reward, SAMPLER, 12, seed=1)
    alignment = start(llama.folder, width=1).run(asked)
    [segment] = alignment.segments
    assert len(segment.drafts) == 4
    assert alignment.usage.rm_tokens == 7 + sum(len(draft.token_ids) + 1 for draft in segment.drafts)


def test_an_empty_draft_costs_one_token(llama: Models, start: Start) -> None:
    method = TreeBoN(n=6, children=2, boundary=FixedLength(length=4))
    for seed in range(60):
        case = llama.case("decoder", method, seed, apart=False)
        first, *later = case.naive.levels
        drafts = [draft for level in later for draft in level]
        padded = any(draft.ids[-1:] == [tiny.PAD] for draft in [*first, *drafts])
        if {len(draft.ids) for draft in first} == {4} and any(not d.ids for d in drafts) and not padded:
            break
    usage = start(llama.folder, width=64).run(case.asked).usage
    assert usage.rm_tokens == PROMPT_TOKENS + sum(max(1, len(draft.ids)) for draft in [*first, *drafts])


def test_whole_sentences_are_read_once(llama: Models, start: Start) -> None:
    """Where every draft ends with its sentence, `granularity="sentence"` asks for the same."""
    method = TreeBoN(n=3, children=2, boundary=Punctuation(min_length=2, max_length=64))
    for seed in range(200):
        case = llama.case("chat", method, seed, room=40)
        drafts = [draft for level in case.naive.levels for draft in level]
        texts = Counter(draft.text for draft in drafts)
        if len(case.naive.levels) > 3 and max(texts.values()) == 1:
            break
    reward = case.asked.reward
    assert reward is not None
    engine = start(llama.folder, width=64)
    plain = engine.run(case.asked)
    sentences = engine.run(replace(case.asked, reward=reward.model_copy(update={"granularity": "sentence"})))
    assert sentences.token_ids == plain.token_ids
    assert sentences.usage.rm_tokens == plain.usage.rm_tokens


def letters(folder: Path, merges: Sequence[tuple[str, str]], classifier: bool) -> str:
    """A tokenizer of the letters a to d, with these merges, and a model of its tokens."""
    names = [*"abcd", *("".join(merge) for merge in merges)]
    fast = Tokenizer(BPE({name: i for i, name in enumerate(names)}, [*merges]))
    fast.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, model_max_length=256)
    size: dict[str, Any] = {"vocab_size": len(names), "eos_token_id": None, "pad_token_id": None}
    return tiny.save(folder, tiny.classifier(**size) if classifier else tiny.causal(**size), tokenizer)


def test_rain_with_another_tokenizer(llama: Models, start: Start) -> None:
    cases = llama.cases("other", (True,))
    engine = start(llama.folder, width=4)
    assert_same([engine.run(request) for request in asked(cases)], cases)


def test_tokens_that_merge_and_part_again(tmp_path: Path, start: Start) -> None:
    """ "ab" is one token, "abc" is "a" and "bc", "abcd" is "ab" and "cd": a draft goes on from an older text."""
    model = letters(tmp_path / "model", [], classifier=False)
    folder = letters(tmp_path / "judge", [("c", "d"), ("b", "c"), ("a", "b")], classifier=True)
    judge = read_by(folder, "ab", own_ids=False)
    engine = start(model)
    method = Rain(width=4, searches=8, boundary=FixedLength(length=1))
    for seed in range(6):
        alignment = engine.run(Request("ab", method, judge.reward, SAMPLER, 24, seed=seed))
        before = ""
        for segment in alignment.segments:
            expected = [judge.score([], before + draft.text, True) for draft in segment.drafts]
            assert [draft.reward for draft in segment.drafts] == pytest.approx(expected, abs=1e-4)
            before += segment.text


def test_columns_of_what_is_cut_by_a_stop_string(of_family: Callable[[str], Models], start: Start) -> None:
    """It is read from its beginning, beside a branch that is then kept."""
    models = of_family("mistral")
    engine = start(models.folder)
    Watch(engine)
    for seed in (19, 39, 59):
        rain = Rain(width=2, searches=9, explore=4.0, value_threshold=1.0, boundary=SENTENCE)
        engine.run(Request(PROMPT, rain, models.judges["chat"].reward, SAMPLER, ROOM, STOP, seed))


class Watched(SpeculativeRejection):
    """Looks at the columns in use before each new level: more than the prompt and all paths that can be kept?"""

    async def generate(self, session: Any) -> None:
        grow, give_up, leaves, excess = session.grow, session.give_up, set[Draft](), list[int]()

        async def watched(parents: Sequence[Draft | None], **options: Any) -> list[Draft]:
            needed = {p for leaf in leaves for p in session.pool._unkept(session.pool.nodes[leaf])}
            tokens = PROMPT_TOKENS + sum(len(pending.candidate.ids) for pending in needed)
            excess.append(session.host.language_model._requests[session.context].kept.branch.tree.taken - 1 - tokens)
            leaves.difference_update(parents)
            drafts: list[Draft] = await grow(parents, **options)
            leaves.update(drafts)
            return drafts

        def gone(draft: Draft) -> None:
            leaves.discard(draft)
            give_up(draft)

        session.grow, session.give_up = watched, gone
        await super().generate(session)
        assert len(excess) > 4
        assert max(excess) <= 0, excess


def test_branches_that_died_out_take_no_columns(endless: tuple[str, str], start: Start) -> None:
    model, judge = endless
    method = Watched(n=12, checkpoint=4)
    start(model).run(Request(PROMPT, method, ClassifierReward(model=judge), SAMPLER, 40, seed=1))


async def test_more_ranks_than_tokens_harm_no_other_request(llama: Models, start: Start) -> None:
    engine, reward = start(llama.folder), llama.judges["function"].reward
    other = engine.arun(Request(PROMPT, TreeBoN(n=2, children=1), reward, SAMPLER, ROOM, seed=1))
    args = engine.arun(Request(PROMPT, Args(k=tiny.SIZES["vocab_size"] + 1), reward, SAMPLER, ROOM, seed=1))
    answer, _ = await asyncio.gather(other, args, return_exceptions=True)
    assert isinstance(answer, Alignment)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_ranks_that_are_not_there_have_no_weight(tmp_path: Path, start: Start, temperature: float) -> None:
    """A grammar allows two tokens."""
    engine = start(tiny.save(tmp_path, tiny.causal(vocab_size=280), tiny.byte_pairs()))
    reward, grammar = FunctionReward(function=of_texts), Grammar.choice(["aaa", "bbb"])

    def written(k: int) -> list[str]:
        method = Args(k=k, weight=0.0, stochastic=True, temperature=temperature)
        requests = [Request("the", method, reward, SAMPLER, 9, seed=seed, grammar=grammar) for seed in range(24)]
        return [answer.text for answer in engine.run_many(requests)]

    assert set(written(2)) == {"aaa", "bbb"}
    assert written(10) == written(2)


class InTwoCalls(Decoding):
    """Segment-level best-of-4 that looks at `first` drafts, and then asks for the others."""

    method: str = "segment_best_of_n"
    first: int
    limit: int
    by_hand: bool = False
    boundary: Uncertainty = UNCERTAIN

    async def generate(self, session: Any) -> None:
        while not session.finished:
            async for draft in session.drafts(until=self.boundary, limit=self.limit):
                best = session.reject(draft)
                if draft.index + 1 == self.first:
                    break
            async for draft in session.drafts(until=self.boundary, limit=4 - self.first):
                best = session.reject(draft)
            if self.by_hand:
                best.verdict = "best"
                await session.keep(best)
            else:
                assert await session.keep_best() is best


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize(("first", "limit"), [(2, 2), (1, 3), (3, 9)])
def test_a_segment_may_ask_for_more_drafts(llama: Models, start: Start, first: int, limit: int, by_hand: bool) -> None:
    """Those of an earlier call are not drawn again, and can be kept, whatever was drafted ahead."""
    engine, reward = start(llama.folder), llama.judges["decoder"].reward

    def drafts(method: Decoding) -> list[tuple[int, Sequence[int], str]]:
        answers = engine.run_many([Request(PROMPT, method, reward, SAMPLER, ROOM, seed=seed) for seed in range(6)])
        segments = [segment for answer in answers for segment in answer.segments]
        return [(draft.index, draft.token_ids, draft.verdict) for segment in segments for draft in segment.drafts]

    found = drafts(InTwoCalls(first=first, limit=limit, by_hand=by_hand))
    assert found == drafts(SegmentBestOfN(n=4, boundary=UNCERTAIN))
    assert {index for index, _, verdict in found if verdict == "best"} == {0, 1, 2, 3}
    assert_idle(engine)


class KeepsNothing(Decoding):
    """Rejects one draft and keeps the best twice: the second time there is none."""

    method: str = "keeps_nothing"

    async def generate(self, session: Any) -> None:
        async for draft in session.drafts(until=UNCERTAIN, limit=1):
            session.reject(draft)
        await session.keep_best()
        await session.keep_best()


def test_the_best_of_none_is_an_error_of_its_own_request(llama: Models, start: Start) -> None:
    engine, reward = start(llama.folder), llama.judges["decoder"].reward
    with pytest.raises(CardsError, match=r"reject\(\) a draft"):
        engine.run(Request(PROMPT, KeepsNothing(), reward, SAMPLER, ROOM, seed=1))
    assert engine.run(Request(PROMPT, SegmentBestOfN(n=2), reward, SAMPLER, ROOM, seed=1)).text
    assert_idle(engine)


@pytest.mark.parametrize("nonsense", ["{", "{'method': 'args'}", {"method": ["args"]}, {"method": {}}])
def test_what_is_no_method_is_refused(nonsense: Any) -> None:
    with pytest.raises(SettingsError):
        as_decoding(nonsense)


# --- grammars, streams ---


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that reads and writes any text."""
    return tiny.save(tmp_path_factory.mktemp("bytes"), tiny.causal(vocab_size=280), tiny.byte_pairs())


COLOURS = ["red", "rose", "green", "the cat sat"]
BEGUN = "|".join(word[:n] for word in COLOURS for n in range(len(word)))
GRAMMARS = [  # with what is whole, and what may become so
    (Grammar.choice(COLOURS), "|".join(COLOURS), BEGUN),
    (Grammar.regex("[a-m]{2,5}x[0-9]{1,3}"), "[a-m]{2,5}x[0-9]{1,3}", "[a-m]{0,5}|[a-m]{2,5}x[0-9]{0,3}"),
]


@pytest.mark.parametrize(("grammar", "whole", "begun"), GRAMMARS, ids=["choice", "regex"])
@named
def test_only_allowed_text(
    readable: str, start: Start, method: Decoding, grammar: Grammar, whole: str, begun: str
) -> None:
    reward = FunctionReward(function=of_texts)
    siblings = isinstance(method, (RejectionSampling, SegmentBestOfN, Args, Rain))
    requests = [Request("the cat", method, reward, Sampler(), 40, seed=seed, grammar=grammar) for seed in range(4)]
    for alignment in start(readable).run_many(requests):
        assert re.fullmatch(whole, alignment.text)
        before = ""
        for segment in alignment.segments:
            beside = segment.drafts if siblings or not before else ()  # in a tree they follow others, too
            assert all(re.fullmatch(f"{whole}|{begun}", before + draft.text) for draft in beside)
            before += segment.text


@named
@pytest.mark.parametrize("stop", [(), STOP])
async def test_streams_in_pieces(llama: Models, start: Start, method: Decoding, stop: tuple[str, ...]) -> None:
    engine = start(llama.folder)
    for seed in range(3):
        request = Request(PROMPT, method, llama.judges["decoder"].reward, SAMPLER, ROOM, stop, seed)
        expected = engine.run(request)
        *chunks, last = engine.stream(request)
        assert isinstance(last, Alignment)
        assert last.token_ids == expected.token_ids
        assert "".join(chunk.text for chunk in chunks if isinstance(chunk, Chunk)) == expected.text
        assert tuple(chunk.segment for chunk in chunks if isinstance(chunk, Chunk)) == last.segments
        pieces = [item.text async for item in engine.astream(request) if isinstance(item, Chunk)]
        assert "".join(pieces) == expected.text


# --- settings ---

NOT_DEFAULT: list[Decoding] = [
    RejectionSampling(target_reward=1.5, beta=0.2, acceptance="hard", max_rejections=0),
    SegmentBestOfN(n=1, boundary=SENTENCE),
    Args(k=3, weight=0.0, stochastic=True, temperature=2.0),
    SpeculativeRejection(n=1, checkpoint=1, fraction=0.0),
    TreeBoN(n=1, children=1, boundary=UNCERTAIN),
    Particles(n=1, beta=3.0, threshold=0.0, keep="best", boundary=FixedLength(length=1)),
    Rain(width=1, searches=1, explore=0.0, share=1.0, value_threshold=-1.0, boundary=SENTENCE),
    Cascade(budget="tokens:2.5"),
    AdaSearch(n=2, blocks=5, schedule="uniform", beams=3),
]


KINDS: dict[str, type[Any]] = METHODS


@pytest.mark.parametrize("method", [*SCORED, *NOT_DEFAULT, *(KINDS[each.method]() for each in SCORED)])
def test_settings_go_round(method: Any) -> None:
    assert as_decoding(method) is method
    assert as_decoding(method.model_dump()) == method
    assert as_decoding(method.model_dump_json()) == method
    assert as_decoding(json.loads(method.model_dump_json())) == method
    kind: type[Any] = type(method)
    assert as_decoding(method.method) == kind()
    assert type(as_decoding(method.method)) is kind
    assert hash(as_decoding(method.model_dump())) == hash(method)
    told = CardsSettings(decoding=method.model_dump_json())
    assert told.decoding == method
    assert CardsSettings.model_validate(told.model_dump(mode="json")).decoding == method


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        ("rejection", {"max_rejections": -1}), ("rejection", {"beta": 0}), ("rejection", {"acceptance": "maybe"}),
        ("rejection", {"target_reward": math.inf}), ("segment_best_of_n", {"n": 0}),
        ("segment_best_of_n", {"boundary": {"kind": "fixed_length", "length": 0}}),
        ("segment_best_of_n", {"boundary": {"kind": "uncertainty", "min_length": 9, "max_length": 3}}),
        ("args", {"k": 0}), ("args", {"weight": -0.1}), ("args", {"weight": math.inf}), ("args", {"temperature": 0}),
        ("args", {"boundary": {"kind": "fixed_length"}}),
        ("speculative_rejection", {"n": 0}), ("speculative_rejection", {"checkpoint": 0}),
        ("speculative_rejection", {"fraction": 1}), ("speculative_rejection", {"fraction": -0.1}),
        ("tree_bon", {"n": 0}), ("tree_bon", {"children": 0}), ("tree_bon", {"layers": 3}),
        ("particles", {"n": 0}), ("particles", {"beta": -1}), ("particles", {"beta": "much"}),
        ("particles", {"threshold": 1.1}), ("particles", {"threshold": -0.1}), ("particles", {"keep": "worst"}),
        ("rain", {"width": 0}), ("rain", {"searches": 0}), ("rain", {"explore": -1}), ("rain", {"share": 1.5}),
        ("rain", {"value_threshold": math.nan}),
    ],
)  # fmt: skip
def test_nonsense_is_refused(method: str, wrong: dict[str, Any]) -> None:
    [name] = wrong
    with pytest.raises(SettingsError, match=name):
        as_decoding({"method": method, **wrong})


def test_what_a_method_asks_for() -> None:
    assert all(method.needs_reward for method in SCORED)
    scaled = {method for method in METHODS if KINDS[method]().needs_scale}
    assert scaled == {"cards", "rejection", "particles"}
    assert RejectionSampling(target_reward=1.0).needs_scale  # its beta
    assert RejectionSampling(beta=1.0).needs_scale  # its target
    assert not RejectionSampling(target_reward=1.0, beta=1.0).needs_scale
    assert not RejectionSampling(target_reward=1.0, acceptance="hard").needs_scale
    assert not Particles(beta=1.0).needs_scale


@pytest.mark.parametrize(
    "method", [RejectionSampling(max_rejections=3), Particles(n=3, threshold=0.0)], ids=lambda m: m.method
)
def test_a_scale_is_used(llama: Models, start: Start, method: Decoding) -> None:
    """Target and beta are 1.5 spreads above the mean, and a fifth of a spread, if nothing else is known."""
    reward = FunctionReward(function=of_texts, scale=(0.8, 0.5))
    same = {"beta": 0.1, **({"target_reward": 1.55} if isinstance(method, RejectionSampling) else {})}
    engine = start(llama.folder)
    for seed in range(3):
        one, other = (
            engine.run(Request(PROMPT, each, reward, SAMPLER, ROOM, seed=seed))
            for each in (method, method.model_copy(update=same))
        )
        assert one.token_ids == other.token_ids
        assert [s.threshold for s in one.segments] == pytest.approx([s.threshold for s in other.segments])


@named
def test_without_a_reward(llama: Models, start: Start, method: Decoding) -> None:
    with pytest.raises(RewardError, match="reward="):
        start(llama.folder).run(Request(PROMPT, method, max_tokens=4))
