"""Where memory runs out, batches shrink; only what does not fit by itself fails, and it fails alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Start
from internals import assert_idle, language_model, reward_model
from speculator import Eager

from cards_integrations.decoding import Cards, Sampling, Uncertainty
from cards_integrations.engine import Request
from cards_integrations.errors import CardsError, OutOfMemory
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward

PROMPT = "w9 w20 w31 w5"
BIG = "w9 w20 " * 20
BOUNDARY = Uncertainty(threshold=2.95, min_length=2, max_length=6)
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes."),
]


def limit(body: Any, most: int, error: Exception) -> list[int]:
    """Let a module's forward fail, at its very end, with more than `most` tokens; returns the sizes that did."""
    refused: list[int] = []
    forward = body.forward

    def limited(*args: Any, **inputs: Any) -> Any:
        found = forward(*args, **inputs)
        tokens = inputs["input_ids"].shape[1]
        if tokens > most:
            refused.append(tokens)
            raise error
        return found

    body.forward = limited
    return refused


def request(reward: ClassifierReward, seed: int, prompt: str = PROMPT) -> Request:
    return Request(prompt, Cards(target_reward=0.5, beta=0.3, boundary=BOUNDARY), reward, Sampler(), 16, seed=seed)


@pytest.fixture
def reward(models: Callable[..., str]) -> ClassifierReward:
    return ClassifierReward(model=models("llama", classifier=True))


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
@pytest.mark.parametrize("eager", [False, True], ids=["width 4", "drafting ahead"])
def test_batches_shrink_and_no_text_changes(
    models: Callable[..., str], start: Start, reward: ClassifierReward, error: Exception, eager: bool
) -> None:
    requests = [request(reward, seed) for seed in range(8)]
    expected = start(models("llama"), width=4).run_many(requests)
    engine = start(models("llama"), width=4)
    engine.run(request(reward, 99))
    refused = limit(language_model(engine).model, 8, error), limit(reward_model(engine).model.base_model, 10, error)
    ahead = Eager(engine, most=60) if eager else None
    written = engine.run_many(requests)
    assert [a.token_ids for a in written] == [a.token_ids for a in expected]
    assert all(max(sizes) > 15 for sizes in refused)
    assert ahead is None or ahead.adopted
    if not eager:  # what was read in vain is nobody's
        assert [a.usage.lm_tokens for a in written] == [a.usage.lm_tokens for a in expected]
    assert_idle(engine)


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
@pytest.mark.parametrize("in_reward", [False, True], ids=["drafting", "scoring"])
async def test_what_does_not_fit_fails_alone(
    models: Callable[..., str], start: Start, reward: ClassifierReward, error: Exception, in_reward: bool
) -> None:
    requests = [request(reward, seed) for seed in range(4)]
    expected = start(models("llama"), width=2).run_many(requests)
    engine = start(models("llama"), width=2)
    engine.run(request(reward, 99))
    body = reward_model(engine).model.base_model if in_reward else language_model(engine).model
    forward = body.forward
    refused = limit(body, 20, error)
    asked = [*requests[:2], request(reward, 9, BIG), *requests[2:]]
    answers: list[Any] = await asyncio.gather(*map(engine.arun, asked), return_exceptions=True)
    first, second, big, *rest = answers
    assert [a.token_ids for a in (first, second, *rest)] == [a.token_ids for a in expected]
    with pytest.raises(CardsError if in_reward else OutOfMemory, match=r"No memory for 40 more tokens.*shorter prompt"):
        raise big
    assert refused
    assert_idle(engine)
    body.forward = forward  # there is memory again
    assert (await engine.arun(request(reward, 9, BIG))).token_ids
    assert engine.run(requests[0]).token_ids == expected[0].token_ids


def test_finished_texts_are_given_up_first(models: Callable[..., str], start: Start) -> None:
    engine = start(models("llama"), width=1)
    model = language_model(engine)
    asked = Request("w9 w20 w31 " * 50, Sampling(), max_tokens=16, seed=0)
    expected = engine.run(asked)
    assert model.memory.prefix_lengths
    forward, refused = model.model.forward, []

    def full(*args: Any, **inputs: Any) -> Any:
        if model.memory.prefix_lengths:
            refused.append(inputs["input_ids"].shape[1])
            raise ERRORS[0]
        return forward(*args, **inputs)

    model.model.forward = full
    again = engine.run(asked)
    assert again.token_ids == expected.token_ids
    assert refused == [1]  # the last token of the prompt; then there was room
    assert model.memory.prefix_lengths == (len(again.prompt_ids) + 15,)
