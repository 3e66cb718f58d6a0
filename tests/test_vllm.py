"""Drafting on vLLM servers: the same law, log-likelihoods and ends as here, exact counts, and every failure."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import pickle
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
import torch
from scipy.stats import chi2_contingency
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from vllm_server import CLASSIFY, COMPLETIONS, MODELS, TOKENIZE, VllmServer

from cards_integrations import CardsLLM
from cards_integrations.chat.grammar import Grammar
from cards_integrations.decoding import (
    Args,
    BestOfN,
    Boundary,
    Cards,
    Cascade,
    Decoding,
    FixedLength,
    Particles,
    Punctuation,
    RejectionSampling,
    Sampling,
    SegmentBestOfN,
    SpeculativeRejection,
    TreeBoN,
    Uncertainty,
)
from cards_integrations.engine import EngineSettings
from cards_integrations.engine.request import Chunk
from cards_integrations.errors import (
    CardsTimeout,
    EngineClosed,
    ModelError,
    PromptError,
    RewardError,
    SettingsError,
)
from cards_integrations.http_client import service
from cards_integrations.models import LocalModel, VllmModel, sources
from cards_integrations.models.vllm.replies import Completion
from cards_integrations.rewards import ClassifierReward, FunctionReward, RemoteReward
from cards_integrations.settings import CardsSettings
from cards_integrations.trace import Alignment

PROMPT = "w9 w20 w31 w5"
PROMPTS = [PROMPT, "w7 w8", "w40 w12 w13", "w6", "w33 w22 w11 w44 w17", "w25 w26", "w19 w38 w9", "w16 w45"]
SEGMENT = 48  # the id of a special token that the model does not write
ROOM = 20
SECRET = "sesame-4711"
UNCERTAIN = Uncertainty(threshold=2.95, min_length=2, max_length=6)
BOUNDARIES: dict[str, Boundary] = {
    "entropy": UNCERTAIN,
    "max_probability": Uncertainty(measure="max_probability", threshold=0.75, min_length=1, max_length=5),
    "evidential": Uncertainty(measure="evidential", threshold=0.62, min_length=1, max_length=5),
    "fixed length": FixedLength(length=3),
    "punctuation": Punctuation(marks=("9", "4", "."), min_length=2, max_length=6),
}
FORM = "{prompt} {response}"
Make = Callable[..., CardsLLM]


def with_sentinel(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<segment>"]})
    return tokenizer


def never_writes(model: Any, token: int) -> Any:
    """One direction of the residual stream is made constant; the token's logit is read off it, far below all others."""
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[token] = 0.0
        model.lm_head.weight[token, 0] = -100.0
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = never_writes(tiny.causal(vocab_size=SEGMENT + 1), SEGMENT)
    return tiny.save(tmp_path_factory.mktemp("drafting"), model, with_sentinel(tiny.words()))


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = tiny.classifier(vocab_size=SEGMENT + 1)
    return tiny.save(tmp_path_factory.mktemp("judging"), model, with_sentinel(tiny.words()))


@pytest.fixture(scope="module")
def running(folder: str, judge: str) -> Iterator[VllmServer]:
    server = VllmServer(folder, judge).start()
    yield server
    server.die()


@pytest.fixture
def server(running: VllmServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for variable in ("CARDS_VLLM_API_KEY", "CARDS_REWARD_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    sources._served_context_window.cache_clear()
    running.reset()
    yield running
    running.wait_until_idle()


@pytest.fixture
def two(folder: str, judge: str, server: VllmServer) -> Iterator[list[VllmServer]]:
    """Replicas of this test's own."""
    found = [VllmServer(folder, judge).start() for _ in range(2)]
    yield found
    for each in found:
        if each.thread.is_alive():
            each.wait_until_idle()
            each.die()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "BACK_OFF", lambda state: 0.0)


def options(**more: Any) -> dict[str, Any]:
    decoding = Cards(target_reward=0.5, beta=0.3, boundary=UNCERTAIN)
    engine = EngineSettings(device="cpu", dtype="float32", width=1)
    return {"decoding": decoding, "max_tokens": ROOM, "temperature": 1.0, "engine": engine, **more}


@pytest.fixture
def remote(server: VllmServer, folder: str, judge: str) -> Iterator[Make]:
    """`remote(decoding=..., model={"retries": 0})` drafts on the server, and is judged here."""
    made: list[CardsLLM] = []

    def make(model: dict[str, Any] | None = None, **more: Any) -> CardsLLM:
        own = {"base_url": f"{server.url}/v1", "model": "served", "tokenizer": folder, "sentinel": SEGMENT}
        reward = more.pop("reward", ClassifierReward(model=judge, prompt_format=FORM))
        made.append(CardsLLM(model=VllmModel(**{**own, **(model or {})}), reward=reward, **options(**more)))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@pytest.fixture
def local(folder: str, judge: str) -> Iterator[Make]:
    """The same with the model here."""
    made: list[CardsLLM] = []

    def make(**more: Any) -> CardsLLM:
        reward = more.pop("reward", ClassifierReward(model=judge, prompt_format=FORM))
        made.append(CardsLLM(model=LocalModel(model=folder), reward=reward, **options(**more)))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def segments(answer: Alignment) -> list[str]:
    return [segment.text for segment in answer.segments]


async def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it never came true")


# --- the same as here ---


@pytest.mark.parametrize("name", BOUNDARIES)
def test_greedy_answers_are_those_of_the_model_here(remote: Make, local: Make, name: str) -> None:
    """Segment by segment, with their rewards, log-likelihoods and reasons to end."""
    decoding = Cards(target_reward=0.5, beta=0.3, boundary=BOUNDARIES[name])
    found, expected = (
        make(decoding=decoding, temperature=0).align_batch(PROMPTS, seeds=range(8)) for make in (remote, local)
    )
    assert [segments(answer) for answer in found] == [segments(answer) for answer in expected]
    assert len({len(text.split()) for answer in found for text in segments(answer)}) > 1
    for one, other in zip(found, expected, strict=True):
        assert (one.text, one.token_ids, one.prompt_ids) == (other.text, other.token_ids, other.prompt_ids)
        assert one.finish_reason == other.finish_reason
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)
        assert one.reward == pytest.approx(other.reward, abs=1e-4)
        assert one.prompt_reward == pytest.approx(other.prompt_reward, abs=1e-4)


def test_thoughts(judge: str, server: VllmServer, tmp_path: Path) -> None:
    """The thoughts, how they end, and the answer to what they come to, are those of the model here."""
    tokenizer = with_sentinel(tiny.words())
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}<think>"
    model = never_writes(tiny.causal(vocab_size=len(tokenizer)), SEGMENT)
    thinks = tiny.save(tmp_path, model, tokenizer)
    other = VllmServer(thinks, judge).start()
    served = VllmModel(base_url=other.url, model="served", tokenizer=thinks, sentinel=SEGMENT)
    more = options(temperature=0, max_thinking_tokens=9, reward=ClassifierReward(model=judge, prompt_format=FORM))
    with CardsLLM(model=served, **more) as remote, CardsLLM(model=LocalModel(model=thinks), **more) as local:
        found, expected = remote.align(PROMPT), local.align(PROMPT)
    other.wait_until_idle()
    other.die()
    assert found.thinking is not None
    assert found.thinking == expected.thinking
    assert len(found.thinking.token_ids) == found.usage.reasoning_tokens == 9
    assert (found.prompt_ids, found.token_ids) == (expected.prompt_ids, expected.token_ids)


