"""What `Engine.inspect()` says of an engine from its first moment to its last."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
from conftest import Start
from internals import until

from cards_integrations.decoding import BestOfN, Cards, FixedLength, Sampling
from cards_integrations.engine import Engine, EngineSettings, EngineState, Request
from cards_integrations.errors import ModelError
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward, FunctionReward

PROMPT = "w9 w20 w31"


def plain(tokens: int = 8, prompt: str = PROMPT) -> Request:
    return Request(prompt, Sampling(), max_tokens=tokens, seed=1)


def test_nothing_is_loaded_to_inspect(models: Callable[..., str], start: Start) -> None:
    engine = start(models("llama"))
    assert engine.inspect() == EngineState("new")
    assert engine.inspect().idle
    assert engine.run(plain()).text
    assert engine.inspect().status == "ready"
    engine.close()
    assert engine.inspect() == EngineState("closed")


def test_an_engine_that_cannot_load_has_failed(tmp_path: object) -> None:
    engine = Engine(LocalModel(model=str(tmp_path)), EngineSettings(device="cpu"))
    with pytest.raises(ModelError):
        engine.run(plain())
    assert engine.inspect().status == "failed"
    engine.close()


async def test_a_request_is_seen_while_it_waits_for_its_reward(models: Callable[..., str], start: Start) -> None:
    gate = threading.Event()

    def waits(prompt: str, texts: list[str]) -> list[float]:
        gate.wait(60)
        return [1.0] * len(texts)

    engine = start(models("llama"), width=2)
    decoding = BestOfN(n=2)
    request = Request(PROMPT, decoding, FunctionReward(function=waits), Sampler(), 4, seed=1)
    task = asyncio.create_task(engine.arun(request))
    await until(lambda: engine.inspect().scoring == 1)
    state = engine.inspect()
    assert (state.requests, state.waiting, state.rows) == (1, 1, 1)
    assert not state.idle
    assert state.columns > 3  # the prompt, and the candidates beside each other
    assert state.rewards == ("function waits",)
    gate.set()
    answer = await task
    state = engine.inspect()
    assert state.idle
    assert (state.rows, state.columns) == (0, 0)
    assert (state.tokens, state.forwards) == (answer.usage.lm_tokens, answer.usage.lm_forwards)
    assert state.steps == 3  # the first token comes with the prompt


def test_caches_and_rewards_stay_and_what_was_read_is_kept(models: Callable[..., str], start: Start) -> None:
    engine = start(models("llama"), width=1, kv_memory=5e7)
    reward = ClassifierReward(model=models("llama", classifier=True))
    long = " ".join(["w9", "w20"] * 40)
    decoding = Cards(target_reward=9.0, beta=0.1, max_rejections=1, boundary=FixedLength(length=2))
    answer = engine.run(Request(long, decoding, reward, Sampler(), 8, seed=1))
    state = engine.inspect()
    assert state.idle
    assert state.rewards == (reward.name,)
    assert len(state.caches) == 2  # the language model's and the reward model's
    assert state.cache_bytes == sum(cache.bytes for cache in state.caches) > 0
    assert 0 < state.prefix_bytes <= state.memory_limit == 5e7
    assert all(80 <= tokens <= 80 + len(answer.token_ids) for tokens in state.cached_prefixes)
    assert len(state.cached_prefixes) == 2
