"""Rewards made of rewards, through the engine: their sums, their parts, their rows, and what fails in them."""

from __future__ import annotations

import asyncio
import math
import re
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
from conftest import Start
from internals import assert_idle

from cards_integrations.decoding import BestOfN, Cards, FixedLength
from cards_integrations.engine import Request
from cards_integrations.errors import PromptError, RewardError
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
from cards_integrations.rewards.scorers.sentences import SENTENCE_END, split_sentences, whole_sentences
from cards_integrations.trace import Alignment, DraftTrace

PROMPT = "w9 w20 w31 w5"
SEGMENTS = FixedLength(length=4)
JUDGE_SCALE, LENGTH_SCALE = (0.25, 2.0), (-0.5, 0.25)


@pytest.fixture
def judge(models: Callable[..., str]) -> ClassifierReward:
    return ClassifierReward(
        model=models("llama", classifier=True), prompt_format="{prompt} {response}", scale=JUDGE_SCALE
    )


def request(reward: Reward, seed: int = 0, target: float = 0.5, tokens: int = 16, **decoding: Any) -> Request:
    method = Cards(target_reward=target, beta=0.3, max_rejections=4, boundary=SEGMENTS, **decoding)
    return Request(PROMPT, method, reward, Sampler(temperature=1.2), tokens, seed=seed)


def drafts(answer: Alignment) -> list[DraftTrace]:
    return [draft for segment in answer.segments for draft in segment.drafts]


def with_prefixes(answer: Alignment) -> list[tuple[str, DraftTrace]]:
    """The whole answer at each draft, and the draft."""
    return [(text, draft) for text, draft, _ in looks(answer)]


def looks(answer: Alignment, room: int = 16, hidden: bool = False) -> list[tuple[str, DraftTrace, bool]]:
    """The whole answer at each draft, the draft, and whether the answer would end there.

    Only if `hidden` also those with a special token, which the text does not show.
    """
    found, before, tokens = [], "", 0
    for segment in answer.segments:
        for draft in segment.drafts:
            ended = len(draft.token_ids) < SEGMENTS.length or tokens + len(draft.token_ids) == room
            if hidden or len((before + draft.text).split()) == tokens + len(draft.token_ids):
                found.append((before + draft.text, draft, ended))
        before, tokens = before + segment.text, tokens + len(segment.token_ids)
    return found


def length_of(text: str, finished: bool, target: int) -> float:
    excess = (len(text.split()) - target) / target
    return -abs(excess) if finished else min(0.0, -excess)


def count(prompt: str, texts: list[str]) -> list[float]:
    return [len(text.split()) / 4 for text in texts]


# --- what a composite scores ---


@pytest.mark.parametrize("weights", [(), (2.0, -0.5)])
def test_a_weighted_reward_is_the_sum_of_its_standardised_parts(
    start: Start, models: Callable[..., str], judge: ClassifierReward, weights: tuple[float, ...]
) -> None:
    engine, length = start(models("llama")), LengthReward(target=6, scale=LENGTH_SCALE)
    answer = engine.run(request(WeightedReward(rewards=[judge, length], weights=weights)))
    first, second = weights or (0.5, 0.5)

    def by_hand(text: str, finished: bool) -> float:
        [logit] = engine.score(judge, PROMPT, [text])
        in_words = length_of(text, finished, 6)
        (mean, spread), (other_mean, other_spread) = JUDGE_SCALE, LENGTH_SCALE
        return first * (logit - mean) / spread + second * (in_words - other_mean) / other_spread

    assert answer.prompt_reward == pytest.approx(by_hand("", False), abs=1e-4)
    looked_at = looks(answer)
    assert len(looked_at) > len(answer.segments)
    for text, draft, ended in looked_at:
        assert draft.reward == pytest.approx(by_hand(text, ended), abs=1e-4)
    assert answer.reward == pytest.approx(by_hand(answer.text, True), abs=1e-4)


