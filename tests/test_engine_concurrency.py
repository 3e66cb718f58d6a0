"""Many callers, cancellation and failure: rows are freed, errors reach those they concern, and no others."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import internals
import pytest
import tiny
from conftest import Start
from internals import is_closed, is_idle, language_model, wait_until

from cards_integrations.decoding import Cards, FixedLength, Sampling, Uncertainty
from cards_integrations.engine import Engine, EngineSettings, Request
from cards_integrations.errors import CardsTimeout, EngineClosed, ModelError, RewardError
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward, FunctionReward
from cards_integrations.trace import Alignment

PROMPT = "w9 w20 w31 w5"
ROOM = 4000  # steps of an answer that nobody waits for to the end
BOUNDARY = Uncertainty(threshold=2.95, min_length=2, max_length=6)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that knows no end of sequence."""
    model = tiny.causal(max_position_embeddings=8192, eos_token_id=None)
    return tiny.save(tmp_path_factory.mktemp("endless"), model, tiny.words(eos_token=None))


@pytest.fixture
def judge(models: Callable[..., str]) -> ClassifierReward:
    return ClassifierReward(model=models("llama", classifier=True))


def long(seed: int = 0) -> Request:
    return Request(PROMPT, Sampling(chunk=4), max_tokens=ROOM, seed=seed)


def short(judge: Any, seed: int = 0) -> Request:
    return Request(PROMPT, Cards(target_reward=0.5, beta=0.3, boundary=BOUNDARY), judge, Sampler(), 12, seed=seed)


def steps(engine: Engine) -> int:
    return engine.inspect().steps


async def assert_stopped(engine: Engine) -> None:
    """No step is made any more, long before the answers' ends."""
    await asyncio.to_thread(wait_until, lambda: is_idle(engine))
    before = engine.inspect()
    await asyncio.sleep(0.05)
    now = engine.inspect()
    assert (now.steps, now.tokens) == (before.steps, before.tokens)
    assert before.steps < ROOM / 2


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


# --- giving up ---


async def test_cancelling_a_task_frees_its_row(endless: str, start: Start) -> None:
    engine = start(endless, width=1)
    tasks = [asyncio.create_task(engine.arun(long(seed))) for seed in range(3)]
    await asyncio.to_thread(wait_until, lambda: steps(engine) > 20)
    for task in tasks:
        task.cancel()
    assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*tasks, return_exceptions=True))
    await assert_stopped(engine)


async def test_cancelling_one_leaves_the_others(endless: str, start: Start, judge: ClassifierReward) -> None:
    engine = start(endless, width=2)
    expected = [await engine.arun(short(judge, seed)) for seed in range(4)]
    unwanted = [asyncio.create_task(engine.arun(long(seed))) for seed in range(3)]
    before = steps(engine)
    await asyncio.to_thread(wait_until, lambda: steps(engine) > before + 5)
    wanted = [asyncio.create_task(engine.arun(short(judge, seed))) for seed in range(4)]
    await asyncio.sleep(0.01)
    for task in unwanted:
        task.cancel()
    assert [a.token_ids for a in await asyncio.gather(*wanted)] == [a.token_ids for a in expected]
    await assert_stopped(engine)


async def test_closing_a_stream_frees_its_row(endless: str, start: Start) -> None:
    engine = start(endless, width=1)
    stream = engine.stream(long())
    next(stream)
    next(stream)
    stream.close()
    await assert_stopped(engine)


async def test_leaving_an_async_stream_frees_its_row(endless: str, start: Start) -> None:
    engine = start(endless, width=1)
    stream = engine.astream(long())
    async for _ in stream:
        break
    await stream.aclose()
    await assert_stopped(engine)


async def test_the_first_error_of_many_cancels_the_rest(endless: str, start: Start) -> None:
    engine = start(endless, width=1)
    with pytest.raises(RewardError):
        engine.run_many([short(FunctionReward(function=raises)), long(1), long(2)])
    await assert_stopped(engine)


def test_an_interrupt_frees_the_row(endless: str, start: Start) -> None:
    engine = start(endless, width=1)
    engine.loaded()

    def when_busy() -> None:
        wait_until(lambda: steps(engine) > 20)
        interrupt()

    threading.Thread(target=when_busy).start()
    with pytest.raises(KeyboardInterrupt):
        engine.run(long())
    asyncio.run(assert_stopped(engine))


async def test_a_timeout_frees_the_row(endless: str, start: Start) -> None:
    engine = start(endless, width=1)
    engine.loaded()
    with pytest.raises(CardsTimeout, match=r"timeout=0\.05"):
        await engine.arun(Request(PROMPT, Sampling(), max_tokens=ROOM, timeout=0.05))
    await assert_stopped(engine)


# --- failures of the language model ---


