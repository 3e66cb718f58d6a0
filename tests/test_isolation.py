"""What one request raises, in the engine's own steps, ends that request; its neighbours' texts stay as they are."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Start
from internals import (
    assert_idle,
    caches,
    held,
    is_idle,
    language_model,
    memory,
    replace_scheduler,
    reward_model,
    reward_models,
    run_inside,
    wait_until,
)
from pydantic import Field
from transformers import BertConfig, BertForSequenceClassification

from cards_integrations.chat.grammar import Grammar, GrammarTokenizer, Matcher
from cards_integrations.decoding import BestOfN, Cards, Decoding, FixedLength, Sampling
from cards_integrations.decoding.base import Draft
from cards_integrations.engine import Engine, Request, answer_writer
from cards_integrations.engine.scheduler import BestPerSecond
from cards_integrations.errors import CardsError, CardsTimeout, ModelError, PromptError, RewardError
from cards_integrations.models.local import language_model as local
from cards_integrations.models.local.prefill import prefill_shares
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward, FunctionReward, LengthReward, Reward, WeightedReward, loader
from cards_integrations.rewards.base import Conversation, Response, RewardModel
from cards_integrations.rewards.scorers import incremental
from cards_integrations.trace import Alignment
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.forward import PREFILL_CHUNK
from cards_integrations.transformer.step_times import StepTimes

PROMPT = "w9 w20 w31 w5"
WITHIN = 30.0  # seconds for an answer that takes some milliseconds
BREAKS = "w47"
DECODING = Cards(target_reward=0.5, beta=0.3, boundary=FixedLength(length=3))


class Broken(Exception):
    """What the tests raise."""


def request(reward: Reward, seed: int, prompt: str = PROMPT, **options: Any) -> Request:
    return Request(prompt, options.pop("decoding", DECODING), reward, Sampler(), 12, seed=seed, **options)


def outcomes(engine: Engine, requests: list[Request]) -> list[Alignment | BaseException]:
    """What became of each of them, submitted at the same moment."""
    with held(engine, WITHIN):
        futures = [engine.submit(each) for each in requests]
    return [future.exception(WITHIN) or future.result() for future in futures]


@pytest.fixture
def judge(models: Callable[..., str]) -> ClassifierReward:
    return ClassifierReward(model=models("llama", classifier=True))


@pytest.fixture
def engine(models: Callable[..., str], start: Start) -> Engine:
    engine = start(models("llama"))
    engine.loaded()
    return engine


def check(engine: Engine, judge: Reward, bad: Request) -> BaseException:
    """The error of a request, whose neighbours write what they write without it."""
    neighbours = [request(judge, seed) for seed in range(3)]
    expected = [answer.token_ids for answer in engine.run_many(neighbours)]
    error, *others = outcomes(engine, [bad, *neighbours])
    assert [other.token_ids if isinstance(other, Alignment) else other for other in others] == expected
    assert_idle(engine)
    assert isinstance(error, BaseException)
    return error


# --- boundaries ---


class RaisesBefore(FixedLength):
    """Fails where it looks at logits."""

    def ends_before(self, logits: torch.Tensor, log_p: torch.Tensor, rows: list[int]) -> torch.Tensor | None:
        raise Broken("before")

    @property
    def min_tokens(self) -> int:
        return 0


class RaisesAfter(FixedLength):
    """Fails where it looks at text."""

    def ends_after(self, text: str) -> bool:
        raise Broken("after")

    @property
    def min_tokens(self) -> int:
        return 0


class Leaves(RaisesAfter):
    """Its author meant to end a script."""

    def ends_after(self, text: str) -> bool:
        raise SystemExit(3)


class Unsayable(Exception):
    """Cannot even say what is wrong."""

    def __str__(self) -> str:
        raise ZeroDivisionError


class RaisesUnsayable(RaisesAfter):
    """Fails with an error that fails."""

    def ends_after(self, text: str) -> bool:
        raise Unsayable


class TooFew(RaisesBefore):
    """Decides for fewer candidates than it was asked about."""

    def ends_before(self, logits: torch.Tensor, log_p: torch.Tensor, rows: list[int]) -> torch.Tensor | None:
        return torch.zeros(len(rows) + 1, dtype=torch.bool)


@pytest.mark.parametrize("boundary", [RaisesBefore, RaisesAfter, RaisesUnsayable, Leaves, TooFew])
def test_a_boundary(engine: Engine, judge: ClassifierReward, boundary: type[FixedLength]) -> None:
    decoding = DECODING.model_copy(update={"boundary": boundary(length=3)})
    error = check(engine, judge, request(judge, 7, decoding=decoding))
    assert isinstance(error, ModelError)
    assert "Drafting failed" in str(error)


# --- methods ---


class Uneven(FixedLength):
    """Ends some segments earlier than others, so that later drafts have rewards before earlier ones."""

    def ends_after(self, text: str) -> bool:
        return len(text) % 3 == 0

    @property
    def min_tokens(self) -> int:
        return 1


class Undecided(Decoding):
    """Cannot say what it will keep."""

    method: str = "undecided"

    async def generate(self, session: Any) -> None:
        while not session.finished:
            async for draft in session.drafts(until=Uneven(length=8), limit=8, passes=self._passes):
                session.reject(draft)
            await session.keep_best()

    def _passes(self, draft: Draft) -> bool:
        raise Broken("passes")


def test_a_method_that_cannot_say_what_passes(engine: Engine, judge: ClassifierReward) -> None:
    """The scheduler asks for it, amid a step of all."""
    replace_scheduler(engine, BestPerSecond(StepTimes({1: 1.0, 64: 1.001})))
    error = check(engine, judge, request(judge, 7, decoding=Undecided()))
    assert isinstance(error, Broken)


Body = Callable[[Any], Coroutine[Any, Any, None]]


class Odd(Decoding):
    """Does what a method must not do."""

    method: str = "odd"
    body: Body = Field(exclude=True)

    async def generate(self, session: Any) -> None:
        await self.body(session)


async def _ends_early(session: Any) -> None:
    await session.grow([None], THREE)


async def _goes_on(session: Any) -> None:
    await Sampling().generate(session)
    await session.grow([None], THREE)


async def _keeps_twice(session: Any) -> None:
    async for draft in session.drafts(until=THREE, limit=2):
        await session.keep(draft)
        await session.keep(draft)


async def _keeps_another_s(session: Any) -> None:
    await session.keep(Draft(0, "w7", 1.0, 1, 0.5))


async def _continues_a_finished_one(session: Any) -> None:
    drafts = await session.grow([None] * 8, FixedLength(length=200), scored=False)
    await session.grow(drafts, THREE)


async def _is_cancelled_by_nobody(session: Any) -> None:
    raise asyncio.CancelledError


THREE = FixedLength(length=3)
ODD: dict[Body, str] = {
    _ends_early: "ended before the answer did",
    _goes_on: "The answer is finished",
    _keeps_twice: "not of this segment",
    _keeps_another_s: "not of this segment",
    _continues_a_finished_one: "no text can follow it",
    _is_cancelled_by_nobody: "nobody had cancelled it",
}


@pytest.mark.parametrize("body", ODD, ids=lambda body: body.__name__)
def test_a_method_that_does_what_it_must_not_is_told_so(engine: Engine, judge: ClassifierReward, body: Body) -> None:
    error = check(engine, judge, request(judge, 7, decoding=Odd(body=body)))
    assert isinstance(error, CardsError)
    assert ODD[body] in str(error)


def test_a_session_is_of_no_use_when_its_request_has_ended(engine: Engine, judge: ClassifierReward) -> None:
    left: list[Any] = []

    async def leaves_it(session: Any) -> None:
        left.append(session)
        await Sampling().generate(session)

    engine.run(request(judge, 7, decoding=Odd(body=leaves_it)))
    for use in (lambda session: session.prompt_reward(), lambda session: session.grow([None], THREE)):
        with pytest.raises(CardsError, match="The request has ended"):
            run_inside(engine, use(left[0]), WITHIN)
    assert_idle(engine)


# --- grammars ---


@pytest.mark.parametrize("where", ["fork", "take", "mask"])
def test_a_grammar(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def broken(*_: Any) -> Any:
        raise Broken(where)

    engine = start(tiny.save(tmp_path, tiny.causal(vocab_size=280), tiny.byte_pairs()))
    engine.loaded()
    if where == "mask":
        monkeypatch.setattr(GrammarTokenizer, "allowed", broken)
    else:
        monkeypatch.setattr(Matcher, where, broken)
    length = LengthReward(target=12)
    error = check(engine, length, request(length, 7, grammar=Grammar.regex("[ab]{2,40}")))
    assert isinstance(error, Broken | ModelError)
    assert where in str(error)


# --- the model's forward ---


def test_an_input_that_the_model_cannot_read(
    engine: Engine, judge: ClassifierReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward that fails is repeated in halves, down to the input that the error belongs to."""
    model = language_model(engine).model
    forward, token = model.forward, engine.loaded().chat.encode(BREAKS)[-1]

    def fails(*args: Any, **inputs: Any) -> Any:
        if ((inputs["input_ids"] == token) & (inputs["position_ids"] < 2)).any():  # a prompt that begins with it
            raise Broken("in a forward")
        return forward(*args, **inputs)

    monkeypatch.setattr(model, "forward", fails)
    error = check(engine, judge, request(judge, 7, BREAKS))
    assert isinstance(error, ModelError)
    assert isinstance(error.__cause__, Broken)


