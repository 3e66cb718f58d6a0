"""The event loop is never blocked; who stops listening stops the drafting; an error reaches who listens."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import faces
import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.rate_limiters import BaseRateLimiter as LangChainLimiter
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.llms import LLM

from cards_integrations.errors import CardsTimeout, EngineClosed, ModelError, RewardError, SettingsError

METHODS = [*faces.LANGCHAIN, *faces.LLAMA_INDEX]
ASYNC = [method for method in METHODS if method.startswith("a")]
STREAMS = [method for method in METHODS if "stream" in method]
LONG = 3500  # tokens, which take at least as many decode steps


@pytest.fixture
def llm():
    return faces.cards_llm(model=faces.endless_model())


def steps(llm):
    return llm.inspect().steps


class KeepsErrors(BaseCallbackHandler):
    def __init__(self):
        self.errors = []

    def on_llm_error(self, error, **kwargs):
        self.errors.append(error)


def assert_nothing_runs(llm, before):
    """Whatever was cancelled is gone by the time the next request is answered."""
    assert llm.align("Hello", max_tokens=1).text
    assert llm.inspect().idle
    assert steps(llm) - before < LONG / 2


# --- limits of requests ---


class OfLangChain(LangChainLimiter):
    asked = 0

    def acquire(self, *, blocking: bool = True) -> bool:
        self.asked += 1
        return True

    async def aacquire(self, *, blocking: bool = True) -> bool:
        return self.acquire()


class OfLlamaIndex:
    asked = 0

    def acquire(self, num_tokens: int = 0) -> None:
        self.asked += 1

    async def async_acquire(self, num_tokens: int = 0) -> None:
        self.acquire()


@pytest.mark.skipif("rate_limiter" not in LLM.model_fields, reason="this version of LlamaIndex has none")
@pytest.mark.parametrize("kind", [OfLangChain, OfLlamaIndex])
async def test_a_rate_limiter_of_either_framework_holds_for_both(kind):
    limiter = kind()
    llm = faces.cards_llm(max_tokens=1, rate_limiter=limiter)
    for count, method in enumerate(METHODS, 1):
        await faces.finish(await faces.call(llm, method))
        assert limiter.asked == count, method
    with pytest.raises(SettingsError, match="rate_limiter=5"):
        faces.cards_llm(rate_limiter=5)


# --- the loop goes on ---


@pytest.mark.parametrize("method", ASYNC)
async def test_the_event_loop_is_not_blocked(llm, method):
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    before = steps(llm)
    ticker = asyncio.create_task(tick())
    await faces.finish(await faces.call(llm, method, max_tokens=60))
    ticker.cancel()
    assert steps(llm) - before > 60
    assert ticks > 15


async def test_many_at_once_are_one_batch(llm):
    before = steps(llm)
    one = await llm.acomplete("Hello")
    alone = steps(llm) - before
    answers = await asyncio.gather(*(faces.call(llm, m) for m in ["ainvoke", "acomplete", "achat", "aalign"] * 3))
    assert steps(llm) - before - alone < 6 * alone
    told = {getattr(a, "text", None) or getattr(a, "message", a).content for a in answers}
    assert told == {one.text}


def test_one_object_serves_many_event_loops_and_threads(llm):
    expected = llm.align("Hello").text
    for _ in range(2):
        assert asyncio.run(llm.ainvoke("Hello")).content == expected
    with ThreadPoolExecutor(8) as threads:
        found = [*threads.map(lambda _: llm.complete("Hello").text, range(8))]
        found += [message.content for message in threads.map(llm.invoke, ["Hello"] * 8)]
    assert set(found) == {expected}


# --- whoever stops listening stops the drafting ---


@pytest.mark.parametrize("debug", [False, True], ids=["plain", "debugged"])
@pytest.mark.parametrize("method", STREAMS)
async def test_closing_a_stream_stops_the_drafting(llm, method, debug):
    if debug:  # handlers that keep the exception that ended the stream, and with it the stream's frame
        llm.callback_manager = CallbackManager([LlamaDebugHandler(print_trace_on_end=False)])
        llm.as_langchain().callbacks = [KeepsErrors()]
    before = steps(llm)
    stream = await faces.call(llm, method, max_tokens=LONG)
    if method.startswith("a"):
        await anext(stream)
        await stream.aclose()
        for _ in range(10):
            await asyncio.sleep(0)
    else:
        next(stream)
        stream.close()
    assert_nothing_runs(llm, before)


@pytest.mark.parametrize("method", STREAMS)
async def test_leaving_the_loop_over_a_stream_stops_the_drafting(llm, method):
    before = steps(llm)
    if method.startswith("a"):
        async for _ in await faces.call(llm, method, max_tokens=LONG):
            break
        for _ in range(10):
            await asyncio.sleep(0)
    else:
        for _ in await faces.call(llm, method, max_tokens=LONG):
            break
    assert_nothing_runs(llm, before)


@pytest.mark.parametrize("method", ASYNC)
async def test_cancelling_a_task_stops_the_drafting(llm, method):
    before = steps(llm)

    async def work():
        await faces.finish(await faces.call(llm, method, max_tokens=LONG))

    task = asyncio.create_task(work())
    while steps(llm) < before + 5:  # noqa: ASYNC110 (another thread's counter)
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(10):
        await asyncio.sleep(0)
    assert_nothing_runs(llm, before)


async def test_cancelling_one_of_a_batch_leaves_the_others(llm):
    expected = llm.align("Hello").text
    long = asyncio.create_task(llm.ainvoke("Hello", max_tokens=LONG))
    others = [asyncio.create_task(llm.ainvoke("Hello")) for _ in range(3)]
    await others[0]
    long.cancel()
    assert {message.content for message in await asyncio.gather(*others)} == {expected}
    with pytest.raises(asyncio.CancelledError):
        await long


@pytest.mark.parametrize("method", METHODS)
async def test_a_timeout_stops_the_drafting(llm, method):
    before = steps(llm)
    with pytest.raises(CardsTimeout, match="timeout"):
        await faces.finish(await faces.call(llm, method, max_tokens=LONG, timeout=0.1))
    assert_nothing_runs(llm, before)


# --- errors reach whoever listens ---


@pytest.mark.parametrize("forwards", [0, 5], ids=["at once", "in the middle"])
@pytest.mark.parametrize("method", METHODS)
async def test_an_error_of_the_model_reaches_the_caller(llm, method, forwards, monkeypatch):
    model = llm._engine({}).loaded().model
    forward, calls = model.forward, 0

    def breaks(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > forwards:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", breaks)
        with pytest.raises(ModelError, match="out of memory"):
            await faces.finish(await faces.call(llm, method))
    assert calls == forwards + 1
    assert_nothing_runs(llm, steps(llm))


@pytest.mark.parametrize("method", METHODS)
async def test_an_error_of_the_reward_reaches_the_caller(llm, method):
    def fails(prompt, responses):
        raise RuntimeError("no judge today")

    with pytest.raises(RewardError, match="no judge today"):
        await faces.finish(await faces.call(llm, method, reward=fails))
    assert_nothing_runs(llm, steps(llm))


@pytest.mark.parametrize("method", STREAMS)
async def test_closing_the_engine_ends_a_stream(method):
    llm = faces.cards_llm(model=faces.endless_model())
    stream = await faces.call(llm, method, max_tokens=LONG)
    await anext(stream) if method.startswith("a") else next(stream)
    llm._engine({}).close()
    with pytest.raises(EngineClosed):
        await faces.finish(stream)
    assert llm.complete("Hello", max_tokens=1).text