async def test_a_failing_forward_reaches_everyone_and_the_next_request_works(
    endless: str, start: Start, judge: ClassifierReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(endless, width=2, max_rows=4)
    expected = engine.run(short(judge))
    model = language_model(engine).model
    waiting = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def slow(prompt: str, texts: list[str]) -> list[float]:
        loop.call_soon_threadsafe(waiting.set)
        await asyncio.sleep(0.3)
        return [0.0] * len(texts)

    def consume() -> None:
        for _ in engine.stream(long(1)):
            pass

    async def aconsume() -> None:
        async for _ in engine.astream(long(2)):
            pass

    callers = [asyncio.to_thread(engine.run, long(0)), asyncio.to_thread(consume), aconsume()]
    callers.append(engine.arun(short(FunctionReward(function=slow))))  # in its reward model when it happens
    tasks = [asyncio.ensure_future(caller) for caller in callers]
    before = steps(engine)
    await asyncio.to_thread(wait_until, lambda: steps(engine) > before + 5)
    await waiting.wait()
    queued = asyncio.create_task(engine.arun(short(judge)))  # has no row yet

    def boom(*args: object, **kwargs: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(model, "forward", boom)
    errors = await asyncio.gather(*tasks, queued, return_exceptions=True)
    assert [type(error) for error in errors] == [ModelError] * 5
    assert all("boom" in str(error) for error in errors)
    monkeypatch.undo()
    assert (await engine.arun(short(judge))).token_ids == expected.token_ids
    assert is_idle(engine)


# --- failures of a reward ---


def raises(prompt: str, texts: list[str]) -> list[float]:
    if any(texts):
        raise ZeroDivisionError("no idea")
    return [0.0]


def not_a_number(prompt: str, texts: list[str]) -> list[float]:
    return [math.nan if text else 0.0 for text in texts]


async def infinite(prompt: str, texts: list[str]) -> list[float]:
    return [math.inf if text else 0.0 for text in texts]


def one_too_many(prompt: str, texts: list[str]) -> list[float]:
    return [0.0] * (len(texts) + any(texts))


def words_instead(prompt: str, texts: list[str]) -> list[Any]:
    return ["good" if text else 0.0 for text in texts]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, r"raises.*ZeroDivisionError: no idea.*' w\d+"),
        (not_a_number, r"not_a_number.*nan.*' w\d+"),
        (infinite, r"infinite.*inf.*' w\d+"),
        (one_too_many, r"one_too_many.* scores for "),
        (words_instead, r"words_instead.*ValueError.*' w\d+"),
    ],
)
async def test_a_bad_reward_harms_its_request_only(
    models: Callable[..., str], start: Start, judge: ClassifierReward, function: Any, message: str
) -> None:
    engine = start(models("llama"), width=2)
    expected = [await engine.arun(short(judge, seed)) for seed in range(3)]
    requests = [short(judge, 0), short(FunctionReward(function=function)), short(judge, 1), short(judge, 2)]
    answers: list[Any] = await asyncio.gather(*map(engine.arun, requests), return_exceptions=True)
    first, bad, *rest = answers
    assert [a.token_ids for a in (first, *rest)] == [a.token_ids for a in expected]
    assert isinstance(bad, RewardError)
    with pytest.raises(RewardError, match=message):
        raise bad
    assert is_idle(engine)


async def test_one_answer_too_long_for_the_reward_model_harms_no_other(
    models: Callable[..., str], start: Start, tmp_path: Path
) -> None:
    """The candidates of all requests end in the same steps, and are scored in one forward."""
    judge = ClassifierReward(model=tiny.save(tmp_path, tiny.classifier(max_position_embeddings=18), tiny.words()))
    in_step = Cards(target_reward=-50.0, beta=0.7, boundary=FixedLength(length=3))

    def request(seed: int, room: int = 12) -> Request:
        return Request(PROMPT, in_step, judge, Sampler(top_k=3), room, seed=seed)

    good = [request(seed) for seed in (2, 3, 4)]
    expected = start(models("llama"), width=1).run_many(good)
    requests = [good[0], request(2, room=24), *good[1:]]  # all wait while the engine loads
    engine = start(models("llama"), width=1)
    answers: list[Any] = await asyncio.gather(*map(engine.arun, requests), return_exceptions=True)
    first, bad, *rest = answers
    assert [a.token_ids for a in (first, *rest)] == [a.token_ids for a in expected]
    with pytest.raises(RewardError, match=r"18.*max_tokens"):
        raise bad
    assert is_idle(engine)


# --- many threads and loops ---


def test_many_threads_and_two_loops_at_once(models: Callable[..., str], start: Start, judge: ClassifierReward) -> None:
    engine = start(models("llama"), width=2, max_rows=5)
    expected = [engine.run(short(judge, seed)).token_ids for seed in range(6)]

    def in_a_loop(_: int) -> list[Alignment]:
        async def gather() -> list[Alignment]:
            return await asyncio.gather(*(engine.arun(short(judge, seed)) for seed in range(6)))

        return asyncio.run(gather())

    with ThreadPoolExecutor(8) as pool:
        loops = pool.map(in_a_loop, range(2))
        plain = pool.map(lambda seed: engine.run(short(judge, seed)), [*range(6)] * 2)
        assert [a.token_ids for a in plain] == expected * 2
        assert [[a.token_ids for a in answers] for answers in loops] == [expected] * 2
    assert is_idle(engine)


