"""A language model behind vLLM drafts what the same model drafts here."""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
import tiny
from conftest import SECRET, Server, Start
from scipy.stats import chi2_contingency

from cards_integrations.decoding import BestOfN, Cards, FixedLength, Punctuation, Sampling, SegmentBestOfN, Uncertainty
from cards_integrations.decoding.segmentation import Measure
from cards_integrations.engine import Engine, Request
from cards_integrations.errors import ModelError, SettingsError
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward, FunctionReward, RemoteReward
from cards_integrations.trace import Alignment
from cards_integrations.uncertainty import uncertainty

PROMPT = "w9 w20 w31 w7"
LONG = " ".join(f"w{6 + i * 7 % 42}" for i in range(100))
OTHER = " ".join(f"w{6 + i * 11 % 42}" for i in range(100))
THRESHOLDS: dict[Measure, float] = {"entropy": 2.35, "max_probability": 0.78, "evidential": 0.62}
GREEDY = Sampler(temperature=0.0, top_k=0)


def reward(prompt: str, texts: list[str]) -> list[float]:
    return [0.2 * len(text.split()) + zlib.crc32(text.encode()) / 2**32 for text in texts]


def law(answers: Sequence[Alignment]) -> Counter[tuple[int, str, str]]:
    """Texts of kept segments, by where they are and what is before them."""
    found: Counter[tuple[int, str, str]] = Counter()
    for answer in answers:
        before = ""
        for number, segment in enumerate(answer.segments):
            found[number, before, segment.text] += 1
            before += segment.text
    return found


def p_value(one: Counter, other: Counter) -> float:
    """That two samples have one law, by a chi-squared test; what is rare is put together."""
    common = [key for key in one | other if one[key] + other[key] >= 20]
    table = [
        [*(sample[key] for key in common), sample.total() - sum(sample[k] for k in common)] for sample in (one, other)
    ]
    if sum(row[-1] for row in table) == 0:
        table = [row[:-1] for row in table]
    return float(chi2_contingency(table).pvalue)


# --- the same law ---


def test_kept_segments_have_the_law_of_the_local_model(lm: Server, start: Start) -> None:
    """At least 2,000 on each side; the test does see a threshold that is a little higher."""

    def answers(engine: Engine, threshold: float, first: int) -> list[Alignment]:
        method = Cards(
            target_reward=1.3, beta=0.3, boundary=Uncertainty(threshold=threshold, min_length=1, max_length=3)
        )
        guide, sampler = FunctionReward(function=reward), Sampler(temperature=0.7, top_k=3)
        return engine.run_many([Request("w9 w20", method, guide, sampler, 5, seed=first + seed) for seed in range(600)])

    served = answers(start(lm, width=1), 2.2, 0)
    local = start(lm.model)
    here, elsewhere = answers(local, 2.2, 10_000), answers(local, 2.4, 20_000)
    assert all(sum(len(answer.segments) for answer in each) >= 2000 for each in (served, here))
    assert sum(answer.usage.drafts for answer in served) > 3000
    assert p_value(law(served), law(here)) > 0.001
    assert p_value(law(served), law(elsewhere)) < 1e-6


@pytest.mark.parametrize("measure", ["entropy", "max_probability", "evidential"])
def test_segments_end_where_the_local_model_ends_them(lm: Server, start: Start, measure: Measure) -> None:
    """The tokens of the server are read again here: no candidate ends early, late, or for another reason."""
    boundary = Uncertainty(measure=measure, threshold=THRESHOLDS[measure], min_length=2, max_length=8)
    method = SegmentBestOfN(boundary=boundary, n=3)
    guide = FunctionReward(function=reward)
    answers = start(lm).run_many([Request(PROMPT, method, guide, Sampler(), 24, seed=seed) for seed in range(12)])
    local = start(lm.model).loaded()
    ends: Counter[str] = Counter()
    for answer in answers:
        before: list[int] = []
        for segment in answer.segments:
            for draft in segment.drafts:
                ids = [*draft.token_ids, tiny.PAD]
                logits = local.read([*answer.prompt_ids, *before], ids)
                rises = uncertainty(measure, logits, logits.log_softmax(-1)).tolist()
                assert all(rise < boundary.threshold for rise in rises[boundary.min_length : -1])
                if len(draft.token_ids) == min(boundary.max_length, 24 - len(before)):
                    ends["length"] += 1
                elif len(draft.token_ids) >= boundary.min_length and rises[-1] >= boundary.threshold:
                    ends["rise"] += 1
                else:
                    ends["end of sequence"] += 1
            before += segment.token_ids
        assert before == list(answer.token_ids)
        assert 2 not in before
        assert tiny.EOS not in before
    assert all(ends[each] > 0 for each in ("length", "rise", "end of sequence")), ends
    ended = sum(answer.finish_reason == "stop" for answer in answers)
    assert ended <= ends["end of sequence"] <= 0.2 * ends.total()  # others are rises