@pytest.mark.parametrize(
    "decoding",
    [
        BestOfN(n=3),
        RejectionSampling(target_reward=0.0, beta=0.5),
        SegmentBestOfN(n=3, boundary=UNCERTAIN),
        Particles(n=3, beta=0.5, boundary=UNCERTAIN),
        TreeBoN(n=4, children=2, boundary=FixedLength(length=5)),
        Cascade(budget="tokens:3"),
        SpeculativeRejection(n=4, checkpoint=5),
        Sampling(chunk=4),
    ],
    ids=lambda decoding: decoding.method,
)
def test_other_methods(remote: Make, local: Make, decoding: Decoding) -> None:
    """Greedy they are those of the model here; sampled, each answer ends, and its reward is that of its text."""
    found, expected = (
        make(decoding=decoding, temperature=0).align_batch(PROMPTS[:3], seeds=range(3)) for make in (remote, local)
    )
    assert [segments(answer) for answer in found] == [segments(answer) for answer in expected]
    llm = remote(decoding=decoding)
    for answer in llm.align_batch(PROMPTS[:3], seeds=range(3)):
        assert answer.finish_reason == "stop" or answer.usage.completion_tokens == ROOM
        assert "".join(segments(answer)) == answer.text
        if answer.reward is not None:
            [again] = llm.score(PROMPTS[answer.seed], [answer.text])
            assert answer.reward == pytest.approx(again, abs=1e-4)


def test_a_round_of_a_search_is_a_round_trip(remote: Make, server: VllmServer) -> None:
    """A budget in steps of the server goes into fewer, wider rounds than one in tokens."""
    [timed] = remote(decoding=Cascade(budget=2), max_tokens=60).align_batch(PROMPTS[:1], seeds=[0])
    [counted] = remote(decoding=Cascade(budget="tokens:2"), max_tokens=60).align_batch(PROMPTS[:1], seeds=[0])
    assert timed.plan is not None
    assert counted.plan is not None
    assert len(timed.plan.rounds) < len(counted.plan.rounds)
    assert timed.plan.rounds[0].width > counted.plan.rounds[0].width


def test_ranks_need_a_local_model(remote: Make) -> None:
    with pytest.raises(SettingsError, match=r"rank \(Args\) need a local model"):
        remote(decoding=Args()).align(PROMPT)


@pytest.mark.parametrize("boundary", BOUNDARIES.values(), ids=BOUNDARIES)
def test_log_likelihoods_are_those_of_the_model(remote: Make, folder: str, boundary: Boundary) -> None:
    """At temperature 1 and over the full vocabulary, whatever was sampled."""
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    decoding = Cards(target_reward=0.5, beta=0.3, boundary=boundary)
    answers = remote(decoding=decoding, temperature=0.8, top_k=5).align_batch(PROMPTS, seeds=range(8))
    for answer in answers:
        ids = torch.tensor([[*answer.prompt_ids, *answer.token_ids]])
        with torch.inference_mode():
            log_p = model(ids).logits[0].log_softmax(-1)
        at = range(len(answer.prompt_ids), ids.shape[1])
        expected = sum(float(log_p[i - 1, ids[0, i]]) for i in at)
        assert answer.log_likelihood == pytest.approx(expected, abs=1e-3)
        assert SEGMENT not in answer.token_ids


def test_top_k_and_temperature_reach_the_server(remote: Make, server: VllmServer, folder: str) -> None:
    """Of the two most probable tokens, each."""
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    answers = remote(decoding=Sampling(), top_k=2).align_batch([PROMPT] * 10, seeds=range(10))
    for answer in answers:
        ids = [*answer.prompt_ids, *answer.token_ids]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0]
        for i in range(len(answer.prompt_ids), len(ids)):
            assert ids[i] in logits[i - 1].topk(2).indices.tolist()
    assert {(asked.body["top_k"], asked.body["temperature"]) for asked in server.drafted} == {(2, 1.0)}


# --- the law ---

LETTERS = ["</s>", "a", "b", "c", "d", "e"]
SAMPLES = 250


def reward_of(text: str) -> float:
    """Longer is better, with a part that only looks random."""
    return 0.5 * len(text.split()) + zlib.crc32(text.encode()) / 2**32


