"""A thousand requests at once, many of which are given up or fail: none is lost, none hangs, nothing stays behind."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import random
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import Any

import faces
import internals
import pytest

from cards_integrations import CardsLLM
from cards_integrations.decoding import (
    METHODS,
    AdaSearch,
    Args,
    BestOfN,
    Cards,
    Cascade,
    Decoding,
    FixedLength,
    OptimalStopping,
    Particles,
    Rain,
    RejectionSampling,
    Sampling,
    SegmentBestOfN,
    SpeculativeRejection,
    TreeBoN,
    Uncertainty,
)
from cards_integrations.engine import Engine, EngineSettings
from cards_integrations.engine.draft_pool import DraftPool, PendingDraft, SegmentDrafts
from cards_integrations.engine.scoring import ScoreRequest
from cards_integrations.engine.session import Session
from cards_integrations.errors import CardsError, CardsTimeout, RewardError
from cards_integrations.models.base import Candidate, Context
from cards_integrations.rewards import ClassifierReward, FunctionReward, Reward
from cards_integrations.rewards.base import Conversation, Response
from cards_integrations.trace import Alignment
from cards_integrations.transformer.kv_cache import Branch, Tree

pytestmark = pytest.mark.soak

REQUESTS, LOOPS, WITHIN = 1000, 3, 80
SHORT = FixedLength(length=3)
DECODINGS: list[Decoding] = [
    Cards(target_reward=0.5, beta=0.5, max_rejections=3, boundary=Uncertainty(threshold=2.95, max_length=6)),
    Cards(acceptance=OptimalStopping(price=0.01), max_rejections=3, boundary=SHORT),
    Sampling(chunk=2),
    BestOfN(n=3),
    RejectionSampling(target_reward=0.5, beta=0.5, max_rejections=2),
    SegmentBestOfN(n=2, boundary=SHORT),
    Args(k=2),
    SpeculativeRejection(n=3),
    TreeBoN(n=4, children=2, boundary=SHORT),
    Cascade(budget="tokens:3"),
    AdaSearch(n=3, beams=2),
    Particles(n=3, beta=0.5, boundary=SHORT),
    Rain(width=2, searches=2, boundary=SHORT),
]
ASYNC = ["aalign", "aalign_stream", "ainvoke", "astream", "acomplete", "astream_complete", "achat", "astream_chat"]
SYNC = ["align", "align_stream", "invoke", "stream", "complete", "stream_complete", "chat", "stream_chat", "batch"]
FATES = ["answer"] * 11 + ["cancel"] * 3 + ["close"] * 2 + ["time out", "raise", "not a number", "hang"]
LONG_PROMPT = "Say it again, and again. " * 4  # long enough to be kept for those that begin like it


# --- rewards that fail ---


def raises(prompt: str, texts: list[str]) -> list[float]:
    raise ZeroDivisionError("no idea")


async def not_a_number(prompt: str, texts: list[str]) -> list[float]:
    return [math.nan] * len(texts)


async def hangs(prompt: str, texts: list[str]) -> list[float]:
    await asyncio.Event().wait()
    return []


FAILING: dict[str, Reward] = {
    "raise": FunctionReward(function=raises),
    "not a number": FunctionReward(function=not_a_number),
    "hang": FunctionReward(function=hangs, timeout=0.05),
}


# --- one request ---


@dataclass(frozen=True)
class Wish:
    """A request, the method of a face that it goes through, and what becomes of it."""

    call: str
    fate: str
    decoding: int
    seed: int
    long: bool
    patience: float

    @property
    def prompt(self) -> str:
        return LONG_PROMPT + "Hello" if self.long else "Hello"

    @property
    def kind(self) -> tuple[int, int, bool]:
        return self.decoding, self.seed, self.long

    def options(self) -> dict[str, Any]:
        own: dict[str, Any] = {"decoding": DECODINGS[self.decoding], "seed": self.seed}
        if self.fate in FAILING:
            own["reward"] = FAILING[self.fate]
        if self.fate == "time out":
            own["timeout"] = self.patience
        return own


def wishes(count: int, seed: int) -> list[Wish]:
    dice = random.Random(seed)
    found = []
    for index in range(count):
        fate = dice.choice(FATES)
        calls = ASYNC if index % 4 else SYNC
        if fate == "cancel":
            calls = ASYNC
        elif fate == "close":
            calls = [call for call in calls if "stream" in call]
        decoding, patience = dice.randrange(len(DECODINGS)), dice.uniform(0.001, 2.0)
        found.append(Wish(dice.choice(calls), fate, decoding, dice.randrange(3), dice.random() < 0.1, patience))
    return found


def said(found: Any) -> str:
    """The text of any face's answer, or of its last chunk."""
    if isinstance(found, Alignment):
        return found.text
    if isinstance(found, list):
        return said(found[0])
    return str(getattr(found, "text", None) or getattr(found, "message", found).content)