def test_log_likelihoods_are_those_of_the_local_model(lm: Server, start: Start) -> None:
    """At temperature 1 and over the full vocabulary, whatever was sampled with."""
    method = Cards(target_reward=1.0, beta=0.5, boundary=Uncertainty(threshold=2.35, min_length=2, max_length=8))
    sampler = Sampler(temperature=0.5, top_k=5)
    guide = FunctionReward(function=reward)
    answers = start(lm).run_many([Request(LONG, method, guide, sampler, 24, seed=seed) for seed in range(8)])
    local = start(lm.model).loaded()
    for answer in answers:
        log_p = local.read(answer.prompt_ids, answer.token_ids).log_softmax(-1)
        expected = sum(float(row[token]) for row, token in zip(log_p, answer.token_ids, strict=True))
        assert answer.log_likelihood == pytest.approx(expected, abs=1e-3)


def test_the_distributions_behind_are_the_same(lm: Server, start: Start) -> None:
    """All log-probabilities of the vocabulary, so also the entropy, agree to 1e-3."""
    body = {"model": lm.name, "prompt": [9, 20, 31, 7], "max_tokens": 20, "seed": 5, "logprobs": 48}
    body |= {"return_token_ids": True, "ignore_eos": True}
    choice = httpx.post(lm.url + "/v1/completions", json=body, timeout=60).json()["choices"][0]
    here = start(lm.model).loaded().read([9, 20, 31, 7], choice["token_ids"]).log_softmax(-1)
    names = tiny.words().convert_ids_to_tokens(list(range(48)))
    assert len(choice["token_ids"]) == 20
    for row, told in zip(here, choice["logprobs"]["top_logprobs"], strict=True):
        theirs = here.new_tensor([told[name] for name in names])
        assert float((theirs - row).abs().max()) < 1e-3
        assert float(uncertainty("entropy", theirs, theirs)) == pytest.approx(
            float(uncertainty("entropy", row, row)), abs=1e-3
        )


def test_a_seed_gives_an_answer_again(lm: Server, start: Start) -> None:
    method = BestOfN(n=3)
    engine, guide = start(lm), FunctionReward(function=reward)
    one, again, other = (engine.run(Request(PROMPT, method, guide, Sampler(), 16, seed=s)) for s in (4, 4, 5))
    assert one.token_ids == again.token_ids != other.token_ids
    assert [[d.token_ids for d in s.drafts] for s in one.segments] == [
        [d.token_ids for d in s.drafts] for s in again.segments
    ]
    assert len({draft.token_ids for draft in one.segments[0].drafts}) == 3


def test_greedy_answers_are_the_local_ones(lm: Server, plain: Server, start: Start) -> None:
    """Also where the generation config asks for a penalty, a temperature and a top-p."""
    request = Request(PROMPT, Sampling(chunk=5), sampler=GREEDY, max_tokens=30)
    here = start(lm.model).run(request)
    for engine in (start(lm), start(plain, api_key=SECRET)):
        there = engine.run(request)
        assert there.token_ids == here.token_ids
        assert there.finish_reason == here.finish_reason
        assert there.log_likelihood == pytest.approx(here.log_likelihood, abs=1e-3)


def test_penalties_of_a_whole_answer_are_the_local_ones(lm: Server, plain: Server, start: Start) -> None:
    """A call counts its own tokens: those of the answer where that is one call."""
    guide, found = FunctionReward(function=reward), []
    for presence, frequency, repetition in ((0.0, 0.0, 1.0), (1.6, 0.0, 1.0), (-0.4, 0.9, 1.0), (0.5, 0.5, 1.3)):
        sampler = Sampler(
            temperature=0, presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition
        )
        request = Request(PROMPT, BestOfN(n=1), guide, sampler, 30)
        here = start(lm.model).run(request)
        for engine in (start(lm), start(plain, api_key=SECRET)):
            assert engine.run(request).token_ids == here.token_ids
        found.append(here.token_ids)
    assert len({*found}) == len(found)