async def rewards(prompt: str, texts: list[str]) -> list[float]:
    return [reward_of(text) for text in texts]


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    fast = Tokenizer(WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="a"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = with_sentinel(PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>"))
    sizes: dict[str, Any] = {"vocab_size": 7, "eos_token_id": 0, "pad_token_id": None, "max_position_embeddings": 16}
    model = never_writes(tiny.causal(seed=23, initializer_range=0.2, **sizes), 6)
    server = VllmServer(tiny.save(tmp_path_factory.mktemp("letters"), model, tokenizer)).start()
    yield server
    server.die()


def kept(model: Any, boundary: Boundary, seeds: range) -> list[Alignment]:
    decoding = Cards(target_reward=2.2, beta=0.4, max_rejections=4, boundary=boundary)
    engine = EngineSettings(device="cpu", dtype="float32", width=1)
    llm = CardsLLM(
        model=model, reward=FunctionReward(function=rewards), decoding=decoding, max_tokens=5, temperature=1.0,
        top_k=4, engine=engine,
    )  # fmt: skip
    with llm:
        return llm.align_batch(["b d a"] * len(seeds), seeds=seeds)


def same_law(one: list[Any], other: list[Any]) -> float:
    """The p-value of the two-sample chi-square test; what is rare is counted together."""
    counts = [Counter(one), Counter(other)]
    common = [each for each in sorted({*one, *other}) if sum(count[each] for count in counts) >= 16]
    table = [[count[each] for each in common] for count in counts]
    for row, values in zip(table, (one, other), strict=True):
        row.append(len(values) - sum(row))
    if not any(row[-1] for row in table):
        table = [row[:-1] for row in table]
    assert len(table[0]) >= 4
    return float(chi2_contingency(table).pvalue)


LAWS: dict[str, Boundary] = {
    "uncertainty": Uncertainty(threshold=1.606, min_length=1, max_length=3),
    "fixed length": FixedLength(length=2),
    "punctuation": Punctuation(marks=("a", "e"), min_length=1, max_length=3),
}


@pytest.mark.law
@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("name", LAWS)
def test_kept_segments_have_the_law_of_the_model_here(letters: VllmServer, name: str) -> None:
    letters.reset()
    there = VllmModel(base_url=letters.url, model="served", tokenizer=letters.folder, sentinel=6)
    found = kept(there, LAWS[name], range(SAMPLES))
    expected = kept(LocalModel(model=letters.folder), LAWS[name], range(SAMPLES, 2 * SAMPLES))
    first = [[a.segments[0].text for a in answers] for answers in (found, expected)]
    ends = [
        [f"{len(a.segments)} {a.finish_reason} {len(a.token_ids)}" for a in answers] for answers in (found, expected)
    ]
    print(f"{len(letters.drafted)} requests; p = {same_law(*first):.3f} of segments, {same_law(*ends):.3f} of ends")
    assert same_law(*first) > 0.01
    assert same_law(*ends) > 0.01


@pytest.mark.law
@pytest.mark.usefixtures("server")
def test_another_threshold_has_another_law(letters: VllmServer) -> None:
    """The comparison can fail."""
    letters.reset()
    there = VllmModel(base_url=letters.url, model="served", tokenizer=letters.folder, sentinel=6)
    other = Uncertainty(threshold=1.5, min_length=1, max_length=3)
    found = kept(there, LAWS["uncertainty"], range(SAMPLES))
    expected = kept(LocalModel(model=letters.folder), other, range(SAMPLES, 2 * SAMPLES))
    assert same_law([a.segments[0].text for a in found], [a.segments[0].text for a in expected]) < 1e-6


def test_a_seed_gives_the_same_answer(remote: Make) -> None:
    llm = remote()
    one, again, other = (llm.align(PROMPT, seed=seed) for seed in (3, 3, 4))
    assert (one.token_ids, one.reward, segments(one)) == (again.token_ids, again.reward, segments(again))
    assert one.token_ids != other.token_ids


@pytest.mark.parametrize("width", [3, "auto"])
def test_what_is_drafted_ahead_changes_nothing(remote: Make, width: int | str) -> None:
    plain = remote().align_batch(PROMPTS, seeds=range(8))
    ahead = remote(engine=EngineSettings(device="cpu", dtype="float32", width=width)).align_batch(
        PROMPTS, seeds=range(8)
    )
    assert [segments(answer) for answer in ahead] == [segments(answer) for answer in plain]


# --- counts, and what is sent ---


def test_exact_counts(remote: Make, server: VllmServer, judge: str) -> None:
    reward = RemoteReward(url=server.url, protocol="classify", model="served")
    llm = remote(reward=reward)
    answer = llm.align(PROMPT, seed=3)
    drafts = [draft for segment in answer.segments for draft in segment.drafts]
    usage, replies = answer.usage, [asked.reply for asked in server.drafted]
    risen = sum(reply["choices"][0]["stop_reason"] == SEGMENT for reply in replies)
    paid = [reply["usage"] for reply in replies]
    assert usage.drafts == len(drafts) == len(replies) == usage.lm_forwards > len(answer.segments) > 1
    assert risen > 0
    assert usage.drafted_tokens == server.tokens - risen
    assert usage.lm_tokens == sum(
        each["prompt_tokens"] - each["prompt_tokens_details"]["cached_tokens"] + each["completion_tokens"]
        for each in paid
    )
    assert usage.prompt_tokens == 4
    assert usage.completion_tokens == len(answer.token_ids) == sum(len(s.token_ids) for s in answer.segments)
    assert usage.rm_forwards == len(server.of(CLASSIFY)) == 1 + len(drafts)
    before = len(server.asked)
    other = llm.align(PROMPT, seed=4)
    assert len(server.asked) - before == other.usage.lm_forwards + other.usage.rm_forwards


def test_without_details_every_token_counts(remote: Make, server: VllmServer) -> None:
    server.details = False
    usage = remote().align(PROMPT, seed=3).usage
    paid = [asked.reply["usage"] for asked in server.drafted]
    assert usage.lm_tokens == sum(each["prompt_tokens"] + each["completion_tokens"] for each in paid)
    assert usage.cached_tokens == 0


def test_what_an_earlier_request_has_read(remote: Make) -> None:
    """Not what this one has read itself, with its first candidate."""
    llm, prompt = remote(), " ".join(f"w{i}" for i in range(10, 21))
    assert [llm.align(prompt, seed=seed).usage.cached_tokens for seed in (1, 2)] == [0, 8]


def test_samplers_reach_the_server(remote: Make, local: Make, server: VllmServer) -> None:
    """Greedy, they lead to the answer of the model here, segment by segment; ends come no sooner than they may."""
    kinds: list[dict[str, Any]] = [
        {"repetition_penalty": 1.4},
        {"logit_bias": {"9": 4.0, "20": -100}},
        {"logit_bias": {tiny.EOS: 30.0}, "min_tokens": 7},
        {"logit_bias": {20: 30.0}, "stop_token_ids": [20], "min_tokens": 4},
    ]
    for more in kinds:
        for decoding in (Sampling(chunk=3), options()["decoding"]):
            own: dict[str, Any] = {"decoding": decoding, "temperature": 0, **more}
            found, expected = remote(**own).align(PROMPT), local(**own).align(PROMPT)
            assert (found.token_ids, found.finish_reason) == (expected.token_ids, expected.finish_reason)
            assert [each.text for each in found.segments] == [each.text for each in expected.segments]
    for more in ({"presence_penalty": 1.5}, {"frequency_penalty": 0.7, "presence_penalty": -0.3}):
        whole: dict[str, Any] = {"decoding": BestOfN(n=1), "temperature": 0}
        penalized, expected = remote(**whole, **more).align(PROMPT), local(**whole, **more).align(PROMPT)
        assert penalized.token_ids == expected.token_ids != local(**whole).align(PROMPT).token_ids
    remote(top_p=0.5, min_p=0.1).align(PROMPT)
    assert {(asked.body["top_p"], asked.body["min_p"]) for asked in server.drafted[-1:]} == {(0.5, 0.1)}


def test_log_probabilities_of_the_server(remote: Make, local: Make) -> None:
    own: dict[str, Any] = {"decoding": Sampling(chunk=3), "temperature": 0, "top_logprobs": 3}
    found, expected = remote(**own).align(PROMPT).logprobs, local(**own).align(PROMPT).logprobs
    assert [each.token_id for each in found] == [each.token_id for each in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [each.token_id for each in one.top] == [each.token_id for each in other.top]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"presence_penalty": 0.5}, "presence_penalty behind vLLM needs a method that drafts whole answers"),
        ({"frequency_penalty": 0.5, "decoding": Sampling()}, "every segment is a call"),
        ({"presence_penalty": 2.5, "decoding": BestOfN(n=1)}, "presence_penalty: a vLLM server takes"),
        ({"logit_bias": {9: 101.0}}, "logit_bias: a vLLM server takes"),
        ({"stop_token_ids": [SEGMENT]}, "set model.sentinel"),
    ],
)
def test_samplers_that_a_server_does_not_have(remote: Make, more: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        remote(**more).align(PROMPT)


def test_a_server_that_ends_too_soon_or_names_no_tokens(remote: Make, server: VllmServer) -> None:
    def spoil(reply: dict[str, Any]) -> None:
        [choice] = reply["choices"]
        choice["logprobs"]["top_logprobs"] = None

    server.spoil = spoil
    with pytest.raises(ModelError, match="0 top_logprobs"):
        remote(top_logprobs=2).align(PROMPT)

    def ends(reply: dict[str, Any]) -> None:
        [choice] = reply["choices"]
        choice.update(token_ids=[9, tiny.EOS], finish_reason="stop", stop_reason=None)
        choice["logprobs"]["token_logprobs"] = [-1.0, -1.0]

    server.spoil = ends
    with pytest.raises(ModelError, match="at least min_tokens=5 tokens after 1"):
        remote(min_tokens=5).align(PROMPT)


def test_what_is_sent(remote: Make, server: VllmServer) -> None:
    answer = remote().align(PROMPT, seed=3, stop=["w99"])
    first, second = server.drafted[0].body, server.drafted[-1].body
    assert first == {
        "model": "served", "prompt": [9, 20, 31, 2], "max_tokens": 6, "temperature": 1.0, "top_k": 40, "top_p": 1.0,
        "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "seed": first["seed"], "logprobs": 0, "return_token_ids": True, "stop": ["w99"], "skip_special_tokens": True,
        "stop_token_ids": [SEGMENT],
        "vllm_xargs": {
            "cards_measure": "entropy", "cards_threshold": 2.95, "cards_min_length": 2, "cards_sentinel": SEGMENT
        },
    }  # fmt: skip
    before = sum(len(segment.token_ids) for segment in answer.segments[:-1])
    assert second["prompt"] == [9, 20, 31, 2, *answer.token_ids[:before]]
    assert second["max_tokens"] == min(6, ROOM - before)
    seeds = [asked.body["seed"] for asked in server.drafted]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("name", ["fixed length", "punctuation"])
def test_boundaries_that_need_no_plugin(
    remote: Make, server: VllmServer, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.plugin = False
    remote(decoding=Cards(target_reward=0.5, beta=0.3, boundary=BOUNDARIES[name])).align(PROMPT, seed=3)
    assert server.drafted
    assert "EntropyStop" not in caplog.text
    assert not any({"vllm_xargs", "stop_token_ids"} & asked.body.keys() for asked in server.drafted)


def test_the_server_is_met_once(remote: Make, server: VllmServer) -> None:
    llm = remote()
    llm.align(PROMPT, seed=1)
    met = len(server.of(MODELS)), len(server.of(TOKENIZE)), len(server.of(COMPLETIONS)) - len(server.drafted)
    assert met[1:] == (1, 1)
    llm.align("w7", seed=2)
    assert met == (len(server.of(MODELS)), len(server.of(TOKENIZE)), len(server.of(COMPLETIONS)) - len(server.drafted))


def test_a_sentinel_of_the_tokenizer_s_own(remote: Make, server: VllmServer) -> None:
    """A special token that is no end-of-sequence; answers never hold it."""
    answers = remote(model={"sentinel": None}).align_batch(PROMPTS, seeds=range(8))
    assert {asked.body["vllm_xargs"]["cards_sentinel"] for asked in server.drafted} == {2}  # <unk>
    assert all(2 not in answer.token_ids for answer in answers)
    assert any(asked.reply["choices"][0]["stop_reason"] == 2 for asked in server.drafted)


def test_no_more_than_concurrency_at_once(remote: Make, server: VllmServer) -> None:
    server.pace = 0.002
    remote(model={"concurrency": 3}, decoding=Sampling()).align_batch(PROMPTS, seeds=range(8))
    assert server.peak == 3


# --- ends ---


@pytest.mark.parametrize("length", [1, 2, 3, 50])
def test_stop_strings(remote: Make, local: Make, server: VllmServer, length: int) -> None:
    """Within a segment, and over the ends of several."""
    sampling = remote(decoding=Sampling(chunk=length), top_k=2)
    plain = sampling.align("w7 w8", seed=5)
    stop = " ".join(plain.text.split()[4:7])
    stopped = sampling.align("w7 w8", seed=5, stop=stop)
    assert (stopped.text, stopped.finish_reason) == (plain.text.split(stop)[0], "stop")
    assert len(stopped.text) > 0
    decoding = Cards(target_reward=0.5, beta=0.3, boundary=FixedLength(length=length))
    greedy = [make(decoding=decoding, temperature=0).align("w7 w8") for make in (remote, local)]
    found = " ".join(greedy[0].text.split()[3:5])
    there, here = (make(decoding=decoding, temperature=0, stop=found).align("w7 w8") for make in (remote, local))
    assert (there.text, there.finish_reason, there.token_ids) == (here.text, here.finish_reason, here.token_ids)
    assert (there.text, there.finish_reason) == (greedy[1].text.split(found)[0], "stop")


def test_a_stream_holds_half_a_stop_string_back(remote: Make) -> None:
    decoding = Cards(target_reward=0.5, beta=0.3, boundary=FixedLength(length=1))
    words = remote(decoding=decoding, temperature=0).align("w7 w8").text.split()
    llm = remote(decoding=decoding, temperature=0, stop=" ".join(words[3:5]))
    *chunks, answer = llm.align_stream("w7 w8")
    assert "".join(chunk.text for chunk in chunks) == answer.text


def test_end_of_sequence(remote: Make, server: VllmServer) -> None:
    """It ends the answer, is no part of it, and is a token that was drafted."""
    answers = remote(decoding=Sampling(chunk=50), top_k=0).align_batch(PROMPTS * 3, seeds=range(24))
    ended = [answer for answer in answers if answer.finish_reason == "stop"]
    assert 0 < len(ended) < 24
    for answer in ended:
        assert tiny.EOS not in answer.token_ids
        assert answer.usage.drafted_tokens == answer.usage.completion_tokens + 1
    for answer in answers:
        if answer.finish_reason == "length":
            assert answer.usage.completion_tokens == answer.usage.drafted_tokens == ROOM


@pytest.mark.parametrize("room", [1, 5, 6, 7])
def test_max_tokens(remote: Make, room: int) -> None:
    found = remote(decoding=Cards(target_reward=0.5, beta=0.3, boundary=FixedLength(length=3)), top_k=2)
    answer = found.align("w7 w8", seed=2, max_tokens=room)
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", room)
    assert [len(segment.token_ids) for segment in answer.segments][:-1] == [3] * ((room - 1) // 3)


def test_a_mark_ends_the_segment_before_the_end_of_sequence(letters: VllmServer, server: VllmServer) -> None:
    """The model here does not look at what follows a mark, so what follows is a segment of its own."""
    letters.reset()
    boundary = LAWS["punctuation"]
    there = VllmModel(base_url=letters.url, model="served", tokenizer=letters.folder)
    for model in (LocalModel(model=letters.folder), there):
        for answer in kept(model, boundary, range(60)):
            for draft in [draft for segment in answer.segments for draft in segment.drafts]:
                assert len(draft.token_ids) <= 3
            marked = [segment for segment in answer.segments if segment.text.endswith(("a", "e"))]
            if answer.finish_reason == "stop":
                assert answer.segments[-1] not in marked


# --- streams and faces ---


def test_a_stream(remote: Make) -> None:
    llm = remote()
    *streamed, answer = llm.align_stream(PROMPT, seed=3)
    assert isinstance(answer, Alignment)
    chunks = [chunk for chunk in streamed if isinstance(chunk, Chunk)]
    assert chunks == streamed
    assert "".join(chunk.text for chunk in chunks) == answer.text == llm.align(PROMPT, seed=3).text
    assert [chunk.segment.text for chunk in chunks] == segments(answer)


async def test_langchain(remote: Make) -> None:
    llm = remote(seed=3)
    expected = (await llm.aalign(PROMPT)).text
    message = llm.invoke(PROMPT)
    assert message.content == expected
    assert message.usage_metadata is not None
    assert message.usage_metadata["input_tokens"] == 4
    assert message.response_metadata["cards"]["method"] == "cards"
    assert (await llm.ainvoke(PROMPT)).content == expected
    assert "".join(chunk.content for chunk in llm.stream(PROMPT)) == expected
    assert "".join([chunk.content async for chunk in llm.astream(PROMPT)]) == expected
    assert [each.content for each in llm.batch([PROMPT, PROMPT])] == [expected] * 2


async def test_llama_index(remote: Make) -> None:
    from llama_index.core.llms import ChatMessage

    llm = remote(seed=3)
    expected = (await llm.aalign(PROMPT)).text
    assert llm.metadata.context_window == 256
    assert llm.complete(PROMPT).text == expected
    assert (await llm.acomplete(PROMPT)).text == expected
    assert llm.chat([ChatMessage(content=PROMPT)]).message.content == expected
    assert list(llm.stream_complete(PROMPT))[-1].text == expected
    deltas: list[Any] = [chunk.delta async for chunk in await llm.astream_chat([ChatMessage(content=PROMPT)])]
    assert "".join(deltas) == expected


def test_a_remote_reward_gives_the_rewards_of_the_model_here(remote: Make, server: VllmServer, judge: str) -> None:
    asked = RemoteReward(url=server.url, protocol="classify", model="served", prompt_format=FORM)
    ids = RemoteReward(url=server.url, protocol="classify", tokenizer=judge, prompt_format=FORM)
    here = ClassifierReward(model=judge, prompt_format=FORM)
    answers = [remote(reward=reward).align(PROMPT, seed=3) for reward in (here, asked, ids)]
    assert len({answer.token_ids for answer in answers}) == 1
    assert len({len(answer.segments) for answer in answers}) == 1
    for answer in answers[1:]:
        assert answer.reward == pytest.approx(answers[0].reward, abs=1e-4)
    assert {type(asked.body["input"][0]) for asked in server.of(CLASSIFY)} == {str, list}


# --- giving up ---


@pytest.fixture
def slow(server: VllmServer) -> VllmServer:
    server.pace = 0.02
    return server


def long(**more: Any) -> dict[str, Any]:
    """An answer that nobody waits for to the end."""
    return {"decoding": Sampling(chunk=100), "max_tokens": 200, "seed": 1, "top_k": 2, **more}


async def assert_stopped(server: VllmServer, aborted: int) -> None:
    await wait_until(lambda: server.in_flight == 0)
    assert server.aborted == aborted
    before = len(server.asked), server.tokens
    await asyncio.sleep(0.1)
    assert (len(server.asked), server.tokens) == before


async def test_cancelling_a_task_aborts_its_candidates(remote: Make, slow: VllmServer) -> None:
    llm = remote(**long())
    tasks = [asyncio.create_task(llm.aalign(prompt)) for prompt in PROMPTS[:3]]
    await wait_until(lambda: len(slow.drafted) == 3 and slow.tokens > 6)
    for task in tasks:
        task.cancel()
    assert [type(e) for e in await asyncio.gather(*tasks, return_exceptions=True)] == [asyncio.CancelledError] * 3
    await assert_stopped(slow, 3)
    assert slow.tokens < 100


async def test_cancelling_one_leaves_the_others(remote: Make, slow: VllmServer) -> None:
    slow.pace = 0.002
    llm = remote()
    expected = await llm.aalign(PROMPT, seed=3)
    unwanted = asyncio.create_task(llm.aalign("w7", **long()))
    wanted = asyncio.create_task(llm.aalign(PROMPT, seed=3))
    await wait_until(lambda: slow.in_flight == 2)
    unwanted.cancel()
    assert (await wanted).token_ids == expected.token_ids
    await assert_stopped(slow, 1)


async def test_closing_a_stream_aborts(remote: Make, slow: VllmServer) -> None:
    llm = remote(**long(decoding=Sampling(chunk=3)))
    stream: Any = llm.align_stream("w7", seed=1, top_k=2)
    await asyncio.to_thread(next, stream)
    await wait_until(lambda: slow.in_flight > 0)
    stream.close()
    await assert_stopped(slow, 1)


async def test_leaving_an_async_stream_aborts(remote: Make, slow: VllmServer) -> None:
    llm = remote(**long(decoding=Sampling(chunk=3)))
    endless: Any = llm.aalign_stream("w7", seed=1, top_k=2)
    async with aclosing(endless) as stream:
        async for _ in stream:
            break
        await wait_until(lambda: slow.in_flight > 0)
    await assert_stopped(slow, 1)


async def test_a_timeout_aborts(remote: Make, server: VllmServer) -> None:
    llm = remote()
    await llm.aalign(PROMPT, seed=3)
    server.fail("hang")
    with pytest.raises(CardsTimeout, match=r"timeout=0\.1"):
        await llm.aalign(PROMPT, timeout=0.1)
    await assert_stopped(server, 1)


async def test_a_candidate_that_passes_ends_those_drafted_beside_it(remote: Make, slow: VllmServer) -> None:
    """With every first candidate kept, three of four are given up in each segment."""
    slow.pace = 0.002
    decoding = Cards(target_reward=-50.0, beta=0.7, boundary=FixedLength(length=5))
    llm = remote(decoding=decoding, engine=EngineSettings(device="cpu", width=4), top_k=2)
    answer = await llm.aalign("w7 w8", seed=2)
    await wait_until(lambda: slow.in_flight == 0)
    assert len(answer.segments) == answer.usage.drafts == 4
    assert answer.usage.lm_forwards == len(slow.drafted) == 16


async def test_closing_the_engine_aborts(remote: Make, slow: VllmServer) -> None:
    llm = remote(**long())
    task = asyncio.create_task(llm.aalign(PROMPT))
    await wait_until(lambda: slow.tokens > 2)
    await asyncio.to_thread(llm.close)
    with pytest.raises(EngineClosed):
        await task
    await assert_stopped(slow, 1)
    slow.pace = 0.0
    assert (await llm.aalign(PROMPT, seed=1, max_tokens=3)).text


@pytest.mark.usefixtures("no_waiting")
async def test_a_server_that_is_slow(remote: Make, server: VllmServer) -> None:
    llm = remote(model={"request_timeout": 0.1, "retries": 1})
    await llm.aalign(PROMPT, seed=3)
    server.fail("hang")
    before = len(server.drafted)
    with pytest.raises(ModelError, match=r"model 'served' .*request_timeout=0\.1 seconds.*Tries: 2"):
        await llm.aalign(PROMPT, seed=3)
    assert len(server.drafted) - before == 2
    await assert_stopped(server, 2)


# --- failures ---


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("kind", [500, 429, "killed"])
def test_what_may_pass_is_tried_again(remote: Make, server: VllmServer, kind: int | str) -> None:
    llm = remote()
    expected = llm.align(PROMPT, seed=3)
    before = len(server.drafted)
    server.fail(kind, times=2)
    answer = llm.align(PROMPT, seed=3)
    assert answer.token_ids == expected.token_ids
    assert len(server.drafted) - before == answer.usage.drafts + 2


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize(
    ("kind", "tries", "message"),
    [
        (500, 3, r"HTTP 500: .*its own words.* Tries: 3"),
        (429, 3, r"HTTP 429.*overloaded.* Tries: 3"),
        ("killed", 3, r"cannot be reached: RemoteProtocolError.* Tries: 3"),
        ("malformed", 1, r"answered '.*choi'.*Invalid JSON.*vLLM of 0\.11"),
        ("echo", 1, r"answered .*choices.*Field required.*vLLM of 0\.11"),
        (400, 1, r"HTTP 400: .*its own words"),
        (401, 1, r"HTTP 401: .*Set model\.api_key, or CARDS_VLLM_API_KEY"),
        (404, 1, r"HTTP 404: .*Check model\.base_url and model\.model"),
    ],
)
async def test_a_failure_harms_its_request_only(
    remote: Make, server: VllmServer, kind: int | str, tries: int, message: str
) -> None:
    llm = remote(model={"retries": 2})
    expected = await llm.aalign(PROMPT, seed=3)
    server.fail(kind, times=tries)
    with pytest.raises(ModelError, match=message):
        await llm.aalign("w7", seed=1)
    assert (await llm.aalign(PROMPT, seed=3)).token_ids == expected.token_ids
    assert (server.in_flight, server.aborted) == (0, 0)


def choice(**changed: Any) -> Callable[[dict[str, Any]], None]:
    """A completion whose one choice has other fields."""
    return lambda reply: reply["choices"][0].update(changed)


def log_p(values: list[Any]) -> Callable[[dict[str, Any]], None]:
    return lambda reply: reply["choices"][0]["logprobs"].update(token_logprobs=values)


def drafted(ids: list[int], **changed: Any) -> Callable[[dict[str, Any]], None]:
    """A completion of these tokens."""

    def spoil(reply: dict[str, Any]) -> None:
        choice(token_ids=ids, **changed)(reply)
        log_p([-1.0] * len(ids))(reply)

    return spoil


NO_COMPLETION: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no choice": (lambda reply: reply.update(choices=[]), r"choices: List should have at least 1 item"),
    "two choices": (lambda reply: reply.update(choices=reply["choices"] * 2), r"choices: List should have at most 1"),
    "nothing, cut": (choice(token_ids=[], finish_reason="length"), r"no token, and finish_reason 'length'"),
    "nothing, stopped": (choice(token_ids=[], finish_reason="stop"), r"no token, and finish_reason 'stop'"),
    "no reason": (choice(finish_reason=None), r"finish_reason: Input should be 'stop' or 'length'"),
    "aborted": (choice(finish_reason="abort"), r"finish_reason: Input should be 'stop' or 'length'"),
    "too few": (choice(token_ids=[7]), r"1 token ids and 6 log-probabilities"),
    "cut too early": (
        drafted([7]),
        r"1 tokens and finish_reason 'length' for max_tokens=6",
    ),
    "too many": (
        drafted([7] * 7),
        r"7 tokens and finish_reason 'length' for max_tokens=6",
    ),
    "no token": (choice(token_ids=[7] * 5 + [SEGMENT + 1]), r"token 49, and the tokenizer has 49"),
    "a negative token": (choice(token_ids=[7] * 5 + [-1]), r"token_ids: 5: .*greater than or equal to 0"),
    "words": (choice(token_ids=["7"] * 6), r"token_ids: 0: .*valid integer"),
    "no log-probability": (log_p([-1.0] * 5), r"6 token ids and 5 log-probabilities"),
    "log-probabilities of nobody": (log_p([None] * 6), r"token_logprobs: 0: .*valid number"),
    "text for log-probabilities": (log_p(["-1.0"] * 6), r"token_logprobs: 0: .*valid number"),
    "NaN": (log_p([-1.0, math.nan] * 3), r"token_logprobs: 1: .*finite"),
    "infinite": (log_p([-1.0, -math.inf] * 3), r"token_logprobs: 1: .*finite"),
    "logits": (log_p([-1.0, 3.5] * 3), r"log-probability 3\.5, above 0: .*--logprobs-mode"),
    "another end": (
        choice(finish_reason="stop", stop_reason=5, token_ids=[7] * 6), r"stop_reason 5, and token 7 is the last"
    ),
    "another prompt": (lambda reply: reply["usage"].update(prompt_tokens=3), r"3 prompt tokens, 0 cached, .* of 4"),
    "a cache of more": (
        lambda reply: reply["usage"]["prompt_tokens_details"].update(cached_tokens=5), r"4 prompt tokens, 5 cached"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", NO_COMPLETION)
def test_a_completion_that_is_none_ends_its_request(remote: Make, server: VllmServer, what: str) -> None:
    """At once, whatever it was asked for; and no other one."""
    spoil, message = NO_COMPLETION[what]
    llm = remote(decoding=Cards(target_reward=0.5, beta=0.3, boundary=FixedLength(length=6)), top_k=2)
    expected = llm.align(PROMPT, seed=3)
    before = len(server.drafted)
    server.spoil = spoil
    with pytest.raises(ModelError, match=rf"^model 'served' answered '.*{message}.*vLLM of 0\.11 or later\?$"):
        llm.align(PROMPT, seed=3)
    assert len(server.drafted) - before == 1
    server.spoil = None
    assert llm.align(PROMPT, seed=3).token_ids == expected.token_ids


@pytest.mark.parametrize("written", [0, 1])
def test_a_segment_that_ends_before_it_begins(remote: Make, server: VllmServer, written: int) -> None:
    """Without a token one would draft for ever; with too few, the law is not the one that was asked for."""
    llm = remote()
    llm.align(PROMPT, seed=3)
    before = len(server.drafted)
    server.spoil = drafted([7] * written + [SEGMENT], finish_reason="stop", stop_reason=SEGMENT)
    with pytest.raises(ModelError, match=rf"ended a segment of at least 2 tokens after {written}\..*EntropyStop"):
        llm.align(PROMPT, seed=3)
    assert len(server.drafted) - before == 1


def test_a_completion_has_a_limit(remote: Make, server: VllmServer) -> None:
    llm = remote(decoding=Sampling(chunk=4), max_tokens=4)
    server.spoil = lambda reply: reply.update(metrics=" " * (2**20 + 4 * 2**10))
    with pytest.raises(ModelError, match=rf"^model 'served' \({server.url}/v1/completions\) .*1,052,736 bytes"):
        llm.align(PROMPT, seed=3)
    server.spoil = lambda reply: reply.update(metrics=" " * 2**20)
    assert llm.align(PROMPT, seed=3).text


async def test_the_first_error_of_many_ends_the_rest(remote: Make, server: VllmServer) -> None:
    llm = remote(**long(model={"retries": 0}))
    await llm.aalign(PROMPT, max_tokens=2)
    server.pace, before = 0.01, len(server.drafted)
    several = asyncio.create_task(asyncio.to_thread(llm.align_batch, PROMPTS, top_k=2, seeds=range(8)))
    await wait_until(lambda: len(server.drafted) - before == 8)
    server.fail(400, times=1)
    with pytest.raises(ModelError, match="HTTP 400"):
        await asyncio.gather(several, llm.aalign("w7"))
    await asyncio.to_thread(llm.close)
    with pytest.raises(EngineClosed):
        await several
    await assert_stopped(server, 8)


def test_one_failure_of_a_batch_ends_it(remote: Make, server: VllmServer) -> None:
    llm = remote(**long(model={"retries": 0}, decoding=Sampling(chunk=10)))
    server.pace = 0.005
    server.fail(500, times=1)
    with pytest.raises(ModelError, match="HTTP 500"):
        llm.align_batch(PROMPTS, top_k=2, seeds=range(8))
    server.wait_until_idle()
    assert len(server.drafted) <= 8


def test_a_failing_reward_server_is_named(remote: Make, server: VllmServer) -> None:
    server.fail(404, path=CLASSIFY)
    with pytest.raises(RewardError, match=r"remote served at .*HTTP 404"):
        remote(reward=RemoteReward(url=server.url, protocol="classify", model="served")).align(PROMPT)
    server.wait_until_idle()


def test_a_server_that_is_not_there_yet(remote: Make, folder: str, server: VllmServer) -> None:
    """The next request meets it anew."""
    late = VllmServer(folder).start()
    late.die()
    llm = remote(model={"base_url": late.url})
    with pytest.raises(ModelError, match=rf"server at {late.url} cannot be reached: ConnectError.*model\.base_url"):
        llm.align(PROMPT)
    late.start()
    assert llm.align(PROMPT, seed=1).text
    llm.close()
    late.die()


def test_a_server_that_serves_another_model(remote: Make) -> None:
    with pytest.raises(ModelError, match=r"serves served, and not model\.model='other'"):
        remote(model={"model": "other"}).align(PROMPT)


def test_a_server_with_another_tokenizer(remote: Make, server: VllmServer) -> None:
    server.wrong_tokenizer = True
    with pytest.raises(ModelError, match=r"and tokenizer '.*drafting0' disagree: set model\.tokenizer"):
        remote().align(PROMPT)
    assert server.drafted == []


def test_prompts_that_do_not_fit(remote: Make) -> None:
    llm = remote()
    with pytest.raises(SettingsError, match=r"max_tokens=253 .*context is 256; the most that fits is 252"):
        llm.align(PROMPT, max_tokens=253)
    with pytest.raises(PromptError, match=r"256 tokens, and the model's context is 256"):
        llm.align(" ".join(["w7"] * 256))


def test_what_needs_a_local_model(remote: Make) -> None:
    schema = {"title": "It", "type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": schema}}
    llm = remote()
    for more in (
        {"grammar": Grammar.regex("w7")},
        {"response_format": schema},
        {"tools": [tool], "tool_choice": "required"},
        {"tools": [tool], "tool_choice": "look"},
    ):
        with pytest.raises(SettingsError, match=r"need a local model: .*tool_choice='auto'"):
            llm.align(PROMPT, **more)
    assert llm.align("w7", seed=1, tools=[tool], tool_choice="none").text
    assert llm.align(PROMPT, seed=1).text


# --- a server without the plug-in ---


def test_without_plugin_it_refuses(remote: Make, server: VllmServer, caplog: pytest.LogCaptureFixture) -> None:
    server.plugin = False
    llm = remote()
    for _ in range(2):
        with pytest.raises(ModelError, match=r"--logits-processors cards_integrations\.vllm_plugin:EntropyStop"):
            llm.align(PROMPT)
    assert server.drafted == []
    assert len(server.of(COMPLETIONS)) == 1
    assert [r.getMessage() for r in caplog.records if "EntropyStop" in r.getMessage()] == [
        "model 'served': no EntropyStop in the server; segments end by model.without_plugin='refuse'"
    ]


def test_without_plugin_segments_of_a_fixed_length(remote: Make, server: VllmServer) -> None:
    server.plugin = False
    boundary = Uncertainty(threshold=2.95, min_length=2, max_length=30)
    decoding = Cards(target_reward=0.5, beta=0.3, boundary=boundary)
    llm = remote(model={"without_plugin": "fixed_length", "fallback_length": 3}, decoding=decoding)
    answers = llm.align_batch(PROMPTS, seeds=range(8))
    for answer in answers:
        lengths = [len(segment.token_ids) for segment in answer.segments]
        assert lengths[:-1] == [3] * (len(lengths) - 1)
        assert lengths[-1] <= 3
        assert answer.finish_reason == "stop" or sum(lengths) == ROOM
    assert {asked.body["max_tokens"] for asked in server.drafted} == {3, 2}
    assert not any("vllm_xargs" in asked.body for asked in server.drafted)


def test_without_plugin_segments_end_at_punctuation(remote: Make, local: Make, server: VllmServer) -> None:
    """As with `Punctuation` of the same lengths."""
    server.plugin = False
    decoding = Cards(target_reward=0.5, beta=0.3, boundary=Uncertainty(threshold=0.1, min_length=2, max_length=7))
    same = Cards(target_reward=0.5, beta=0.3, boundary=Punctuation(min_length=2, max_length=7))
    prompts = [f"w{i} w{j}" for i in range(6, 46, 3) for j in (8, 21)]
    found = remote(model={"without_plugin": "punctuation"}, decoding=decoding, temperature=0).align_batch(prompts)
    expected = local(decoding=same, temperature=0).align_batch(prompts)
    assert [segments(answer) for answer in found] == [segments(answer) for answer in expected]
    ends = Counter(text[-1:] for answer in found for text in segments(answer)[:-1])
    assert sum(ends[mark] for mark in ".!?") > 0


# --- replicas ---


def both(replicas: list[VllmServer], **more: Any) -> dict[str, Any]:
    return {"base_url": tuple(f"{each.url}/v1" for each in replicas), **more}


def test_replicas_share_the_work_and_a_conversation_stays(remote: Make, two: list[VllmServer]) -> None:
    prompts = [f"w{i} w{j}" for i in range(6, 46, 4) for j in (8, 21)]
    answers = remote(model=both(two)).align_batch(prompts, seeds=range(len(prompts)))
    asked = [{tuple(a.body["prompt"][:2]) for a in each.drafted} for each in two]
    assert all(len(each) > 0 for each in asked)
    assert not asked[0] & asked[1]
    assert len(asked[0] | asked[1]) == len(prompts) == len(answers)


def test_one_replica_dies_on_the_way(remote: Make, two: list[VllmServer]) -> None:
    """All are answered, each once and as they would have been."""
    prompts = [f"w{i} w{j}" for i in range(6, 46, 5) for j in (8, 21)]
    expected = remote().align_batch(prompts, seeds=range(16))
    for each in two:
        each.pace = 0.002
    llm = remote(model=both(two), engine=EngineSettings(device="cpu", dtype="float32", width=2))
    told: list[int] = []

    def die() -> None:
        while len(two[0].drafted) < 20:
            threading.Event().wait(0.002)
        told.append(two[0].in_flight)
        two[0].die()

    killer = threading.Thread(target=die)
    killer.start()
    answers = llm.align_batch(prompts, seeds=range(16))
    killer.join()
    print(f"{told[0]} in flight when it died; {[len(each.drafted) for each in two]} asked")
    assert told[0] > 0
    assert [segments(answer) for answer in answers] == [segments(answer) for answer in expected]
    assert all(answer.usage.drafts == other.usage.drafts for answer, other in zip(answers, expected, strict=True))
    two[1].wait_until_idle()


@pytest.mark.usefixtures("no_waiting")
def test_all_replicas_die(remote: Make, two: list[VllmServer]) -> None:
    llm = remote(model=both(two, retries=2))
    llm.align(PROMPT, seed=1)
    for each in two:
        each.die()
    with pytest.raises(ModelError, match=r"cannot be reached: ConnectError.* Tries: 3"):
        llm.align(PROMPT, seed=1)
    for each in two:
        each.start()
    assert llm.align(PROMPT, seed=1).text


def test_one_of_two_is_there_at_the_start(remote: Make, two: list[VllmServer]) -> None:
    two[0].die()
    llm = remote(model=both(two))
    for seed, prompt in enumerate(PROMPTS):
        assert llm.align(prompt, seed=seed).finish_reason in ("stop", "length")


def test_one_of_two_has_no_plugin(remote: Make, two: list[VllmServer]) -> None:
    two[1].plugin = False
    with pytest.raises(ModelError, match="does not end segments by uncertainty"):
        remote(model=both(two)).align(PROMPT)


# --- keys and settings ---


def test_the_key_is_sent_and_never_shown(
    remote: Make, server: VllmServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    server.key = SECRET
    llm = remote(model={"api_key": SECRET})
    answer = llm.align(PROMPT, seed=3)
    assert {asked.key for asked in server.drafted} == {f"Bearer {SECRET}"}
    monkeypatch.setenv("CARDS_VLLM_API_KEY", f" {SECRET}\n")
    assert remote().align(PROMPT, seed=3).text == answer.text
    settings = CardsSettings(model=llm.model)
    shown = [
        *(repr(llm), str(llm.model), repr(llm.model), llm.model.model_dump_json(), settings.to_yaml(), repr(settings)),
        *(caplog.text, json.dumps(answer.to_dict()), answer._repr_html_(), repr(llm._get_ls_params())),
    ]
    assert [text for text in shown if SECRET in text] == []
    assert "HTTP Request" in caplog.text


def test_a_key_is_not_pickled() -> None:
    spec = VllmModel(base_url="http://host", model="served", api_key=SECRET)
    assert SECRET.encode() not in pickle.dumps(spec)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (MODELS, "echo"),
        (TOKENIZE, "echo"),
        (COMPLETIONS, "echo"),
        (MODELS, 401),
        (TOKENIZE, 401),
        (COMPLETIONS, 401),
    ],
)
def test_no_error_shows_the_key(
    remote: Make, server: VllmServer, caplog: pytest.LogCaptureFixture, path: str, kind: int | str
) -> None:
    """Whatever the server makes of it."""
    caplog.set_level(logging.DEBUG)
    server.fail(kind, path=path)
    with pytest.raises(ModelError) as caught:
        remote(model={"api_key": SECRET}, decoding=Sampling()).align(PROMPT)
    assert SECRET not in f"{caught.value} {caught.value.__cause__!r} {caplog.text}"


def test_a_wrong_key_says_the_mend(remote: Make, server: VllmServer) -> None:
    server.key = "another"
    with pytest.raises(ModelError, match=r"HTTP 401.*\*\*\*\*.*Set model\.api_key, or CARDS_VLLM_API_KEY"):
        remote(model={"api_key": SECRET}).align(PROMPT)


@pytest.mark.parametrize("wrong", [{"retries": -1}, {"model": ""}, {"rate": 3}, {"base_url": ()}])
def test_no_error_of_the_settings_shows_the_key(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:
        VllmModel(**{"base_url": "http://host", "model": "served", "api_key": SECRET, **wrong})
    assert SECRET not in str(caught.value)
    with pytest.raises(ValueError) as told:
        CardsLLM(model={"kind": "vllm", "base_url": "http://host", "model": "served", "api_key": SECRET, **wrong})
    assert SECRET not in str(told.value)


def test_settings_that_are_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = VllmModel(
        base_url=("http://one:8000/v1/", "https://two/v1"), model="meta/x", tokenizer="meta/x", retries=0,
        without_plugin="punctuation", sentinel=5, request_timeout=9, concurrency=7,
    )  # fmt: skip
    assert given.urls == ("http://one:8000", "https://two")
    assert VllmModel(base_url="http://one:8000/v1", model="x").urls == ("http://one:8000",)
    file = tmp_path / "cards.yaml"
    file.write_text(CardsSettings(model=given).to_yaml())
    assert CardsSettings.from_yaml(file).model == given
    assert CardsLLM.from_settings(file).model == given
    monkeypatch.setenv("CARDS_MODEL", given.model_dump_json())
    assert CardsSettings().model == given
    assert CardsLLM().model == given


def test_a_key_that_was_left_out_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "cards.yaml"
    file.write_text(CardsSettings(model=VllmModel(base_url="http://one", model="x", api_key=SECRET)).to_yaml())
    with pytest.raises(ValueError, match=r"give the key again.*CARDS_VLLM_API_KEY"):
        CardsSettings.from_yaml(file)


def test_an_address_with_a_password_is_refused() -> None:
    with pytest.raises(ValueError, match="must not carry a password") as caught:
        VllmModel(base_url="http://me:sesame@host", model="x")
    assert "sesame" not in str(caught.value)


# --- the server itself ---

RECORDED = Path(__file__).parent / "vllm_recorded.json"


def shape(value: Any) -> Any:
    """Keys and types; of a list, those of its first."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value[:1]]
    return type(value).__name__


async def test_the_server_of_these_tests_drafts_as_the_model_does(server: VllmServer, folder: str) -> None:
    """Greedy: the tokens of `generate`."""
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    async with httpx.AsyncClient() as client:
        for ids in ([9, 20, 31], [7], [40, 12]):
            body = {"model": "served", "prompt": ids, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
            reply = (await client.post(server.url + COMPLETIONS, json=body)).json()
            generated = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
            assert reply["choices"][0]["token_ids"] == generated.tolist()


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({"cards_threshold": "no number"}, 400),
        ({"cards_threshold": None}, 400),
        ({"cards_threshold": 1}, 400),
        ({"cards_threshold": 1, "cards_sentinel": -1}, 400),
        ({"cards_threshold": 1, "cards_sentinel": SEGMENT, "cards_measure": "x"}, 400),
        ({"cards_threshold": 1, "cards_sentinel": SEGMENT, "cards_min_length": 1.5}, 400),
        ({"cards_threshold": 1, "cards_sentinel": SEGMENT}, 200),
        ({"cards_sentinel": "no number"}, 200),
        ({}, 200),
    ],
)
async def test_the_server_of_these_tests_refuses_what_cannot_be_meant(
    server: VllmServer, asked: dict[str, Any], status: int
) -> None:
    body = {"model": "served", "prompt": [7], "max_tokens": 1, "vllm_xargs": asked}
    async with httpx.AsyncClient() as client:
        told = [(await client.post(server.url + COMPLETIONS, json=body)).status_code]
        server.plugin = False
        told.append((await client.post(server.url + COMPLETIONS, json=body)).status_code)
    assert told == [status, 200]


def exchanges() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(RECORDED.read_text())["exchanges"] if RECORDED.exists() else []
    return found


@pytest.mark.parametrize("exchange", exchanges(), ids=lambda exchange: exchange["name"])
async def test_the_server_of_these_tests_answers_as_a_real_one(server: VllmServer, exchange: dict[str, Any]) -> None:
    """Keys and types of the answers that were recorded from vLLM, for the same requests."""
    asked = exchange["request"]
    if asked and asked["model"] != "other":
        asked = {**asked, "model": "served"}
    async with httpx.AsyncClient() as client:
        reply = await client.request(exchange["method"], server.url + exchange["path"], json=asked)
    assert reply.status_code == exchange["status"]
    if not exchange["response"]:
        assert reply.text == exchange["response"]
        return
    found, expected = reply.json(), exchange["response"]
    for each in (found, expected):
        for choice in each.get("choices", ()):
            stop = choice.pop("finish_reason"), type(choice.pop("stop_reason")).__name__
            assert stop in {("stop", "int"), ("stop", "NoneType"), ("stop", "str"), ("length", "NoneType")}
            logprobs = choice["logprobs"]
            assert {len(values) for values in logprobs.values()} == {len(choice["token_ids"])}
            del logprobs["top_logprobs"]
    assert shape(found) == shape(expected)
    if "error" in expected and exchange["path"] == COMPLETIONS:
        words = expected["error"]["message"].split()[:4]
        assert found["error"]["message"].split()[:3] == words[:3]


def test_what_was_recorded_is_right() -> None:
    """A real server's completions pass the checks that every completion has to pass."""
    checked = 0
    for exchange in exchanges():
        asked, reply = exchange["request"], exchange["response"]
        if asked and asked.get("return_token_ids") and exchange["status"] == 200:
            found = Completion.model_validate_json(json.dumps(reply))
            assert found.fault(len(asked["prompt"]), asked["max_tokens"], 48) is None, exchange["name"]
            checked += 1
    assert checked >= 10 or not RECORDED.exists()


def test_what_was_recorded_ends_in_all_ways() -> None:
    """A token, the end of sequence, a string, and the length."""
    if not RECORDED.exists():
        pytest.skip("nothing was recorded")
    choices = [choice for each in exchanges() for choice in (each["response"] or {}).get("choices", ())]
    ends = {(choice["finish_reason"], type(choice["stop_reason"]).__name__) for choice in choices}
    assert ends == {("stop", "int"), ("stop", "NoneType"), ("stop", "str"), ("length", "NoneType")}


async def test_the_server_of_these_tests_ends_where_the_real_one_did(server: VllmServer) -> None:
    """The same reasons for what a request alone decides."""
    body = {"model": "served", "prompt": [9, 20, 31], "temperature": 0, "return_token_ids": True, "logprobs": 0}
    rise = {"cards_threshold": 0.0, "cards_min_length": 2, "cards_sentinel": SEGMENT}
    async with httpx.AsyncClient() as client:

        async def choice(**more: Any) -> dict[str, Any]:
            found = (await client.post(server.url + COMPLETIONS, json={**body, "max_tokens": 6, **more})).json()
            return dict(found["choices"][0])

        plain = await choice()
        risen = await choice(stop_token_ids=[SEGMENT], vllm_xargs=rise)
        stopped = await choice(stop=[plain["text"][5:9]])
        beyond = await choice(vllm_xargs={**rise, "cards_sentinel": 4000})
    assert (plain["finish_reason"], plain["stop_reason"], len(plain["token_ids"])) == ("length", None, 6)
    assert (risen["finish_reason"], risen["stop_reason"]) == ("stop", SEGMENT)
    assert risen["token_ids"] == [*plain["token_ids"][:2], SEGMENT]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", plain["text"][5:9])
    assert stopped["text"] == plain["text"].split(plain["text"][5:9])[0]
    assert stopped["token_ids"] == plain["token_ids"][: len(stopped["token_ids"])]
    assert beyond == plain