def grant(llm: CardsLLM, wish: Wish) -> str | None:
    """The answer to a blocking call, or None for a stream that was closed early."""
    if wish.call == "batch":
        return said(llm.batch([wish.prompt], **wish.options()))
    called = asyncio.run(faces.call(llm, wish.call, wish.prompt, **wish.options()))
    if "stream" not in wish.call:
        return said(called)
    with closing(called) as items:
        if wish.fate == "close":
            next(items)
            return None
        return joined(wish.call, list(items))


async def agrant(llm: CardsLLM, wish: Wish) -> str | None:
    called = await faces.call(llm, wish.call, wish.prompt, **wish.options())
    if "stream" not in wish.call:
        return said(called)
    async with aclosing(called) as items:
        if wish.fate == "close":
            await anext(items)
            return None
        return joined(wish.call, [item async for item in items])


def joined(call: str, items: list[Any]) -> str:
    """LangChain's chunks are parts of the text; the last of the others has all of it."""
    return "".join(said(item) for item in items) if call in ("stream", "astream") else said(items[-1])


# --- all of them ---


def told(wish: Wish, answer: str | None, expected: dict[tuple[int, int, bool], str]) -> str:
    """How a request ended; what it should not have been given is "wrong"."""
    if answer is None:
        return "closed"
    return "answered" if answer == expected[wish.kind] else "wrong"


def failed(error: BaseException) -> str:
    return type(error).__name__ if isinstance(error, CardsError | asyncio.CancelledError) else f"untyped: {error!r}"


def run_all(llm: CardsLLM, asked: list[Wish], expected: dict[tuple[int, int, bool], str]) -> list[tuple[Wish, str]]:
    """All at once: blocking calls in threads of their own, the others in several event loops."""
    blocking = [wish for wish in asked if wish.call in SYNC]
    others = [wish for wish in asked if wish.call in ASYNC]

    def in_a_thread(wish: Wish) -> tuple[Wish, str]:
        try:
            return wish, told(wish, grant(llm, wish), expected)
        except BaseException as error:
            return wish, failed(error)

    async def as_task(wish: Wish) -> tuple[Wish, str]:
        task = asyncio.create_task(agrant(llm, wish))
        if wish.fate == "cancel":
            asyncio.get_running_loop().call_later(wish.patience, task.cancel)
        try:
            return wish, told(wish, await task, expected)
        except BaseException as error:
            return wish, failed(error)

    async def in_a_loop(mine: list[Wish]) -> list[tuple[Wish, str]]:
        return await asyncio.gather(*map(as_task, mine))

    with ThreadPoolExecutor(len(blocking) + LOOPS) as threads:
        parts = [threads.submit(asyncio.run, in_a_loop(others[i::LOOPS])) for i in range(LOOPS)]
        single = [threads.submit(in_a_thread, wish) for wish in blocking]
        ended = [one.result(WITHIN) for one in single]
        for part in parts:
            ended += part.result(WITHIN)
    return ended


OWN = (
    *(Session, Tree, Branch, Candidate, Context, Conversation, Response),
    *(PendingDraft, SegmentDrafts, DraftPool, ScoreRequest, Future),
)


@dataclass
class State:
    """What an engine and the process hold."""

    live: int
    tasks: int
    scoring: int
    rows: list[int]
    bytes: int
    threads: int
    files: int
    objects: dict[str, int]

    @classmethod
    def of(cls, engine: Engine) -> State:
        for cache in internals.caches(engine):
            internals.balance(cache)
        internals.memory(engine).evict_all()
        gc.collect()
        objects = Counter(type(thing) for thing in gc.get_objects())
        now = engine.inspect()
        return cls(
            live=now.requests,
            tasks=now.tasks,
            scoring=now.scoring,
            rows=[cache.rows for cache in now.caches],
            bytes=now.cache_bytes + now.prefix_bytes,
            threads=sum(not thread.name.startswith("asyncio_") for thread in threading.enumerate()),
            files=len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0,  # noqa: PTH208, PTH112
            objects={kind.__name__: objects[kind] for kind in OWN},
        )