def test_stop_strings_end_answers_as_they_do_here(lm: Server, start: Start) -> None:
    """Within a token, over tokens, and over segments."""
    greedy = start(lm.model).run(Request(PROMPT, Sampling(), sampler=GREEDY, max_tokens=24)).text
    words = greedy.split()
    for stop in (words[6][:2], f"{words[4][-1]} {words[5]}", f"{words[5]} {words[6]}"):
        request = Request(PROMPT, Sampling(chunk=6), sampler=GREEDY, max_tokens=24, stop=(stop,))
        there, here = start(lm).run(request), start(lm.model).run(request)
        assert (there.text, there.finish_reason) == (here.text, "stop")
        assert stop not in there.text
        assert there.token_ids == here.token_ids


def test_punctuation_ends_a_segment_before_the_end_of_the_sequence(lm: Server, start: Start) -> None:
    """What ends at a mark has not ended the answer, even if the server drew that next."""
    boundary = Punctuation(marks=("w40", "w10", "w19"), min_length=2, max_length=6)
    guide = FunctionReward(function=reward)
    requests = [
        Request(PROMPT, SegmentBestOfN(boundary=boundary, n=2), guide, max_tokens=20, seed=s) for s in range(20)
    ]
    for answer in start(lm).run_many(requests):
        for segment in answer.segments[:-1]:
            assert segment.text.endswith(boundary.marks) or len(segment.token_ids) == 6
        last = answer.segments[-1]
        if answer.finish_reason == "stop" and len(last.token_ids) >= 2:
            assert not last.text.endswith(boundary.marks)


# --- what is paid ---


def test_prefix_caches_are_hit_on_both_servers(lm: Server, rm: Server, start: Start, judge: RemoteReward) -> None:
    servers = (lm, rm)
    before = [(s.metric("prefix_cache_queries_total"), s.metric("prefix_cache_hits_total")) for s in servers]
    method = SegmentBestOfN(boundary=FixedLength(length=8), n=4)
    engine = start(lm, width=1)
    answer = engine.run(Request(OTHER, method, judge, GREEDY.model_copy(update={"temperature": 1.0}), 32, seed=1))
    after = [(s.metric("prefix_cache_queries_total"), s.metric("prefix_cache_hits_total")) for s in servers]
    requests = answer.usage.lm_forwards
    assert requests >= 8
    for (asked, hit), (asked_before, hit_before) in zip(after, before, strict=True):
        assert asked - asked_before >= 100 * (requests - 1)
        assert hit - hit_before >= 96 * (requests - 2)  # whole blocks of 32 tokens
    assert answer.usage.cached_tokens == 0
    assert answer.usage.lm_tokens < 100 + 45 * requests
    assert engine.run(Request(OTHER, method, judge, max_tokens=32, seed=2)).usage.cached_tokens == 96


def test_rewards_of_token_ids_are_the_local_ones(rm: Server, lm: Server, start: Start, judge: RemoteReward) -> None:
    engine, texts = start(lm.model), ["w7 w8", "w40", " ".join(f"w{i}" for i in range(6, 40))]
    assert engine.score(judge, PROMPT, texts) == pytest.approx(
        engine.score(ClassifierReward(model=rm.model), PROMPT, texts), abs=1e-3
    )


# --- giving up ---


async def test_cancelling_aborts_in_the_server(lm: Server, start: Start) -> None:
    """All of them, and long before their ends."""
    engine = start(lm)
    engine.loaded()
    ended = lm.metric("request_success_total")
    written = lm.metric("generation_tokens_total")
    endless = Request("w9 w20", Sampling(chunk=480), sampler=GREEDY, max_tokens=480)
    tasks = [asyncio.create_task(engine.arun(endless)) for _ in range(16)]
    await asyncio.to_thread(wait_for, lm, 16)
    for task in tasks:
        task.cancel()
    assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*tasks, return_exceptions=True))
    await asyncio.to_thread(wait_for, lm, 0)
    assert lm.metric("request_success_total") == ended  # an aborted one is not counted
    assert lm.metric("generation_tokens_total") - written < 16 * 480 / 2


