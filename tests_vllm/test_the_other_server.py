"""A server without the plug-in, and what becomes of requests when it dies: the last test here kills it."""

from __future__ import annotations

import asyncio
import logging

import pytest
from conftest import SECRET, Server, Start
from test_served import PROMPT, reward

from cards_integrations.decoding import FixedLength, SegmentBestOfN, Uncertainty
from cards_integrations.engine import Request
from cards_integrations.errors import ModelError, RewardError
from cards_integrations.rewards import FunctionReward, RemoteReward
from cards_integrations.trace import Alignment

BOUNDARY = Uncertainty(threshold=2.35, min_length=2, max_length=9)


def request(boundary: object = BOUNDARY, seed: int = 0) -> Request:
    method = SegmentBestOfN.model_validate({"boundary": boundary, "n": 2})
    return Request(PROMPT, method, FunctionReward(function=reward), max_tokens=24, seed=seed)


def test_a_missing_plug_in_is_refused(plain: Server, start: Start) -> None:
    with pytest.raises(ModelError, match=r"--logits-processors cards_integrations\.vllm_plugin:EntropyStop"):
        start(plain, api_key=SECRET).run(request())


def test_segments_of_a_fixed_length_instead(plain: Server, start: Start, caplog: pytest.LogCaptureFixture) -> None:
    engine = start(plain, api_key=SECRET, without_plugin="fixed_length", fallback_length=5)
    with caplog.at_level(logging.WARNING, "cards_integrations"):
        answers = engine.run_many([request(seed=seed) for seed in range(6)])
    assert all(len(s.token_ids) == 5 for answer in answers for s in answer.segments[:-1])
    assert sum(len(answer.segments) for answer in answers) > 12
    told = "no EntropyStop in the server; segments end by model.without_plugin='fixed_length'"
    assert [told in record.message for record in caplog.records] == [True]


def test_segments_that_end_at_punctuation_instead(plain: Server, start: Start) -> None:
    engine = start(plain, api_key=SECRET, without_plugin="punctuation")
    answers = engine.run_many([request(seed=seed) for seed in range(24)])
    inner = [segment for answer in answers for segment in answer.segments[:-1]]
    marked = [segment for segment in inner if segment.text.endswith((".", "!", "?", "\n"))]
    assert all(len(segment.token_ids) == 9 for segment in inner if segment not in marked)
    assert marked
    assert all(len(segment.token_ids) >= 2 for segment in marked)


def test_other_boundaries_need_no_plug_in(plain: Server, start: Start) -> None:
    answer = start(plain, api_key=SECRET).run(request(FixedLength(length=4)))
    assert all(len(segment.token_ids) == 4 for segment in answer.segments[:-1])


def test_one_replica_without_the_plug_in_is_as_if_none_had_it(lm: Server, plain: Server, start: Start) -> None:
    with pytest.raises(ModelError, match="EntropyStop"):
        start(lm, plain, api_key=SECRET).run(request())


def test_a_wrong_key_is_told_without_the_key(plain: Server, start: Start) -> None:
    with pytest.raises(ModelError, match=r"HTTP 401 at /v1/models.*Set model\.api_key, or CARDS_VLLM_API_KEY") as told:
        start(plain, api_key="open-sesame-42").loaded()
    assert "open-sesame-42" not in str(told.value)


async def test_requests_outlive_a_replica(lm: Server, plain: Server, start: Start, judge: RemoteReward) -> None:
    """It is killed in the middle of 64: each is answered once, or ends with an error that says why."""
    engine = start(lm, plain, api_key=SECRET)
    method = SegmentBestOfN(boundary=FixedLength(length=4), n=2)
    prompts = [f"{PROMPT} w{6 + i % 42} w{6 + i // 42}" for i in range(64)]
    segments, halfway = 0, asyncio.Event()
    asked = [(server, server.metric("request_success_total")) for server in (lm, plain)]

    async def count(_: object) -> None:
        nonlocal segments
        segments += 1
        if segments == 64:
            halfway.set()

    def answer(prompt: str, seed: int) -> asyncio.Task[Alignment]:
        one = Request(prompt, method, judge, max_tokens=32, seed=seed)
        return asyncio.create_task(engine.arun(one, count))

    tasks = [answer(prompt, seed) for seed, prompt in enumerate(prompts)]
    await halfway.wait()
    assert all(server.metric("request_success_total") > before for server, before in asked)
    assert any(not task.done() for task in tasks)
    plain.kill()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    answers = [each for each in found if isinstance(each, Alignment)]
    errors = [each for each in found if isinstance(each, (ModelError, RewardError))]
    assert len(answers) + len(errors) == len(found) == 64
    assert errors == []  # the other replica has room for all of them
    assert len({each.request_id for each in answers}) == 64
    chat = engine.loaded().chat
    assert [each.prompt_ids for each in answers] == [tuple(chat.encode(prompt)) for prompt in prompts]
    assert segments == sum(len(each.segments) for each in answers)
    later = start(lm, plain, api_key=SECRET)
    assert later.run(request(FixedLength(length=4))).text  # one of two is enough to begin with
    with pytest.raises(ModelError, match=r"cannot be reached.*Is it running, and model\.base_url right"):
        start(plain).loaded()