def test_a_min_reward_is_its_weakest_part(start: Start, models: Callable[..., str], judge: ClassifierReward) -> None:
    length = LengthReward(target=6, scale=LENGTH_SCALE)
    answer = start(models("llama")).run(request(MinReward(rewards=[judge, length]), target=1.5))
    weakest = Counter[str]()
    for draft in drafts(answer):
        standardised = {
            name: (draft.parts[name] - mean) / spread
            for name, (mean, spread) in [(judge.name, JUDGE_SCALE), (length.name, LENGTH_SCALE)]
        }
        assert draft.reward == pytest.approx(min(standardised.values()))
        weakest[min(standardised, key=standardised.__getitem__)] += 1
    assert len(weakest) == 2  # each was the weakest somewhere


def test_composites_nest_and_their_parts_are_named(
    start: Start, models: Callable[..., str], judge: ClassifierReward
) -> None:
    length = LengthReward(target=6, scale=LENGTH_SCALE)
    inner = WeightedReward(rewards=[length, length.model_copy(update={"target": 9})], scale=(1.0, 2.0))
    reward = WeightedReward(rewards=[judge, inner, FunctionReward(function=count, scale=(0, 1))], weights=(1, 2, 3))
    assert inner.name == "weighted (length 6 words, length 9 words)"
    for draft in drafts(start(models("llama")).run(request(reward))):
        assert set(draft.parts) == {
            judge.name,
            inner.name,
            f"{inner.name} / length 6 words",
            f"{inner.name} / length 9 words",
            "function count",
        }
        total = (draft.parts[judge.name] - 0.25) / 2 + 2 * (draft.parts[inner.name] - 1) / 2
        assert draft.reward == pytest.approx(total + 3 * draft.parts["function count"])
        six, nine = (draft.parts[f"{inner.name} / length {n} words"] for n in (6, 9))
        assert draft.parts[inner.name] == pytest.approx(((six + 0.5) / 0.25 + (nine + 0.5) / 0.25) / 2)


def test_parts_of_one_name_are_numbered(start: Start, models: Callable[..., str]) -> None:
    part = LengthReward(target=6, scale=(0, 1))
    answer = start(models("llama")).run(request(WeightedReward(rewards=[part, part], weights=(1, 3))))
    assert {tuple(draft.parts) for draft in drafts(answer)} == {("length 6 words #1", "length 6 words #2")}
    assert all(draft.reward == 4 * draft.parts["length 6 words #1"] for draft in drafts(answer))


def test_a_constant_part_is_not_divided_by_its_spread(start: Start, models: Callable[..., str]) -> None:
    reward = WeightedReward(rewards=[FunctionReward(function=count, scale=(0.5, 0.0))])
    answer = start(models("llama")).run(request(reward))
    assert answer.reward == pytest.approx(len(answer.text.split()) / 4 - 0.5)


# --- a gate ---


