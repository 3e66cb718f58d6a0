"""Models with recurrent or convolution layers: states instead of keys, and everything as with other models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiny
import torch
from conftest import Start
from internals import caches, language_model
from speculator import Watch
from test_kv_memory import Texts, text
from test_preemption import METHODS, asked, assert_equal
from test_reference import Cases, assert_same, methods, written_naively
from transformers import AutoModelForCausalLM

from cards_integrations.chat.grammar import Grammar
from cards_integrations.decoding import BestOfN, Cards, Decoding, FixedLength, Sampling
from cards_integrations.engine import Engine, Request
from cards_integrations.errors import ModelError
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward, ImplicitReward
from cards_integrations.transformer.attention import AttentionMetadata
from cards_integrations.transformer.cuda_graphs import Computed
from cards_integrations.transformer.flat_batch import ForwardInput

pytestmark = pytest.mark.slow

BUDGET = 250_000
TARGETS = {"qwen3_next": 0.5, "jamba": 0.5}


@pytest.fixture(scope="module", params=[*TARGETS])
def cases(request: pytest.FixtureRequest, models: Callable[..., str]) -> Cases:
    folders = models(request.param), models(request.param, classifier=True)
    return written_naively(*folders, "w9 w20 w31 w5", methods(TARGETS[request.param])[:12:3], 20, Sampler(top_k=40))


def test_the_paper_s_texts(cases: Cases, start: Start) -> None:
    engine = start(cases.model)
    assert_same([engine.run(request) for request in cases.requests], cases)
    assert_same(engine.run_many(cases.requests), cases)
    assert_all_given_back(engine)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, word = tmp_path_factory.mktemp("hybrid"), tiny.words(eos_token=None)
    tiny.save(folder / "model", tiny.causal("falcon_h1", eos_token_id=None, max_position_embeddings=4096), word)
    tiny.save(folder / "other", tiny.causal("falcon_h1", seed=3, eos_token_id=None), word)
    tiny.save(folder / "judge", tiny.classifier(max_position_embeddings=4096), word)
    tiny.save(folder / "short", tiny.classifier("qwen3_next", max_position_embeddings=64), word)
    tiny.save(folder / "bytes", tiny.causal("falcon_h1", vocab_size=280), tiny.byte_pairs())
    tiny.save(folder / "letters", tiny.classifier("qwen3_next", vocab_size=281), tiny.byte_pairs(size=281))
    return folder


def assert_all_given_back(engine: Engine) -> None:
    """No state outlives its path; finished texts have copies of their own."""
    for cache in caches(engine):
        assert cache.pool is None or not any(cache.pool.states)


@pytest.mark.parametrize("decoding", METHODS, ids=lambda method: method.method)
def test_texts_are_the_same_in_company_and_after_preemption(folder: Path, start: Start, decoding: Decoding) -> None:
    reward = ClassifierReward(model=str(folder / "judge")) if decoding.needs_reward else None
    requests = asked(decoding, reward, 3, max_tokens=30)
    roomy, narrow = start(str(folder / "model"), width=4), start(str(folder / "model"), width=4, kv_memory=BUDGET)
    watch = Watch(narrow)
    alone = [roomy.run(request) for request in requests]
    assert_equal(roomy.run_many(requests), alone)
    assert_equal(narrow.run_many(requests), alone)
    assert watch.bytes <= BUDGET
    assert_all_given_back(roomy)
    assert_all_given_back(narrow)


@torch.inference_mode()
def log_p(folder: str, prompt: list[int], answer: Sequence[int]) -> float:
    """In nats, by a plain forward."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    logits = model(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1)[range(len(answer)), list(answer)].sum())


def test_the_log_p_of_two_recurrent_models(folder: Path, start: Start) -> None:
    tuned, base = str(folder / "other"), str(folder / "model")
    decoding = Cards(target_reward=50.0, acceptance="hard", max_rejections=3, boundary=FixedLength(length=5))
    engine = start(base, width=4)
    requests = asked(decoding, ImplicitReward(tuned=tuned, base=base), 3, max_tokens=20)
    answers = engine.run_many(requests)
    assert_equal([engine.run(request) for request in requests], answers)
    for answer in answers:
        both = [log_p(each, list(answer.prompt_ids), answer.token_ids) for each in (tuned, base)]
        assert answer.segments[-1].reward == pytest.approx(0.1 * (both[0] - both[1]), abs=1e-3)
    assert_all_given_back(engine)