async def test_the_caller_s_loop_is_never_blocked(
    models: Callable[..., str], start: Start, judge: ClassifierReward
) -> None:
    """Not even while the models load: another task goes on in small steps all the time."""
    engine, ticks = start(models("llama")), 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    ticker = asyncio.create_task(tick())
    await engine.arun(short(judge))
    assert ticks > 5
    before = ticks
    async for _ in engine.astream(Request(PROMPT, Sampling(chunk=1), max_tokens=100, seed=3)):
        pass
    assert ticks > before + 5
    ticker.cancel()


# --- the end of an engine ---


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Models load when the gate opens."""
    opened, load = threading.Event(), ModelLoader.causal

    def late(self: ModelLoader, spec: LocalModel) -> Any:
        opened.wait()
        return load(self, spec)

    monkeypatch.setattr(ModelLoader, "causal", late)
    yield opened
    opened.set()


async def outcome(call: Any) -> Any:
    """What became of an awaitable, or of a blocking call in a thread."""
    return (await asyncio.gather(asyncio.to_thread(call) if callable(call) else call, return_exceptions=True))[0]


async def test_closing_while_busy(endless: str, judge: ClassifierReward) -> None:
    model, settings = LocalModel(model=endless), EngineSettings(dtype="float32", max_rows=3)
    engine = Engine.shared(model, settings)
    calls = [
        lambda: engine.run(long(0)),
        lambda: list(engine.stream(long(1))),
        engine.arun(long(2)),
        engine.arun(long(3)),
    ]
    callers = [asyncio.create_task(outcome(call)) for call in calls]
    await asyncio.to_thread(wait_until, lambda: steps(engine) > 20)
    await asyncio.to_thread(engine.close)
    assert [type(error) for error in await asyncio.gather(*callers)] == [EngineClosed] * 4
    with pytest.raises(EngineClosed):
        engine.run(short(judge))
    again = Engine.shared(model, settings)
    assert again is not engine
    assert again.run(short(judge)).text
    again.close()


@pytest.mark.parametrize("accepted", ["never run", "noted too late"])
def test_what_is_asked_in_the_moment_of_closing_is_told(
    endless: str, monkeypatch: pytest.MonkeyPatch, accepted: str
) -> None:
    engine = Engine(LocalModel(model=endless), EngineSettings(dtype="float32"))
    worker = internals.worker(engine)
    schedule = worker.loop.call_soon_threadsafe

    def close_first(callback: Callable[..., Any], *args: Any, **options: Any) -> None:
        monkeypatch.setattr(worker.loop, "call_soon_threadsafe", schedule)
        if accepted == "noted too late":
            worker.stop()
        else:
            stopping.append(threading.Timer(0.2, worker.stop))
            stopping[0].start()

    stopping: list[threading.Timer] = []
    monkeypatch.setattr(worker.loop, "call_soon_threadsafe", close_first)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(EngineClosed):
            worker.submit(worker.inspect()).result(timeout=40)
        gc.collect()
    assert not [str(each.message) for each in told if "never awaited" in str(each.message)]
    for timer in stopping:
        timer.join()
    engine.close()


async def test_closing_while_loading(endless: str, judge: ClassifierReward, gate: threading.Event) -> None:
    engine = Engine(LocalModel(model=endless), EngineSettings())
    calls = [engine.arun(short(judge)), lambda: engine.run(long()), lambda: engine.score(judge, PROMPT, ["w7"])]
    callers = [asyncio.create_task(outcome(call)) for call in calls]
    await asyncio.sleep(0.1)
    closing = asyncio.create_task(asyncio.to_thread(engine.close))
    await asyncio.to_thread(wait_until, lambda: is_closed(engine))
    gate.set()
    await closing
    assert [type(error) for error in await asyncio.gather(*callers)] == [EngineClosed] * 3


def test_an_interrupt_while_loading(endless: str, start: Start, gate: threading.Event) -> None:
    engine = start(endless)
    threading.Timer(0.2, interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        engine.loaded()
    gate.set()
    assert engine.run(Request(PROMPT, Sampling(), max_tokens=3)).text


LEAVING = """
import sys, threading, time
from cards_integrations.decoding import Sampling
from cards_integrations.engine import Engine, EngineSettings, Request
from cards_integrations.models.local.settings import LocalModel

engine = Engine.shared(LocalModel(model=sys.argv[1]), EngineSettings())
request = Request("w9 w20", Sampling(chunk=1), max_tokens=8000)
threading.Thread(target=lambda: list(engine.stream(request)), daemon=True).start()
stream = engine.stream(request)
next(stream)
print("leaving")
"""


def test_leaving_the_interpreter_while_busy(endless: str) -> None:
    done = subprocess.run([sys.executable, "-c", LEAVING, endless], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "leaving")
    assert "Fatal" not in done.stderr