class Recorder:
    """A reward function, its score the number of words, that writes down what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, prompt: str, texts: list[str]) -> list[float]:
        self.asked += texts
        return count(prompt, texts)


NO_W9 = PatternReward(forbidden=r"\bw(9|1\d|2[0-9])\b")  # 0 if open, -1 if closed


def is_open(text: str) -> bool:
    return re.search(NO_W9.forbidden[0], text) is None


def test_what_a_gate_closes_is_not_asked_further(start: Start, models: Callable[..., str]) -> None:
    inner = Recorder()
    reward = GateReward(gate=NO_W9, reward=FunctionReward(function=inner), closed=-50.0)
    answers = [start(models("llama")).run(request(reward, seed, target=1.0)) for seed in range(3)]
    looked_at = [pair for answer in answers for pair in with_prefixes(answer)]
    closed = [draft for text, draft in looked_at if not is_open(text)]
    through = [(text, draft) for text, draft in looked_at if is_open(text)]
    assert closed
    assert through
    assert inner.asked
    assert all(is_open(text) for text in inner.asked)
    assert {text for text, _ in through} <= set(inner.asked)
    assert {(draft.reward, *draft.parts.items()) for draft in closed} == {(-50.0, (NO_W9.name, -1.0))}
    assert all(
        draft.reward == len(text.split()) / 4 == draft.parts[reward.reward.name] and draft.parts[NO_W9.name] == 0
        for text, draft in through
    )


@pytest.mark.parametrize("acceptance", ["soft", "hard"])
def test_what_is_kept_honours_the_gate_where_anything_does(
    start: Start, models: Callable[..., str], acceptance: str
) -> None:
    """Also if the open candidates are far below the target."""
    reward = GateReward(gate=NO_W9, reward=FunctionReward(function=lambda _, texts: [-9.0] * len(texts)))
    honoured = impossible = 0
    engine = start(models("llama"))
    for seed in range(6):
        answer = engine.run(request(reward, seed, target=1.0, acceptance=acceptance))
        before = ""
        for segment in answer.segments:
            possible = any(is_open(before + draft.text) for draft in segment.drafts)
            before += segment.text
            assert is_open(before) == possible
            honoured, impossible = honoured + possible, impossible + (not possible)
    assert honoured
    assert impossible  # the method goes on all the same


def test_the_threshold_of_a_gate_counts_as_through(start: Start, models: Callable[..., str]) -> None:
    gate = FunctionReward(function=count)
    reward = GateReward(gate=gate, reward=LengthReward(target=1), threshold=0.5, closed=-7)
    assert start(models("llama")).score(reward, PROMPT, ["w6", "w6 w7", "w6 w7 w8"]) == [-7, -1, -2]


def nonempty(prompt: str, texts: list[str]) -> list[float]:
    return [float(bool(text)) for text in texts]


def test_a_gate_that_the_empty_answer_does_not_pass_still_lets_the_reward_guide(
    start: Start, models: Callable[..., str], judge: ClassifierReward
) -> None:
    engine = start(models("llama"))
    reward = GateReward(gate=FunctionReward(function=nonempty), reward=judge, threshold=1.0)
    answers = [engine.run(request(reward, seed, target=3.0)) for seed in range(4)]
    assert any(draft.verdict == "rejected" for answer in answers for draft in answer.segments[0].drafts)
    thresholds: list[Any] = [answer.segments[0].threshold for answer in answers]
    assert min(thresholds) > -10


# --- models, rows and counts ---


def test_a_classifier_in_two_composites_is_loaded_once(
    start: Start, models: Callable[..., str], judge: ClassifierReward
) -> None:
    engine, length = start(models("llama")), LengthReward(target=6, scale=(0, 1))
    other_scale = judge.model_copy(update={"scale": (0.0, 1.0)})
    rewards = [
        WeightedReward(rewards=[judge, length]),
        MinReward(rewards=[other_scale, length]),
        GateReward(gate=length, reward=WeightedReward(rewards=[judge])),
        judge,
    ]
    with mock.patch.object(ClassifierReward, "build", autospec=True, side_effect=ClassifierReward.build) as build:
        engine.run_many([request(reward) for reward in rewards])
    assert build.call_count == 1
    assert set(engine.inspect().rewards) == {judge.name, length.name}  # the composites have gone
    assert_idle(engine)


def test_a_decoder_reads_no_more_in_a_composite_than_alone(
    start: Start, models: Callable[..., str], judge: ClassifierReward
) -> None:
    """The same texts, for every candidate is looked at; so the tokens read must be the same, too."""
    length = LengthReward(target=6, scale=(0, 1))
    every_one = 99.0  # a target that nothing reaches
    alone = start(models("llama"), width=1, prefix_reuse=False).run(request(judge, target=every_one, tokens=32))
    standardised = ClassifierReward(**{**judge.model_dump(), "scale": (0.0, 1.0)})
    for reward in (
        WeightedReward(rewards=[standardised, length], weights=(1, 1e-9)),
        GateReward(gate=PatternReward(forbidden="never"), reward=judge),
        MinReward(rewards=[WeightedReward(rewards=[standardised], scale=(0, 1))]),
    ):
        inside = start(models("llama"), width=1, prefix_reuse=False).run(request(reward, target=every_one, tokens=32))
        assert inside.text == alone.text
        assert inside.usage.rm_tokens == alone.usage.rm_tokens
        assert inside.usage.rm_forwards == alone.usage.rm_forwards
    segments, prompt = len(alone.segments), len(alone.prompt_ids)
    assert segments > 4
    assert alone.usage.rm_tokens < prompt + 2 * alone.usage.drafted_tokens  # far from whole answers each time


async def test_composites_of_many_requests_change_no_text_and_free_their_rows(
    start: Start, models: Callable[..., str], judge: ClassifierReward
) -> None:
    length = LengthReward(target=6, scale=LENGTH_SCALE)
    rewards: list[Reward] = [
        WeightedReward(rewards=[judge, length]),
        MinReward(rewards=[judge, FunctionReward(function=count, scale=(0, 1))]),
        GateReward(gate=NO_W9, reward=judge),
        WeightedReward(rewards=[judge.model_copy(update={"granularity": "sentence"}), length]),
    ]
    requests = [request(reward, seed) for seed in range(4) for reward in rewards]
    narrow, wide = start(models("llama"), width=1), start(models("llama"), width=6, max_rows=7)
    expected = [await narrow.arun(one) for one in requests]
    found = await asyncio.gather(*map(wide.arun, requests))
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    assert [answer.reward for answer in found] == pytest.approx([answer.reward for answer in expected], abs=1e-4)
    assert [[d.parts for d in drafts(a)] for a in found] == [
        [pytest.approx(d.parts, abs=1e-4) for d in drafts(a)] for a in expected
    ]
    assert_idle(narrow)
    assert_idle(wide)


# --- one part fails ---


def raises(prompt: str, texts: list[str]) -> list[float]:
    if any(texts):
        raise ZeroDivisionError("no idea")
    return [0.0]


def one_number(prompt, answers):
    return 0.5


def not_a_number(prompt: str, texts: list[str]) -> list[float]:
    return [math.nan if text else 0.0 for text in texts]


def one_too_many(prompt: str, texts: list[str]) -> list[float]:
    return [0.0] * (len(texts) + any(texts))


def one_too_few(prompt: str, texts: list[str]) -> list[float]:
    return [0.0] * (len(texts) - any(texts))


async def never(prompt: str, texts: list[str]) -> list[float]:
    if any(texts):
        await asyncio.sleep(60)
    return [0.0]


BAD = [
    (
        FunctionReward(function=raises, scale=(0, 1)),
        r"'function raises' failed: ZeroDivisionError: no idea; it was asked for '",
    ),
    (FunctionReward(function=one_number, scale=(0, 1)), r"it returned float, not a list of numbers"),
    (FunctionReward(function=not_a_number, scale=(0, 1)), r"'function not_a_number' returned nan for the text '"),
    (FunctionReward(function=one_too_many, scale=(0, 1)), r"'function one_too_many' returned \d scores for \d text"),
    (FunctionReward(function=one_too_few, scale=(0, 1)), r"'function one_too_few' returned \d scores for \d text"),
    (FunctionReward(function=never, scale=(0, 1), timeout=0.1), r"'function never' gave no scores within timeout=0\.1"),
]


@pytest.mark.parametrize(("bad", "says"), BAD, ids=lambda value: value.name if isinstance(value, Reward) else "")
@pytest.mark.parametrize("kind", ["weighted", "min", "gate", "behind the gate", "nested"])
async def test_a_part_that_fails_is_named_and_harms_its_request_only(
    start: Start, models: Callable[..., str], judge: ClassifierReward, bad: Reward, says: str, kind: str
) -> None:
    """The requests share the composite, so their candidates are scored in one call."""

    def around(part: Reward) -> Reward:
        return {
            "weighted": WeightedReward(rewards=[judge, part]),
            "min": MinReward(rewards=[part, judge]),
            "gate": GateReward(gate=part, reward=judge),
            "behind the gate": GateReward(gate=PatternReward(forbidden="never"), reward=part),
            "nested": MinReward(rewards=[WeightedReward(rewards=[judge, part], scale=(0, 1)), judge]),
        }[kind]

    engine = start(models("llama"), width=2)
    good = around(FunctionReward(function=count, scale=(0, 1)))
    expected = [engine.run(request(good, seed)) for seed in range(2)]
    requests = [request(good, 0), request(around(bad), 3), request(good, 1)]
    answers: list[Any] = await asyncio.gather(*map(engine.arun, requests), return_exceptions=True)
    first, failed, second = answers
    assert [answer.token_ids for answer in (first, second)] == [answer.token_ids for answer in expected]
    with pytest.raises(RewardError, match=says):
        raise failed
    assert_idle(engine)
    assert engine.run(request(good, 1)).token_ids == expected[1].token_ids


async def test_one_prompt_that_breaks_a_part_harms_no_request_with_the_same_reward(
    start: Start, models: Callable[..., str], judge: ClassifierReward
) -> None:
    def only_of_w9(prompt: str, texts: list[str]) -> list[float]:
        if not prompt.startswith("w9"):
            raise ValueError(f"what is {prompt}?")
        return count(prompt, texts)

    engine = start(models("llama"), width=2)
    reward = WeightedReward(rewards=[judge, FunctionReward(function=only_of_w9, scale=(0, 1))])
    good = [request(reward, seed) for seed in range(3)]
    expected = [engine.run(one) for one in good]
    bad = Request("w10", good[0].decoding, reward, good[0].sampler, 16, seed=5)
    answers: list[Any] = await asyncio.gather(*map(engine.arun, [*good, bad]), return_exceptions=True)
    *found, failed = answers
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    assert isinstance(failed, RewardError)
    assert "only_of_w9" in str(failed)
    assert "what is w10?" in str(failed)
    assert_idle(engine)


def test_a_part_that_does_not_take_the_prompt_leaves_no_row(start: Start, models: Callable[..., str]) -> None:
    good = ClassifierReward(model=models("llama", classifier=True), scale=(0, 1))
    template = "{{ raise_exception('nothing pleases me') }}"
    bad = ClassifierReward(model=models("llama", classifier=True, chat_template=template), scale=(0, 1))
    engine = start(models("llama"))
    for reward in (WeightedReward(rewards=[good, bad]), GateReward(gate=MinReward(rewards=[good, bad]), reward=good)):
        with pytest.raises(PromptError, match="nothing pleases me"):
            engine.run(request(reward))
        assert_idle(engine)


def test_scores_too_large_to_add_name_the_composite(start: Start, models: Callable[..., str]) -> None:
    reward = WeightedReward(rewards=[LengthReward(target=1, scale=(0, 1e-300))] * 2, weights=(1e308, -1e308))
    with pytest.raises(RewardError, match=r"weighted .* returned nan"):
        start(models("llama")).score(reward, PROMPT, ["w7 w8 w9"])


# --- a time-out ---


@pytest.mark.parametrize("wrap", [lambda r: r, lambda r: r.model_copy(update={"granularity": "sentence"})])
def test_a_function_that_hangs_is_given_up(
    start: Start, models: Callable[..., str], wrap: Callable[[Reward], Reward]
) -> None:
    """A thread cannot be stopped, but nobody waits for it, and the engine goes on."""
    released = threading.Event()

    def hangs(prompt: str, texts: list[str]) -> list[float]:
        if any(texts):
            released.wait(60)
        return [0.0] * len(texts)

    engine = start(models("llama"), width=2)
    try:
        with pytest.raises(RewardError, match=r"'function hangs' gave no scores within timeout=0\.2 seconds"):
            engine.run(request(wrap(FunctionReward(function=hangs, timeout=0.2)), tokens=200))
        assert_idle(engine)
        assert engine.run(request(FunctionReward(function=count))).text
        assert not released.is_set()
    finally:
        released.set()


async def test_a_composite_has_a_timeout_of_its_own(start: Start, models: Callable[..., str]) -> None:
    part = FunctionReward(function=never, scale=(0, 1))
    engine = start(models("llama"))
    with pytest.raises(RewardError, match=r"'weighted \(function never\)' gave no scores within timeout=0\.1"):
        await engine.arun(request(WeightedReward(rewards=[part], timeout=0.1)))
    assert_idle(engine)


def gives_up(prompt: str, texts: list[str]) -> list[float]:
    raise TimeoutError("the server took 30 seconds")


def test_a_function_s_own_time_out_is_told_as_its_own(start: Start, models: Callable[..., str]) -> None:
    with pytest.raises(RewardError, match="the server took 30 seconds"):
        start(models("llama")).score(FunctionReward(function=gives_up), PROMPT, ["w7"])


# --- whole sentences ---


def test_only_whole_sentences_are_asked_and_each_once(start: Start, models: Callable[..., str]) -> None:
    unfinished = 0
    engine = start(models("llama"), width=4)
    for seed in range(8):
        recorder = Recorder()
        reward = FunctionReward(function=recorder, granularity="sentence")
        answer = engine.run(request(reward, seed, target=99.0, tokens=24))
        finished = {text for text, _, ended in looks(answer, 24, hidden=True) if ended}
        assert recorder.asked[0] == ""
        assert max(Counter(recorder.asked).values()) == 1
        for text in recorder.asked:
            assert whole_sentences(text) == text or text in finished
        for text, draft in with_prefixes(answer):
            if text not in finished:
                assert draft.reward == len(whole_sentences(text).split()) / 4
                unfinished += whole_sentences(text) not in ("", text)
        assert answer.reward == len(answer.text.split()) / 4
    assert unfinished  # some were really cut


def test_where_sentences_end() -> None:
    ended = ["", "w6 .", "w6 . w7 !", "One. Two?", 'He said "no."', "First line\n", "\u597d\u3002", "Well\u2026"]
    for text in ended:
        assert whole_sentences(text) == text
    for text, cut in [("w6 . w7", "w6 ."), ("3.14 is", ""), ("a.b", ""), ("One. Tw", "One."), ("x\ny", "x\n")]:
        assert whole_sentences(text) == cut
    assert SENTENCE_END.search("e.g") is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Dr. Who had tea, e.g. green.", ["Dr.", "Who had tea, e.g.", "green."]),  # abbreviations end sentences
        ("J. Smith et al. agree.", ["J.", "Smith et al.", "agree."]),
        ("It costs 3.14, see a.org (v1.2).", ["It costs 3.14, see a.org (v1.2)."]),  # decimals and names do not
        ("Well... maybe\u2026 no.", ["Well...", "maybe\u2026", "no."]),
        ("Wait\u2026and see.", ["Wait\u2026and see."]),
        ("1. Tea\n2. Milk", ["1.", "Tea", "2.", "Milk"]),  # so do the numbers of a list
        ("- tea\n- milk\n", ["- tea", "- milk"]),  # every line is one, with a mark or without
        ("A line that\nis wrapped.", ["A line that", "is wrapped."]),
        ("One.Two", ["One.Two"]),
        ("\u597d\u3002\u4e0d\u597d\u3002", ["\u597d\u3002\u4e0d\u597d\u3002"]),  # no space between them
        ("\u0928\u092e\u0938\u094d\u0924\u0947\u0964 \u0939\u093e\u0901\u0964", None),  # a danda is no mark here
        ("\u0643\u064a\u0641\u061f \u0646\u0639\u0645\u061f", None),  # nor is the Arabic question mark
    ],
)
def test_limits_of_the_rule_for_sentences(text: str, found: list[str] | None) -> None:
    """What docs/rewards.md says that it gets wrong."""
    assert split_sentences(text) == (found or [text])


def test_a_mark_at_the_end_counts_until_more_follows() -> None:
    assert whole_sentences("It costs 3.") == "It costs 3."
    assert whole_sentences("It costs 3.14") == ""


def test_a_classifier_on_sentences_scores_the_cut_text(
    start: Start, models: Callable[..., str], judge: ClassifierReward
) -> None:
    engine = start(models("llama"))
    cut = 0
    for seed in range(4):
        answer = engine.run(request(judge.model_copy(update={"granularity": "sentence"}), seed, target=99.0, tokens=24))
        asked = [text if ended else whole_sentences(text) for text, _, ended in looks(answer, 24)]
        expected = engine.score(judge, PROMPT, asked)
        assert [draft.reward for _, draft, _ in looks(answer, 24)] == pytest.approx(expected, abs=1e-4)
        assert answer.reward == pytest.approx(engine.score(judge, PROMPT, [answer.text])[0], abs=1e-4)
        cut += len(set(asked)) > 2
    assert cut
    assert_idle(engine)


async def test_a_finished_answer_is_not_scored_like_an_unfinished_one_of_the_same_text() -> None:
    from cards_integrations.rewards import Conversation, Response, RewardLoader
    from cards_integrations.trace import Usage

    model = RewardLoader(None)[LengthReward(target=10, granularity="sentence")]  # type: ignore[arg-type]
    conversation = Conversation(PROMPT, Usage())
    model.open(conversation)
    assert await model.score([Response(conversation, "w6 w7 .")]) == [0.0]  # it can still grow
    assert await model.score([Response(conversation, "w6 w7 .", finished=True)]) == [-0.7]


def test_every_draft_has_parts_on_whole_sentences(start: Start, models: Callable[..., str]) -> None:
    part = LengthReward(target=6, scale=(0, 1))
    reward = WeightedReward(rewards=[part], granularity="sentence")
    answer = start(models("llama")).run(request(reward, target=99.0))
    assert all(f"{reward.name} / {part.name}" in draft.parts for draft in drafts(answer))


# --- length and pattern ---


@pytest.mark.parametrize("unit", ["words", "characters"])
def test_an_unfinished_answer_is_blamed_for_what_it_is_too_long_by(
    start: Start, models: Callable[..., str], unit: str
) -> None:
    engine = start(models("llama"))
    reward = LengthReward(target=10, unit=unit)
    size = (lambda text: len(text.split())) if unit == "words" else len
    assert engine.score(reward, PROMPT, ["", "w6 w7 w8 w9", "w6 " * 20]) == pytest.approx(
        [-1.0, -abs(size("w6 w7 w8 w9") - 10) / 10, -abs(size("w6 " * 20) - 10) / 10]
    )
    answers = [engine.run(request(reward, seed, target=5.0, tokens=24)) for seed in range(4)]
    assert {answer.prompt_reward for answer in answers} == {0.0}
    looked_at = [(text, draft) for answer in answers for text, draft, ended in looks(answer, 24) if not ended]
    assert [d.reward for _, d in looked_at] == [pytest.approx(min(0.0, 1 - size(text) / 10)) for text, _ in looked_at]
    assert {draft.reward == 0 for _, draft in looked_at} == ({True, False} if unit == "words" else {False})
    assert [a.reward for a in answers] == pytest.approx([-abs(size(a.text) - 10) / 10 for a in answers])


def test_a_pattern_counts_what_is_there(start: Start, models: Callable[..., str]) -> None:
    reward = PatternReward(wanted=[r"\bw6\b", r"\bw7\b"], forbidden=[r"\bW8\b", r"\bw9\b"])
    engine, texts = start(models("llama")), ["", "w6", "w6 w6", "w6 w7", "w8", "w8 w9 w6", "w66"]
    assert engine.score(reward, PROMPT, texts) == [0, 0.5, 0.5, 1, -1, -1.5, 0]
    strict = PatternReward(**{**reward.model_dump(), "case_sensitive": True})
    assert engine.score(strict, PROMPT, ["w8", "w9"]) == [0, -1]
    answer = engine.run(request(reward, target=2.0))
    expected = engine.score(reward, PROMPT, [text for text, _ in with_prefixes(answer)])
    assert [draft.reward for _, draft in with_prefixes(answer)] == expected
    assert answer.prompt_reward == 0


def test_a_copy_of_a_used_pattern_searches_its_own(start: Start, models: Callable[..., str]) -> None:
    engine, reward = start(models("llama")), PatternReward(wanted="w6")
    assert engine.score(reward, PROMPT, ["w6", "w7"]) == [1, 0]
    assert engine.score(reward.model_copy(update={"wanted": ("w7",)}), PROMPT, ["w6", "w7"]) == [0, 1]


def test_the_best_of_n_of_a_length_is_the_nearest(start: Start, models: Callable[..., str]) -> None:
    reward = LengthReward(target=6)
    found = start(models("llama")).run(Request(PROMPT, BestOfN(n=8), reward, Sampler(temperature=1.5), 24, seed=1))
    distances = [abs(len(draft.text.split()) - 6) for draft in drafts(found)]
    assert abs(len(found.text.split()) - 6) == min(distances) < max(distances)