# --- rewards that fail where nothing is scored ---


class Careless(RewardModel):
    """Fails in one of its methods."""

    name = "careless"

    def __init__(self, wrong: str) -> None:
        self.wrong = wrong
        if wrong != "across_requests":
            setattr(self, wrong, self._broken)

    @property
    def across_requests(self) -> bool:  # type: ignore[override]
        if self.wrong == "across_requests":
            raise Broken("in a reward")
        return False

    def _broken(self, _: Conversation | Response) -> None:
        raise Broken("in a reward")

    async def score(self, responses: Any) -> list[float]:
        return [float(-len(response.text)) for response in responses]


class CarelessReward(Reward):
    kind: str = "careless"
    wrong: str

    def build(self, loader: Any) -> RewardModel:
        return Careless(self.wrong)


@pytest.mark.parametrize("wrong", ["open", "keep", "drop", "close", "across_requests"])
def test_a_reward_model_that_fails_where_nothing_is_scored(engine: Engine, judge: ClassifierReward, wrong: str) -> None:
    strict = DECODING.model_copy(update={"target_reward": 0.0})
    error = check(engine, judge, request(CarelessReward(wrong=wrong), 7, decoding=strict))
    assert isinstance(error, Broken | CardsError)


def test_a_reward_model_that_cannot_be_released_harms_nobody(
    engine: Engine, judge: ClassifierReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even whoever is served when its turn has come."""
    monkeypatch.setattr(loader, "KEPT", 0)
    answer = engine.run(request(CarelessReward(wrong="release"), 0))
    assert engine.run(request(CarelessReward(wrong="release"), 0)).token_ids == answer.token_ids
    engine.run(request(judge, 0))
    assert not engine.inspect().rewards
    assert_idle(engine)


def test_a_prompt_that_a_reward_refuses_leaves_nothing_open(engine: Engine, judge: ClassifierReward) -> None:
    def nothing(prompt: str, texts: list[str]) -> list[float]:
        return [math.nan] * len(texts)

    error = check(engine, judge, request(FunctionReward(function=nothing), 7))
    assert isinstance(error, RewardError)


def test_a_reward_that_gives_its_scores_one_by_one_holds_up_nobody(engine: Engine, judge: ClassifierReward) -> None:
    """The body of a generator runs where its numbers are drawn, which is no business of the engine's thread."""
    drawing, go_on = threading.Event(), threading.Event()

    def one_by_one(prompt: str, texts: list[str]) -> Iterator[float]:
        for text in texts:
            drawing.set()
            assert go_on.wait(WITHIN)
            yield float(len(text))

    drafted = engine.submit(request(FunctionReward(function=one_by_one, scale=(0.0, 1.0)), 0))
    assert drawing.wait(WITHIN)
    try:
        assert engine.submit(request(judge, 1)).result(WITHIN / 3)
    finally:
        go_on.set()
    in_a_list = FunctionReward(function=lambda prompt, texts: [*map(float, map(len, texts))], scale=(0.0, 1.0))
    assert drafted.result(WITHIN).token_ids == engine.run(request(in_a_list, 0)).token_ids


def test_a_reward_whose_scores_have_no_end(engine: Engine, judge: ClassifierReward) -> None:
    endless = FunctionReward(function=lambda prompt, texts: itertools.count(), scale=(0.0, 1.0))
    error = check(engine, judge, request(endless, 7))
    assert isinstance(error, RewardError)
    assert "scores for 1 text" in str(error)


class SlowEncoder:
    """Whole texts are read by a tiny encoder; what each forward reads, and how far the others are meanwhile."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(8)
        sizes = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        shape = {"intermediate_size": 48, "max_position_embeddings": 256, "num_labels": 1, "initializer_range": 0.5}
        model = BertForSequenceClassification(BertConfig(**sizes, **shape)).eval()
        self.reward = ClassifierReward(model=tiny.save(folder, model, tiny.words()), prompt_format="{response}")
        self.read: list[tuple[int, int]] = []

    def watch(self, engine: Engine) -> None:
        def note(module: Any, args: Any, inputs: Any) -> None:
            self.read.append((inputs["input_ids"].numel(), engine_steps()))

        def engine_steps() -> int:
            return int(language_model(engine).steps)

        [scorer] = reward_models(engine)
        scorer.model.register_forward_pre_hook(note, with_kwargs=True)  # type: ignore[attr-defined]


def test_an_encoder_that_reads_many_texts_takes_turns_with_the_others(engine: Engine, tmp_path: Path) -> None:
    """In portions, of which each has an end: not all of them padded to the longest in one forward."""
    encoder = SlowEncoder(tmp_path)
    texts = [" ".join(f"w{6 + (i * k) % 40}" for i in range(1 + 7 * k % 240)) for k in range(120)]
    alone = [engine.score(encoder.reward, PROMPT, [text])[0] for text in texts]
    encoder.watch(engine)
    plain = replace(request(encoder.reward, 0), decoding=Sampling(), reward=None, max_tokens=200)
    bias = replace(plain, sampler=Sampler(logit_bias=((1, -50.0),)))
    drafted = engine.submit(bias)
    assert engine.score(encoder.reward, PROMPT, texts) == pytest.approx(alone, abs=1e-5)
    assert len(drafted.result(WITHIN).token_ids) == 200
    assert max(tokens for tokens, _ in encoder.read) <= PREFILL_CHUNK
    assert len(encoder.read) > 5
    assert encoder.read[-1][1] > encoder.read[0][1]


# --- batches ---


def test_errors_in_the_places_of_their_answers(engine: Engine, judge: ClassifierReward) -> None:
    requests = [request(judge, 0), request(judge, 1, prompt=" ".join(["w9"] * 3000)), request(judge, 2)]
    found = engine.run_many(requests, return_exceptions=True)
    assert isinstance(found.pop(1), PromptError)
    assert [each.token_ids for each in found if isinstance(each, Alignment)] == [
        engine.run(requests[i]).token_ids for i in (0, 2)
    ]
    with pytest.raises(PromptError):
        engine.run_many(requests)
    assert_idle(engine)


def test_answers_as_they_end(engine: Engine, judge: ClassifierReward) -> None:
    """The short one first; giving up after it stops the drafting of the other."""
    long = replace(request(judge, 0), max_tokens=100)
    with closing(engine.stream_many([long, request(judge, 1)])) as answers:
        index, answer = next(answers)
    assert index == 1
    assert isinstance(answer, Alignment)
    assert answer.token_ids == engine.run(request(judge, 1)).token_ids
    wait_until(lambda: is_idle(engine))


def test_the_time_limit_of_a_batch_is_each_answer_s_own(models: Callable[..., str], start: Start) -> None:
    """Waiting for a row behind the others of the batch does not count."""
    engine, begun = start(models("llama"), max_rows=1), []

    async def slow(prompt: str, texts: list[str]) -> list[float]:
        begun.append(prompt)
        await asyncio.sleep(0.4)
        return [0.0] * len(texts)

    reward = FunctionReward(function=slow, scale=(0.0, 1.0))
    requests = [request(reward, seed, decoding=BestOfN(n=1)) for seed in range(3)]
    engine.run_many(requests)
    tight = [replace(each, timeout=2.4) for each in requests]
    assert len(engine.run_many(tight * 3)) == 9  # 3.6 seconds in all
    found = outcomes(engine, tight * 3)
    assert any(isinstance(each, CardsTimeout) for each in found)  # of separate requests it does


def test_a_request_waits_for_the_memory_of_a_score(models: Callable[..., str], start: Start) -> None:
    """Only a score holds it, of no request."""
    judge = ClassifierReward(model=models("llama", classifier=True), scale=(0.0, 1.0))
    scoring, go_on = threading.Event(), threading.Event()

    def slow(prompt: str, texts: list[str]) -> list[float]:
        scoring.set()
        assert go_on.wait(WITHIN)
        return [0.0] * len(texts)

    both = WeightedReward(rewards=(judge, FunctionReward(function=slow, scale=(0.0, 1.0))))
    engine = start(models("llama"))
    engine.run(request(judge, 0))
    memory(engine).limit = int(1.3 * sum(cache.bytes + cache.row_bytes(500) for cache in caches(engine)))
    with ThreadPoolExecutor() as pool:
        scored = pool.submit(engine.score, both, PROMPT, ["w1 " * 200] * 8)
        assert scoring.wait(WITHIN)
        answer = engine.submit(replace(request(judge, 0), max_tokens=200))
        wait_until(lambda: engine.inspect().waiting == 2)
        assert not answer.done()
        go_on.set()
        assert answer.result(WITHIN)
        assert len(scored.result(WITHIN)) == 8
    assert_idle(engine)


# --- the budget of a step ---


@pytest.mark.parametrize(
    ("unread", "budget", "expected"),
    [
        ([], 8, []),
        ([3], 8, [3]),
        ([20], 8, [8]),
        ([20, 3], 8, [5, 3]),
        ([20, 20, 3], 8, [5, 0, 3]),
        ([20, 6, 6], 8, [4, 4, 0]),
        ([2, 20, 20], 8, [2, 6, 0]),
    ],
)
def test_shares_of_a_step(unread: list[int], budget: int, expected: list[int]) -> None:
    """The oldest prompt has half of it, and the shortest the rest."""
    assert prefill_shares(unread, budget) == expected


def test_a_short_prompt_among_long_ones_is_read_in_a_small_piece(
    engine: Engine, judge: ClassifierReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk, beside = 100, 20
    monkeypatch.setattr(local, "PREFILL_CHUNK", chunk)
    monkeypatch.setattr(local, "PREFILL_BESIDE", beside)
    read: list[int] = []
    lm, run = language_model(engine), language_model(engine)._run

    def noted(inputs: list[ForwardInput]) -> None:
        read.append(sum(len(each.ids) for each in inputs))
        run(inputs)

    lm._run = noted
    long = [" ".join(f"w{6 + (i * (7 + k) + k) % 41}" for i in range(150)) for k in range(4)]
    plain = replace(request(judge, 0), decoding=Sampling(), reward=None, max_tokens=1)
    outcomes(engine, [replace(plain, prompt=text) for text in [*long, "w7 w8 w9"]])
    assert read[0] <= beside
    assert max(read) == chunk


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3_next", "jamba"])
def test_a_reward_reads_long_texts_in_pieces(
    start: Start, models: Callable[..., str], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """A long prompt of which one answer is asked, and long answers; their scores are the same."""
    engine, judge = start(models("llama"), width=2), ClassifierReward(model=models(family, classifier=True))
    long = " ".join(f"w{6 + i * i % 41}" for i in range(110))
    asked = [("w9", [long, f"w7 {long} w8"]), (long, ["w7"]), (long, [""])]
    expected = [engine.score(judge, prompt, answers) for prompt, answers in asked]
    drafted = replace(request(judge, 1, long), max_tokens=40)
    answer = engine.run(drafted)
    monkeypatch.setattr(incremental, "PREFILL_CHUNK", 16)
    memory(engine).evict_all()
    read: list[int] = []
    transformer = reward_model(engine).transformer
    hidden = transformer.hidden

    def noted(inputs: list[ForwardInput]) -> Any:
        read.extend(len(each.ids) for each in inputs)
        return hidden(inputs)

    monkeypatch.setattr(transformer, "hidden", noted)
    assert [engine.score(judge, prompt, answers) for prompt, answers in asked] == [
        pytest.approx(each, abs=1e-4) for each in expected
    ]
    memory(engine).evict_all()
    assert engine.run(drafted).token_ids == answer.token_ids
    assert max(read) <= 17
    assert_idle(engine)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3_next", "jamba"])
def test_whole_answers_are_read_in_pieces(
    start: Start, models: Callable[..., str], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Uncertainties and hidden states are those that one forward gives, and a neighbour goes on meanwhile."""
    engine = start(models(family))
    prompt = " ".join(f"w{6 + i * i % 41}" for i in range(50))
    endless = Sampler(logit_bias=dict.fromkeys(language_model(engine).eos, -100.0))
    plain = Request(prompt, Sampling(), None, endless, 70, seed=3)
    answer = engine.run(plain)
    asked = list(answer.prompt_ids), list(answer.token_ids)
    whole = engine.uncertainties("entropy", [answer]), engine.states([asked])[0]
    monkeypatch.setattr(local, "PREFILL_BESIDE", 16)
    read: list[int] = []
    lm, forward = language_model(engine), language_model(engine).transformer._forward

    def noted(inputs: list[ForwardInput], run: Any) -> Any:
        read.append(max(len(each.ids) for each in inputs))
        return forward(inputs, run)

    monkeypatch.setattr(lm.transformer, "_forward", noted)
    with ThreadPoolExecutor(1) as pool:
        with held(engine, WITHIN):
            neighbour = engine.submit(replace(plain, prompt="w9", max_tokens=5))
            reading = pool.submit(engine.uncertainties, "entropy", [answer])
        [found] = reading.result(WITHIN)
    assert len(neighbour.result(WITHIN).token_ids) == 5
    assert found == pytest.approx(whole[0][0], abs=1e-5)
    assert len(found) == 70
    torch.testing.assert_close(engine.states([asked])[0], whole[1], atol=1e-4, rtol=1e-4)
    if not lm.transformer.stepwise:
        pieces = [at for at, length in enumerate(read) if length == 16]
        assert max(read) == 16
        assert min(read[: pieces[6]][pieces[0] :]) == 1
    assert_idle(engine)


@pytest.mark.parametrize("scored", [False, True])
def test_nobody_waits_while_a_long_prompt_is_tokenized(
    engine: Engine, judge: ClassifierReward, monkeypatch: pytest.MonkeyPatch, scored: bool
) -> None:
    """Its own time limit holds, too."""
    go_on, chat = threading.Event(), type(engine.loaded().chat)
    prompt, long = chat.prompt, " ".join(["w7"] * 60)

    def slow(self: Any, text: Any, *args: Any) -> Any:
        assert text != long or go_on.wait(WITHIN)
        return prompt(self, text, *args)

    monkeypatch.setattr(answer_writer, "LONG", 100)
    monkeypatch.setattr(chat, "prompt", slow)
    if scored:
        asked: Any = engine.submit_score(judge, long, ["w9"])
    else:
        asked = engine.submit(replace(request(judge, 1, long), timeout=0.05))
    try:
        assert engine.submit(request(judge, 0)).result(WITHIN / 3)
        if not scored:
            with pytest.raises(CardsTimeout):
                asked.result(WITHIN / 3)
    finally:
        go_on.set()
    if scored:
        assert len(asked.result(WITHIN)) == 1


def test_a_prompt_waits_for_what_another_is_reading_in_pieces(
    engine: Engine, judge: ClassifierReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reuses all that they share, not what had been read when it came."""
    shared = " ".join(f"w{6 + i * i % 41}" for i in range(200))
    requests = [
        replace(request(judge, seed, f"{shared} w{6 + seed}"), decoding=Sampling(), reward=None) for seed in range(3)
    ]
    expected = [engine.run(each).token_ids for each in requests]
    monkeypatch.setattr(local, "PREFILL_CHUNK", 60)
    monkeypatch.setattr(local, "PREFILL_BESIDE", 30)
    memory(engine).evict_all()
    answers = [answer for answer in outcomes(engine, requests) if isinstance(answer, Alignment)]
    assert [answer.token_ids for answer in answers] == expected
    assert sorted(answer.usage.cached_tokens for answer in answers) == [0, 200, 200]
