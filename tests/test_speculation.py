"""Candidates drafted ahead of open verdicts: stop strings, cancellation, and rows of their own."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import reference
import tiny
from conftest import Start
from internals import assert_idle, until
from speculator import Eager
from transformers import AutoModelForCausalLM, AutoTokenizer

from cards_integrations.decoding import Cards, FixedLength, Uncertainty
from cards_integrations.engine import Request
from cards_integrations.models.local.language_model import LONG
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward, FunctionReward

PROMPT = "w9 w20 w31 w5"
STOP = ("7 w1", "w30")  # the first spans tokens, and now and then segments
SAMPLER = Sampler(temperature=1.0)
BOUNDARY = Uncertainty(threshold=2.95, min_length=2, max_length=6)


def cut(text: str) -> str:
    """What comes before the first stop string."""
    return text[: min([len(text), *(text.find(stop) for stop in STOP if stop in text)])]


def value(text: str) -> float:
    """A reward that only looks random."""
    return zlib.crc32(text.encode()) / 2**32


async def late(prompt: str, texts: list[str]) -> list[float]:
    """The verdict comes some steps after it was asked for."""
    for _ in range(zlib.crc32(texts[0].encode()) % 7):
        await asyncio.sleep(0)
    return [value(text) for text in texts]


def test_stop_strings_in_candidates_that_were_drafted_ahead(models: Callable[..., str], start: Start) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models("llama"))
    model = AutoModelForCausalLM.from_pretrained(models("llama")).eval()
    prompt = tokenizer(PROMPT)["input_ids"]

    def after(ids: list[int]) -> str:
        whole, asked = (
            tokenizer.decode(each, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for each in ([*prompt, *ids], prompt)
        )
        return str(whole).removeprefix(asked)

    requests, expected = [], []
    for seed in range(16):
        decoding = Cards(target_reward=1.0, beta=0.2, boundary=BOUNDARY if seed % 2 else FixedLength(length=3))
        loop: Any = reference.plain(model, tokenizer, None, prompt, temperature=1.0, stop=STOP)
        loop.decode = after
        loop.reward = lambda answer: value(cut(after(answer)))
        expected.append(loop.generate(prompt, decoding, 30, seed))
        requests.append(Request(PROMPT, decoding, FunctionReward(function=late), SAMPLER, 30, STOP, seed))
    engine = start(models("llama"))
    eager = Eager(engine)
    alone = [engine.run(request) for request in requests]
    stopped = [candidate for candidate in eager.adopted if not candidate.whole]
    assert stopped
    assert any(len(candidate.response) < len(candidate.before_text) for candidate in stopped)  # began in the parent
    for written in (alone, engine.run_many(requests)):
        assert [list(alignment.token_ids) for alignment in written] == expected
        assert [alignment.text for alignment in written] == [cut(after(ids)) for ids in expected]


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ClassifierReward]:
    """A model that knows no end of sequence, and a reward model for its texts."""
    size: dict[str, Any] = {"max_position_embeddings": 8192}
    folder = tmp_path_factory.mktemp("endless")
    words = tiny.words(eos_token=None)
    model = tiny.save(folder / "model", tiny.causal(**size, eos_token_id=None), words)
    return model, ClassifierReward(model=tiny.save(folder / "judge", tiny.classifier(**size), words))


def request(reward: ClassifierReward, seed: int, room: int, length: int = 6) -> Request:
    decoding = Cards(target_reward=0.5, beta=0.3, boundary=FixedLength(length=length))
    return Request(PROMPT, decoding, reward, SAMPLER, room, seed=seed)


async def test_cancelling_in_the_middle(endless: tuple[str, ClassifierReward], start: Start) -> None:
    """What was drafted ahead for a request goes with it, and the others go on as if they were alone."""
    model, reward = endless
    expected = await start(model, width=1).arun(request(reward, 0, 200))
    engine = start(model)
    eager = Eager(engine, most=60, wait=5)
    unwanted = [asyncio.create_task(engine.arun(request(reward, seed, 4000))) for seed in range(1, 7)]
    wanted = asyncio.create_task(engine.arun(request(reward, 0, 200)))
    for task in unwanted:
        ahead = len(eager.ahead) + 50
        await until(lambda ahead=ahead: len(eager.ahead) > ahead)  # type: ignore[misc]
        task.cancel()
    assert (await wanted).token_ids == expected.token_ids
    assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*unwanted, return_exceptions=True))
    await asyncio.to_thread(engine.run, request(reward, 9, 1))  # by then the worker has seen all of them off
    assert eager.adopted
    assert len(engine.inspect().caches) == 2
    assert_idle(engine)


def test_ahead_of_a_candidate_in_a_row_of_its_own(endless: tuple[str, ClassifierReward], start: Start) -> None:
    model, reward = endless
    requests = [request(reward, seed, 3 * LONG + 10, LONG + 2) for seed in range(2)]
    expected = start(model, width=1).run_many(requests)
    engine = start(model)
    eager = Eager(engine, wait=3)
    assert [a.token_ids for a in engine.run_many(requests)] == [a.token_ids for a in expected]
    assert eager.adopted
