"""Requests share decode steps, objects share engines."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Start

from cards_integrations import CardsLLM
from cards_integrations.decoding import Cards, Sampling, Uncertainty
from cards_integrations.engine import Engine, EngineSettings, Request
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward
from cards_integrations.trace import Alignment


def test_sixteen_at_once_take_a_third_of_the_steps(shared_models: Path, start: Start) -> None:
    reward = ClassifierReward(model=str(shared_models / "rm-sentiment-stories260k"))
    decoding = Cards(target_reward=0.6, beta=0.1, boundary=Uncertainty(threshold=2.5))
    requests = [
        Request(f"{name} went to the park", decoding, reward, Sampler(temperature=0.9), 48, seed=seed)
        for seed, name in enumerate(["Tom", "Lily", "The big dog", "Mom"] * 4)
    ]
    engine = start(shared_models / "stories260k")
    alone = [engine.run(request) for request in requests]
    steps_alone = engine.inspect().steps
    together = engine.run_many(requests)
    steps_together = engine.inspect().steps - steps_alone
    print(f"{steps_alone} decode steps one after another, {steps_together} at once")
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert steps_together * 3 <= steps_alone


# --- engines of objects that are gone ---


@pytest.fixture
def make(models: Callable[..., str]) -> Iterator[Callable[[int], CardsLLM]]:
    """An object with engine settings of its own."""

    def llm(width: int) -> CardsLLM:
        return CardsLLM(
            model=models("llama"), reward=None, decoding=Sampling(chunk=2), max_tokens=6, seed=1,
            engine=EngineSettings(dtype="float32", width=width),
        )  # fmt: skip

    before = set(Engine._shared.values())
    yield llm
    for engine in set(Engine._shared.values()) - before:
        engine.close()


def loaded(make: Callable[[int], CardsLLM]) -> int:
    """How many engines hold the model of these tests."""
    engines = [engine for engine in Engine._shared.values() if engine.model == make(1).model]
    return sum(engine.inspect().status == "ready" for engine in engines)


def test_an_object_made_anew_takes_the_place_of_the_one_before(make: Callable[[int], CardsLLM]) -> None:
    texts = set()
    for width in (1, 2, 3, 3):
        llm = make(width)
        texts.add(llm.align("w9 w20").text)
        assert loaded(make) == 1
        del llm
        gc.collect()
    assert len(texts) == 1


def test_engines_in_use_stay(make: Callable[[int], CardsLLM]) -> None:
    kept, gone = make(1), make(2)
    kept.align("w9 w20")
    stream = gone._engine({}).stream(gone.request("w9 w20", {"max_tokens": 200}))
    next(stream)
    del gone
    gc.collect()
    without_owner = Engine.shared(kept.model, EngineSettings(dtype="float32", width=4))
    without_owner.loaded()
    make(3).align("w9 w20")
    assert loaded(make) == 4  # one is owned, one answers, one never had an owner, one is new
    assert kept.align("w9 w20").text
    *_, answer = stream
    assert isinstance(answer, Alignment)
    assert len(answer.token_ids) > 6


def test_objects_that_come_and_go_in_many_threads(make: Callable[[int], CardsLLM]) -> None:
    found: list[str] = []

    def come_and_go(width: int) -> None:
        for _ in range(5):
            found.append(make(width).align("w9 w20").text)

    threads = [threading.Thread(target=come_and_go, args=(1 + i % 2,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 30
    assert len(set(found)) == 1
