"""An engine under any order of what callers, rewards and owners may do to it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import internals
import pytest
import tiny
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cards_integrations.decoding import Args, BestOfN, Cards, Decoding, FixedLength, Particles, Sampling
from cards_integrations.engine import Engine, EngineSettings, Request
from cards_integrations.engine.request import Chunk
from cards_integrations.errors import CardsTimeout, EngineClosed, RewardError
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.rewards import ClassifierReward, FunctionReward
from cards_integrations.trace import Alignment

pytestmark = pytest.mark.soak

EXAMPLES = int(os.environ.get("CARDS_MACHINE_EXAMPLES", "50"))
WITHIN = 30.0
SHORT = FixedLength(length=3)
DECODINGS: list[Decoding] = [
    Cards(target_reward=0.5, beta=0.5, max_rejections=3, boundary=SHORT),
    Sampling(chunk=2),
    BestOfN(n=2),
    Particles(n=2, beta=0.5, boundary=SHORT),
    Args(k=2),
]
SEEDS, MAX_ROWS = 3, 4
COUNTS: Counter[str] = Counter()


class Faulty:
    """Rewards that misbehave; what hangs goes on when `gate` opens."""

    gate = threading.Event()

    @staticmethod
    def fails(prompt: str, texts: list[str]) -> list[float]:
        raise ZeroDivisionError("no idea")

    @classmethod
    async def hangs(cls, prompt: str, texts: list[str]) -> list[float]:
        while not cls.gate.is_set():  # noqa: ASYNC110 (another thread's event)
            await asyncio.sleep(0.005)
        return [0.0] * len(texts)


FAILS = FunctionReward(function=Faulty.fails)
HANGS = FunctionReward(function=Faulty.hangs)
HANGS_A_WHILE = FunctionReward(function=Faulty.hangs, timeout=0.03)

seeds = st.integers(0, SEEDS - 1)
methods = st.integers(0, len(DECODINGS) - 1)
guided = st.sampled_from([i for i, decoding in enumerate(DECODINGS) if decoding.needs_reward])


@dataclass(eq=False)
class Asked:
    """A request in flight, and how it may end."""

    future: Future[Any]
    expected: Any
    may: tuple[type[BaseException], ...] = ()
    must_fail: bool = False


@dataclass(eq=False)
class Opened:
    """A stream of which some was taken."""

    items: Any
    expected: Any
    text: list[str] = field(default_factory=list)


class EngineMachine(RuleBasedStateMachine):
    folder: ClassVar[str]
    judge: ClassVar[ClassifierReward]
    alone: ClassVar[dict[tuple[int, int], Any]] = {}

    @classmethod
    def prepare(cls, folder: Path) -> None:
        """The models, and each request's answer by itself."""
        cls.folder = tiny.save(folder / "model", tiny.causal(), tiny.words())
        cls.judge = ClassifierReward(model=tiny.save(folder / "judge", tiny.classifier(), tiny.words()))
        engine = cls.made()
        for which in range(len(DECODINGS)):
            for seed in range(SEEDS):
                cls.alone[which, seed] = engine.run(cls.request(which, seed)).token_ids
        engine.close()

    @classmethod
    def made(cls) -> Engine:
        return Engine(LocalModel(model=cls.folder), EngineSettings(dtype="float32", width=2, max_rows=MAX_ROWS))

    @classmethod
    def request(cls, which: int, seed: int, reward: Any = None, timeout: float | None = None) -> Request:
        own = {"seed": seed, "timeout": timeout, "max_tokens": 9}
        return Request("w9 w20", DECODINGS[which], reward or cls.judge, **own)  # type: ignore[arg-type]

    @initialize()
    def begin(self) -> None:
        Faulty.gate.clear()
        self.engine = self.made()
        self.closed = False
        self.asked: list[Asked] = []
        self.streams: list[Opened] = []
        COUNTS["machines"] += 1

    def ask(
        self,
        submit: Callable[[], Future[Any]],
        expected: Any,
        *may: type[BaseException],
        must: bool = False,
    ) -> None:
        """In flight from now on; a closed engine refuses."""
        COUNTS["requests"] += 1
        if self.closed:
            with pytest.raises(EngineClosed):
                submit()
            COUNTS["refused"] += 1
            return
        future = submit()
        self.asked.append(Asked(future, expected, may, must))

    # --- what callers do ---

    @rule(which=methods, seed=seeds)
    def submit(self, which: int, seed: int) -> None:
        self.ask(lambda: self.engine.submit(self.request(which, seed)), self.alone[which, seed])

    @rule(several=st.lists(st.tuples(methods, seeds), min_size=1, max_size=4))
    def submit_many(self, several: list[tuple[int, int]]) -> None:
        requests = [self.request(which, seed) for which, seed in several]
        self.ask(lambda: self.engine.submit_many(requests), [self.alone[key] for key in several])

    @rule(several=st.lists(st.tuples(methods, seeds), min_size=1, max_size=3), which=guided)
    def submit_many_one_of_which_fails(self, several: list[tuple[int, int]], which: int) -> None:
        requests = [self.request(each, seed) for each, seed in several] + [self.request(which, 0, FAILS)]
        self.ask(lambda: self.engine.submit_many(requests), None, RewardError, must=True)

    @rule(which=methods, seed=seeds, timeout=st.sampled_from([0.0001, 0.003, 0.02]))
    def submit_with_a_timeout(self, which: int, seed: int, timeout: float) -> None:
        request = self.request(which, seed, timeout=timeout)
        self.ask(lambda: self.engine.submit(request), self.alone[which, seed], CardsTimeout)

    @rule(which=guided)
    def submit_with_a_reward_that_fails(self, which: int) -> None:
        self.ask(lambda: self.engine.submit(self.request(which, 0, FAILS)), None, RewardError, must=True)

    @rule(which=guided)
    def submit_with_a_reward_that_hangs(self, which: int) -> None:
        self.ask(lambda: self.engine.submit(self.request(which, 0, HANGS)), ...)

    @rule(which=guided)
    def submit_with_a_reward_that_meets_its_timeout(self, which: int) -> None:
        self.ask(lambda: self.engine.submit(self.request(which, 0, HANGS_A_WHILE)), ..., RewardError)

    @rule(number=st.integers(0, 9))
    def cancel(self, number: int) -> None:
        if self.asked and self.asked[number % len(self.asked)].future.cancel():
            COUNTS["cancelled"] += 1
            self.asked.pop(number % len(self.asked))

    @rule(which=st.sampled_from([0, 1, 3, 4]), seed=seeds)
    def stream(self, which: int, seed: int) -> None:
        """And take one item."""
        COUNTS["streams"] += 1
        items = self.engine.stream(self.request(which, seed))
        if self.closed:
            with pytest.raises(EngineClosed):
                next(items)
            return
        with self.going_on():
            first = next(items)
        assert isinstance(first, Chunk)
        self.streams.append(Opened(items, self.alone[which, seed], [first.text]))

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        stream = self.streams.pop(data.draw(st.sampled_from(range(len(self.streams)))))
        with self.going_on():
            self.read(stream, items=1)

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def close_stream(self, data: st.DataObject) -> None:
        self.streams.pop(data.draw(st.sampled_from(range(len(self.streams))))).items.close()
        COUNTS["streams closed"] += 1

    # --- what owners and rewards do ---

    @rule()
    def open_the_gate(self) -> None:
        """What hangs goes on; what hangs later does not."""
        Faulty.gate.set()
        threading.Event().wait(0.01)
        Faulty.gate.clear()

    @rule()
    def wait_a_little(self) -> None:
        threading.Event().wait(0.01)

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """What hangs may have all rows, and others wait for one."""
        Faulty.gate.set()
        yield
        Faulty.gate.clear()

    @precondition(lambda self: not self.closed)
    @rule(now=st.sampled_from([False, False, True]), stays_closed=st.booleans())
    def close_engine(self, now: bool, stays_closed: bool) -> None:
        if not now:
            return
        self.engine.close()
        self.closed = True
        COUNTS["engines closed"] += 1
        assert all(one.future.done() for one in self.asked)
        self.settle()
        if not stays_closed:
            self.start_again()

    @precondition(lambda self: self.closed)
    @rule()
    def start(self) -> None:
        self.start_again()

    def start_again(self) -> None:
        self.engine, self.closed = self.made(), False

    # --- what holds at any time ---

    @invariant()
    def what_has_ended_has_ended_well(self) -> None:
        for one in [one for one in self.asked if one.future.done()]:
            self.asked.remove(one)
            self.check(one)

    @invariant()
    def rows_are_those_of_live_requests(self) -> None:
        if not self.closed:
            self.engine.loaded()
            internals.run_inside(self.engine, self.snapshot(), WITHIN)

    async def snapshot(self) -> None:
        """In the engine's thread, between two steps."""
        live = internals.sessions(self.engine)
        assert len(live) <= MAX_ROWS
        trees = internals.language_model(self.engine).transformer.cache.trees
        assert len(trees) == len(live)  # no candidate here is so long as to have its own
        for reward in internals.reward_models(self.engine):
            if hasattr(reward, "transformer"):
                assert len(reward.transformer.cache.trees) == sum(session.reward_model is reward for session in live)
        for cache in internals.caches(self.engine):
            internals.balance(cache)

    def check(self, one: Asked) -> None:
        error = one.future.exception()
        if error is not None:
            COUNTS[type(error).__name__] += 1
            assert isinstance(error, (*one.may, *([EngineClosed] if self.closed else []))), error
            return
        COUNTS["answered"] += 1
        assert not one.must_fail
        found = one.future.result()
        ids = [answer.token_ids for answer in found] if isinstance(found, list) else found.token_ids
        assert one.expected is ... or ids == one.expected

    def read(self, stream: Opened, items: int = 1000) -> None:
        """Take items from a stream; it stays open unless it ends."""
        for _ in range(items):
            try:
                item = next(stream.items)
            except EngineClosed:
                assert self.closed
                COUNTS["streams cut"] += 1
                return
            if isinstance(item, Alignment):
                assert item.token_ids == stream.expected
                assert "".join(stream.text) == item.text
                COUNTS["streams read"] += 1
                stream.items.close()
                return
            stream.text.append(item.text)
        self.streams.append(stream)

    def settle(self) -> None:
        """Everything ends."""
        _, late = concurrent.futures.wait([one.future for one in self.asked], WITHIN)
        assert not late
        self.what_has_ended_has_ended_well()
        while self.streams:
            self.read(self.streams.pop())

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        Faulty.gate.set()
        try:
            self.settle()
            if not self.closed:
                self.engine.submit(self.request(0, 0)).result(WITHIN)  # what was cancelled before has ended now
                self.ended()
        finally:
            with suppress(EngineClosed):
                self.engine.close()

    def ended(self) -> None:
        internals.wait_until(lambda: self.engine.inspect().tasks == 1)  # that of the steps
        assert self.engine.inspect().idle


@pytest.fixture(scope="module", autouse=True)
def prepared() -> Any:
    with tempfile.TemporaryDirectory(prefix="cards-machine-") as folder:
        EngineMachine.prepare(Path(folder))
        yield
    print(f"\n{dict(COUNTS)}")


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=25,
    deadline=None,
    derandomize=EXAMPLES == 50,
    suppress_health_check=list(HealthCheck),
)