@pytest.mark.parametrize("kind", ["short", "letters"])
def test_rewards_on_recurrent_bodies(folder: Path, start: Start, kind: str) -> None:
    """With a window that gets full, and with tokens that merge where candidates meet."""
    reward = ClassifierReward(model=str(folder / kind))
    decoding = Cards(target_reward=50.0, acceptance="hard", max_rejections=3, boundary=FixedLength(length=5))
    engine = start(str(folder / ("bytes" if kind == "letters" else "model")), width=4)
    requests = asked(decoding, reward, 3, prompt=45 if kind == "short" else 12, max_tokens=30)
    answers = engine.run_many(requests)
    assert_equal([engine.run(request) for request in requests], answers)
    for request, answer in zip(requests, answers, strict=True):
        if kind == "letters":
            assert engine.score(reward, request.prompt, [answer.text]) == [pytest.approx(answer.reward, abs=1e-4)]
    assert_all_given_back(engine)


def test_a_grammar_holds(folder: Path, start: Start) -> None:
    engine = start(str(folder / "bytes"))
    grammar = Grammar.regex("[a-z ]{20}")
    for answer in engine.run_many(
        asked(BestOfN(n=3), ClassifierReward(model=str(folder / "letters")), grammar=grammar)
    ):
        assert len(answer.text) == 20


def test_a_chat_that_goes_on_is_not_read_again(folder: Path, start: Start) -> None:
    """The states after a prompt and after its answer are kept."""
    engine, grammar = start(str(folder / "bytes")), Grammar.regex("[ab]{20}")
    beginning = "the cat sat on the mat and the dog ran away. " * 8 + "the end."
    first = engine.run(Request(beginning, Sampling(), max_tokens=30, seed=1, grammar=grammar))
    follow = Request(beginning + " and then", Sampling(), max_tokens=8, seed=2)
    again = engine.run(follow)
    assert 0 < again.usage.cached_tokens <= first.usage.prompt_tokens
    fresh = start(str(folder / "bytes"), prefix_reuse=False).run(follow)
    assert again.token_ids == fresh.token_ids
    assert again.log_likelihood == pytest.approx(fresh.log_likelihood, abs=1e-3)


def test_a_candidate_s_state_counts_as_memory(folder: Path, start: Start) -> None:
    engine = start(str(folder / "model"))
    cache = language_model(engine).transformer.cache
    watch = Watch(engine)
    engine.run(Request("w9 w20", BestOfN(n=4), ClassifierReward(model=str(folder / "judge")), max_tokens=8))
    assert cache.bytes_per_state > 0
    assert watch.bytes >= 5 * cache.bytes_per_state


def test_a_text_is_not_kept_at_the_cost_of_its_own_beginning() -> None:
    """Whose states count, too: what followed would be known as the state of another text."""
    ids = text(0, 170)
    for states in range(4):
        texts = Texts(tiny.causal("falcon_h1"))
        for end in (100, 130):
            texts.read(ids[:end])
        tree = texts.cache.open()
        texts.memory.recall(tree, ids)
        texts.append(tree, ids[len(tree.ids) :])
        size = len(ids) * texts.cache.bytes_per_token + (2 + states) * texts.cache.bytes_per_state
        texts.memory.limit = texts.cache.bytes + size
        texts.memory.keep(tree)
        texts.cache.close(tree)
        assert texts.memory.used <= texts.memory.limit
        texts.memory.limit = 2**40
        for other in (ids[:140], ids[:101] + text(1, 20)):
            tree = texts.cache.open()
            texts.memory.recall(tree, other)
            assert texts.error(other, texts.append(tree, other[len(tree.ids) :])) < 1e-3
            texts.cache.close(tree)


def test_a_model_that_fails_in_the_middle_of_single_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on; when all have failed, no more is tried, and what went before is given back."""
    texts = Texts(tiny.causal("jamba"))
    assert texts.transformer.stepwise
    branches = [texts.cache.open().branch() for _ in range(2)]
    texts.logits([ForwardInput(branch, text(0, 9)) for branch in branches])
    run, steps = texts.transformer._logits.run, iter(range(100))

    def fails(tensors: dict[str, torch.Tensor], metadata: AttentionMetadata) -> Computed:
        if next(steps) > 0:
            raise ValueError
        return run(tensors, metadata)

    monkeypatch.setattr(texts.transformer._logits, "run", fails)
    found = texts.transformer.logits([ForwardInput(branch, text(1, 4)) for branch in branches])
    assert all(isinstance(each, ModelError) for each in found)
    assert next(steps) == 4  # a step that works, one that fails, and its halves
    for branch in branches:
        texts.cache.close(branch.tree)
    assert texts.cache.pool is not None
    assert not any(texts.cache.pool.states)


def test_a_recalled_state_is_given_back_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, ids = Texts(tiny.causal("falcon_h1")), text(0, 100)
    texts.read(ids)
    tree = texts.cache.open()

    def fails(*args: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(texts.cache, "write", fails)
    with pytest.raises(torch.OutOfMemoryError):
        texts.memory.recall(tree, [*ids, 5])
    texts.cache.close(tree)
    assert texts.cache.pool is not None
    assert not any(texts.cache.pool.states)
