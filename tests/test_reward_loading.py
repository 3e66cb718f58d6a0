"""Reward models are loaded beside the requests of others, once for all who wait, and do not stay for ever."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import internals
import psutil
import pytest
import tiny
from conftest import Start

from cards_integrations.chat.grammar import Grammar
from cards_integrations.decoding import BestOfN, Sampling
from cards_integrations.engine import Engine, Request
from cards_integrations.errors import CardsTimeout, EngineClosed, RewardError
from cards_integrations.rewards import ClassifierReward, FunctionReward, LengthReward, MinReward, Reward
from cards_integrations.rewards.base import Instant, Loader, RewardModel
from cards_integrations.rewards.loader import KEPT

PROMPT = "w9 w20 w31"


class Heavy(Reward):
    """A reward that takes as long to load as the gate is closed."""

    kind: Literal["heavy"] = "heavy"
    number: int = 0

    gate: ClassVar[threading.Event] = threading.Event()
    loads: ClassVar[list[int]] = []
    released: ClassVar[list[int]] = []
    broken: ClassVar[bool] = False

    def build(self, loader: Loader) -> RewardModel:
        self.loads.append(self.number)
        assert self.gate.wait(60)
        if self.broken:
            raise OSError("the disk is gone")
        model = Instant(self.name, lambda response: float(len(response.text)))
        model.release = lambda: self.released.append(self.number)  # type: ignore[method-assign]
        return model


@pytest.fixture(autouse=True)
def gate() -> Iterator[threading.Event]:
    """Closed at first."""
    Heavy.gate, Heavy.broken = threading.Event(), False
    Heavy.loads.clear()
    Heavy.released.clear()
    yield Heavy.gate
    Heavy.gate.set()


def guided(reward: Reward, seed: int = 0, **more: Any) -> Request:
    return Request(PROMPT, BestOfN(n=2), reward, max_tokens=4, seed=seed, **more)


async def waiting(engine: Engine, *requests: Request) -> list[asyncio.Task[Any]]:
    """Tasks of requests that have asked for their rewards."""
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(engine.arun(request)) for request in requests]
    await internals.until(lambda: bool(Heavy.loads) and engine.inspect().waiting >= len(tasks))
    return tasks


# --- beside others ---


async def test_others_go_on_while_a_reward_is_loaded(
    start: Start, models: Callable[..., str], gate: threading.Event
) -> None:
    engine = start(models("llama"))
    [loading] = await waiting(engine, guided(Heavy()))
    for seed in range(3):
        assert engine.run(Request(PROMPT, Sampling(), max_tokens=8, seed=seed, timeout=60)).text
    assert engine.score(LengthReward(target=3), PROMPT, ["w7"])
    assert not loading.done()
    gate.set()
    assert (await loading).text


async def test_a_time_limit_holds_while_a_reward_is_loaded(
    start: Start, models: Callable[..., str], gate: threading.Event
) -> None:
    engine = start(models("llama"))
    with pytest.raises(CardsTimeout):
        await engine.arun(guided(Heavy(), timeout=0.1))
    gate.set()
    assert (await engine.arun(guided(Heavy()))).text
    assert Heavy.loads == [0]  # what nobody waited for any more was not in vain


async def test_all_who_wait_wait_for_one_load(start: Start, models: Callable[..., str], gate: threading.Event) -> None:
    engine, heavy = start(models("llama")), Heavy()
    both = MinReward(rewards=[heavy, LengthReward(target=3)])
    standardised = MinReward(
        rewards=[heavy.model_copy(update={"scale": (0.0, 1.0)}), LengthReward(target=3, scale=(0, 1))]
    )
    requests = [guided(heavy, 1), guided(heavy, 2), guided(standardised, 3), guided(both, 4)]
    tasks = await waiting(engine, *requests)
    gate.set()
    assert all(answer.text for answer in await asyncio.gather(*tasks))
    assert Heavy.loads == [0]
    assert engine.inspect().idle


async def test_a_load_that_fails_reaches_all_and_the_next_tries_again(
    start: Start, models: Callable[..., str], gate: threading.Event
) -> None:
    engine = start(models("llama"))
    tasks = await waiting(engine, *(guided(Heavy(), seed) for seed in range(3)))
    Heavy.broken = True
    gate.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(error) for error in found] == [RewardError] * 3
    assert all("heavy" in str(error) and "the disk is gone" in str(error) for error in found)
    assert Heavy.loads == [0]
    Heavy.broken = False
    assert (await engine.arun(guided(Heavy()))).text


async def test_the_first_who_waits_may_give_up(start: Start, models: Callable[..., str], gate: threading.Event) -> None:
    engine = start(models("llama"))
    first, second = await waiting(engine, guided(Heavy(), 1), guided(Heavy(), 2))
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    gate.set()
    assert (await second).text
    assert Heavy.loads == [0]


async def test_closing_while_a_reward_is_loaded(
    start: Start, models: Callable[..., str], gate: threading.Event
) -> None:
    engine = start(models("llama"))
    tasks = await waiting(engine, guided(Heavy(), 1), guided(Heavy(), 2))
    await asyncio.to_thread(engine.close)
    assert not gate.is_set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(error) for error in found] == [EngineClosed] * 2


# --- how long they stay ---


def formats(models: Callable[..., str], several: int) -> list[ClassifierReward]:
    folder = models("llama", classifier=True)
    return [
        ClassifierReward(model=folder, prompt_format=f"w{6 + i % 40} {{prompt}} {{response}}" + " w7" * (i // 40))
        for i in range(several)
    ]


def test_any_number_of_rewards_in_the_memory_of_a_few(start: Start, models: Callable[..., str]) -> None:
    """Those that fell out give back their caches; their weights were loaded once."""
    engine = start(models("llama"), width=1, kv_memory=600_000)
    rewards = formats(models, 60)
    answers = [engine.run(guided(reward)).token_ids for reward in rewards]
    state = engine.inspect()
    assert len(state.rewards) <= KEPT
    assert len(state.caches) <= 1 + KEPT
    assert state.cache_bytes <= state.memory_limit
    assert len({id(model.model) for model in internals.reward_models(engine)}) == 1  # type: ignore[attr-defined]
    assert engine.run(guided(rewards[0])).token_ids == answers[0]
    assert engine.inspect().idle


def test_what_falls_out_is_released_and_what_is_used_last_stays(
    start: Start, models: Callable[..., str], gate: threading.Event
) -> None:
    gate.set()
    engine, favourite = start(models("llama"), width=1), Heavy(number=-1)
    for number in range(3 * KEPT):
        engine.run(guided(Heavy(number=number)))
        engine.run(guided(favourite))
    assert Heavy.loads.count(-1) == 1
    assert Heavy.released == list(range(3 * KEPT - (KEPT - 1)))
    assert len(engine.inspect().rewards) == KEPT


async def test_a_reward_in_use_stays(start: Start, models: Callable[..., str]) -> None:
    engine, held, hold = start(models("llama"), width=1), threading.Event(), threading.Event()

    def slow(prompt: str, texts: list[str]) -> list[float]:
        held.set()
        assert hold.wait(60)
        return [0.0] * len(texts)

    classifier, *others = formats(models, 2 * KEPT)
    parts = [classifier.model_copy(update={"scale": (0.0, 1.0)}), FunctionReward(function=slow, scale=(0.0, 1.0))]
    task = asyncio.create_task(engine.arun(guided(MinReward(rewards=parts))))
    await asyncio.to_thread(held.wait, 60)
    model = internals.worker(engine).rewards.built[classifier]
    for other in others:
        await engine.arun(guided(other))
    assert internals.worker(engine).rewards.built[classifier] is model
    hold.set()
    assert (await task).text
    assert len(engine.inspect().rewards) == KEPT


def test_weights_go_with_the_last_reward_that_reads_them(
    start: Start, models: Callable[..., str], gate: threading.Event
) -> None:
    gate.set()
    engine = start(models("llama"), width=1)
    held = []
    for folder in (models("llama", classifier=True), models("bert", classifier=True)):
        for reward in (ClassifierReward(model=folder), ClassifierReward(model=folder, output="probability")):
            engine.run(guided(reward))
        held.append(weakref.ref(internals.worker(engine).rewards.built[reward].model))  # type: ignore[attr-defined]
    for number in range(KEPT):
        engine.run(guided(Heavy(number=number)))
    gc.collect()
    assert [model() for model in held] == [None, None]
    assert engine.run(guided(reward)).text  # it is loaded again


def test_another_dtype_is_loaded_once_and_goes(start: Start, models: Callable[..., str], gate: threading.Event) -> None:
    gate.set()
    engine, folder = start(models("llama"), width=1), models("llama", classifier=True)
    one, other = (
        ClassifierReward(model=folder, dtype="bfloat16", output=output) for output in ("logit", "probability")
    )
    engine.run(guided(one))
    engine.run(guided(other))
    built: Any = internals.worker(engine).rewards.built
    assert built[one].model is built[other].model
    assert built[one].model.dtype.itemsize == 2
    held = weakref.ref(built[one].model)
    for number in range(KEPT):
        engine.run(guided(Heavy(number=number)))
    gc.collect()
    assert held() is None


def test_hundreds_of_rewards_and_schemas_leave_an_engine_as_it_was(start: Start, tmp_path: Path) -> None:
    engine = start(tiny.save(tmp_path / "bytes", tiny.causal(vocab_size=280), tiny.byte_pairs()), width=1)

    def requests(number: float) -> list[Request]:
        rewards: list[Reward] = [
            FunctionReward(function=lambda prompt, texts: [number * len(text) for text in texts]),
            LengthReward(target=int(number)),
            MinReward(
                rewards=[LengthReward(target=int(number), scale=(0, number)), LengthReward(target=5, scale=(0, 1))]
            ),
        ]
        schema = Grammar.json_schema({"type": "object", "properties": {f"p{int(number)}": {"type": "boolean"}}})
        written = Request("the cat", Sampling(), max_tokens=4, grammar=schema, seed=1)
        return [written, *(replace(guided(reward), prompt="the cat") for reward in rewards)]

    sizes = []
    for half in range(2):
        for number in range(1, 21):
            engine.run_many(requests(20.0 * half + number))
        state = engine.inspect()
        open_files = psutil.Process().num_fds()
        sizes.append((len(state.rewards), len(state.caches), state.tasks, threading.active_count(), open_files))
    assert sizes[0] == sizes[1]
    assert sizes[0][0] <= KEPT


def test_a_request_that_waits_for_a_row_keeps_its_reward(start: Start, models: Callable[..., str]) -> None:
    engine = start(models("llama"), width=1, max_rows=1)
    requests = [guided(reward, seed) for seed, reward in enumerate(formats(models, 2 * KEPT))]
    expected = [engine.run(request).token_ids for request in requests]
    assert [a.token_ids for a in engine.run_many([replace(r, timeout=60) for r in requests])] == expected


class Speechless(Reward):
    """A plug-in that raises when it is asked about itself."""

    kind: Literal["speechless"] = "speechless"
    silent: Literal["stays", "holds"] = "stays"

    @property
    def stays_loaded(self) -> bool:
        if self.silent == "stays":
            raise RuntimeError("who knows")
        return True

    def build(self, loader: Loader) -> RewardModel:
        class Model(Instant):
            @property
            def cache_bytes(self) -> int:
                raise RuntimeError("who knows")

        return Model(self.name, lambda response: float(len(response.text)))


@pytest.mark.parametrize("silent", ["stays", "holds"])
def test_a_plug_in_that_cannot_say_what_it_holds_ends_no_request(
    start: Start, models: Callable[..., str], gate: threading.Event, silent: Literal["stays", "holds"]
) -> None:
    gate.set()
    engine = start(models("llama"))
    expected = engine.run(guided(LengthReward(target=20))).text
    assert engine.run(guided(Speechless(silent=silent))).reward is not None
    assert engine.run(guided(LengthReward(target=20))).text == expected
    assert engine.run(guided(Heavy())).reward is not None
    engine.close()