def wait_for(server: Server, running: int) -> None:
    for _ in range(1000):
        if server.metric("num_requests_running") == running and not server.metric("num_requests_waiting"):
            return
    raise AssertionError(f"{server.metric('num_requests_running')} requests run, and not {running}")


async def test_what_was_drafted_ahead_is_aborted(lm: Server, start: Start) -> None:
    """Drafts that nobody will look at; in the end nothing runs, and each was begun and ended once."""
    guide = FunctionReward(function=reward)
    ended = lm.metric("request_success_total")
    method = Cards(target_reward=-9.0, beta=0.3, boundary=Uncertainty(threshold=2.35, min_length=2, max_length=6))
    answer = await start(lm).arun(Request(PROMPT, method, guide, Sampler(), 48, seed=1))
    await asyncio.to_thread(wait_for, lm, 0)
    assert lm.metric("request_success_total") - ended <= answer.usage.lm_forwards + 1  # the probe has no such end
    assert answer.usage.lm_forwards >= len(answer.segments)


# --- what cannot work ---


def test_another_tokenizer_is_refused(lm: Server, start: Start, tmp_path: Path) -> None:
    tiny.byte_pairs().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"{lm.url} and tokenizer '{tmp_path}' disagree: set model\.tokenizer"):
        start(lm, tokenizer=str(tmp_path)).loaded()


def test_another_model_is_refused(lm: Server, start: Start) -> None:
    with pytest.raises(ModelError, match=r"serves tiny, and not model\.model='llama'"):
        start(lm, model="llama").loaded()


def test_too_long_an_answer_is_refused_here(lm: Server, start: Start) -> None:
    engine = start(lm)
    assert engine.loaded().context_window == 512
    with pytest.raises(SettingsError, match="the most that fits is 508"):
        engine.run(Request(PROMPT, Sampling(), max_tokens=509))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"cards_threshold": "high"}, "cards_threshold='high' must be a finite number"),
        ({"cards_threshold": 1.0}, "cards_sentinel=None must be the id of a token"),
        ({"cards_threshold": 1.0, "cards_sentinel": -1}, "cards_sentinel=-1 must be the id of a token"),
        ({"cards_threshold": 1.0, "cards_sentinel": 2, "cards_measure": "x"}, "cards_measure='x' must be one of"),
        ({"cards_threshold": 1.0, "cards_sentinel": 2, "cards_min_length": 1.5}, "cards_min_length=1.5 must be an"),
    ],
)
def test_the_plug_in_refuses_what_cannot_be_meant(lm: Server, asked: dict[str, object], told: str) -> None:
    body = {"model": lm.name, "prompt": [9], "max_tokens": 1, "vllm_xargs": asked}
    reply = httpx.post(lm.url + "/v1/completions", json=body, timeout=60)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith(told)


def test_requests_without_a_threshold_are_left_alone(lm: Server) -> None:
    """Beside others that have one; a sentinel outside the vocabulary changes nothing, and harms nobody."""
    body = {"model": lm.name, "prompt": [9, 20], "max_tokens": 40, "temperature": 0, "return_token_ids": True}
    ids = [choice["token_ids"] for choice in httpx.post(lm.url + "/v1/completions", json=body).json()["choices"]]
    xargs = {"cards_threshold": 0.0, "cards_min_length": 3, "cards_sentinel": 2}

    async def together() -> list[list[int]]:
        async with httpx.AsyncClient(timeout=60) as client:
            bodies = [body, {**body, "vllm_xargs": xargs}, {**body, "vllm_xargs": {**xargs, "cards_sentinel": 48}}] * 4
            bodies = [{**each, "ignore_eos": True, "stop_token_ids": [2]} for each in bodies]
            replies = await asyncio.gather(*(client.post(lm.url + "/v1/completions", json=each) for each in bodies))
            return [reply.json()["choices"][0]["token_ids"] for reply in replies]

    found = asyncio.run(together())
    assert found[0::3] == found[2::3] == ids * 4
    assert found[1::3] == [[*ids[0][:3], 2]] * 4