@pytest.fixture(scope="module")
def llm() -> Iterator[CardsLLM]:
    settings = EngineSettings(device="cpu", dtype="float32", width=2, max_rows=48)
    reward = ClassifierReward(model=faces.reward_model())
    with CardsLLM(model=faces.chat_model(), reward=reward, max_tokens=12, seed=0, engine=settings) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(llm: CardsLLM) -> dict[tuple[int, int, bool], str]:
    """Each of the requests that will be made, by itself."""
    found = {}
    for decoding, method in enumerate(DECODINGS):
        for seed in range(3):
            for long in (False, True):
                wish = Wish("align", "answer", decoding, seed, long, 0)
                found[wish.kind] = llm.align(wish.prompt, decoding=method, seed=seed).text
    return found


def engine_of(llm: CardsLLM) -> Engine:
    return llm._engine({})


def settled(engine: Engine, before: State) -> State:
    """The state once what was given up last has ended."""
    for _ in range(50):
        now = State.of(engine)
        if now == before:
            break
        threading.Event().wait(0.05)
    return now


ALLOWED = {
    "answer": {"answered"},
    "cancel": {"answered", "CancelledError"},
    "close": {"closed"},
    "time out": {"answered", CardsTimeout.__name__},
    **{fate: {RewardError.__name__} for fate in FAILING},
}


def test_all_methods_and_faces_are_asked_for() -> None:
    assert {decoding.method for decoding in DECODINGS} == set(METHODS)
    asked = wishes(REQUESTS, 0)
    assert {wish.call for wish in asked} == {*ASYNC, *SYNC}
    assert {wish.fate for wish in asked} == set(ALLOWED)
    assert {wish.decoding for wish in asked} == {*range(len(DECODINGS))}


def test_a_thousand_at_once(llm: CardsLLM, alone: dict[tuple[int, int, bool], str]) -> None:
    engine = engine_of(llm)
    run_all(llm, wishes(60, 1), alone)  # what is made at first use is there
    before = State.of(engine)
    asked = wishes(REQUESTS, 0)
    ended = run_all(llm, asked, alone)
    counts = Counter(how for _, how in ended)
    by_fate = Counter((wish.fate, how) for wish, how in ended)
    after = settled(engine, before)
    lost = REQUESTS - len(ended)
    print(f"\n{dict(counts)}\n{dict(by_fate)}\nlost {lost}\n{after}")
    assert lost == 0
    unguided = DECODINGS.index(Sampling(chunk=2))
    strange = [
        (wish, how)
        for wish, how in ended
        if how not in ({"answered"} if wish.fate in FAILING and wish.decoding == unguided else ALLOWED[wish.fate])
    ]
    assert strange == []
    assert min(counts[kind] for kind in ("answered", "closed", "CancelledError", "CardsTimeout", "RewardError")) > 10
    assert after == before


def test_memory_does_not_grow(llm: CardsLLM, alone: dict[tuple[int, int, bool], str]) -> None:
    """Over rounds of the same requests, once the first has made what stays."""
    engine = engine_of(llm)
    asked = wishes(60, 2)
    sizes: list[int] = []
    states: list[State] = []
    run_all(llm, asked, alone)
    tracemalloc.start()
    try:
        for _ in range(5):
            run_all(llm, asked, alone)
            states.append(settled(engine, states[0]) if states else State.of(engine))
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    print(f"\nbytes traced after each round: {sizes}")
    assert states[1:] == states[:1] * 4
    assert sizes[-1] - sizes[1] < 100_000


def test_engines_that_are_closed_leave_nothing() -> None:
    """Ten engines, each closed while its requests run."""
    counts: Counter[str] = Counter()
    before = set(threading.enumerate())

    def state() -> tuple[int, int]:
        """Threads and open files, once the loads that nobody waits for any more have ended."""
        for thread in set(threading.enumerate()) - before:
            thread.join(WITHIN)
        gc.collect()
        files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0  # noqa: PTH208, PTH112
        return threading.active_count(), files

    begun = None
    for turn in range(10):
        settings = EngineSettings(device="cpu", dtype="float32", width=2, kv_memory=0.4 + turn / 100)
        reward = ClassifierReward(model=faces.reward_model())
        llm = CardsLLM(model=faces.chat_model(), reward=reward, max_tokens=40, seed=0, engine=settings)
        engine = engine_of(llm)
        engine.loaded()
        with ThreadPoolExecutor(8) as threads:
            futures = [threads.submit(llm.align, "Hello", decoding=DECODINGS[i]) for i in range(8)]
            threading.Event().wait(0.02)
            engine.close()
            errors = [future.exception(WITHIN) for future in futures]
        counts.update("answered" if error is None else type(error).__name__ for error in errors)
        llm.close()
        begun = begun or state()
    assert set(counts) <= {"answered", "EngineClosed"}
    assert counts.total() == 80
    assert state() == begun
