"""Rope types that go by the length of a text: each text is read by its own, whoever is beside it, also when it grows."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import internals
import naive
import pytest
import reference
import tiny
import torch
from conftest import Start
from speculator import Eager, Watch
from transformers import DynamicCache

from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.decoding import BestOfN, Cards, Decoding, FixedLength, Particles, Sampling, Uncertainty
from cards_integrations.engine import Request
from cards_integrations.errors import ModelError, PromptError, SettingsError
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward, Conversation, ImplicitReward, Response
from cards_integrations.rewards.base import scores
from cards_integrations.rewards.scorers.head import Head
from cards_integrations.rewards.scorers.input_format import InputFormat
from cards_integrations.rewards.scorers.rescoring import RescoringClassifier
from cards_integrations.trace import Alignment, Usage
from cards_integrations.transformer import exact, forward
from cards_integrations.transformer.rope import reads_again, rope_switch

SWITCH, ROOM = 32, 24
SHORT, GROWING, LONG = 3, 20, 60  # tokens of prompts: with an answer below the switch, across it, beyond it
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "factor": 8.0,
}
OTHERS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": SWITCH},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}
TABLE = [*OTHERS, "phi3", "phi3 with a window", "phimoe", "llama", "qwen3", "gemma3_text"]
GREEDY, DRAWN = Sampler(temperature=0), Sampler(temperature=1.0)
CARDS = Cards(target_reward=1.0, beta=0.4, boundary=Uncertainty(threshold=2.95, min_length=2, max_length=8))


def words(count: int, seed: int = 0) -> str:
    return " ".join(f"w{i}" for i in random.Random(seed).choices(range(6, 48), k=count))


def options(kind: str, switch: int = SWITCH) -> tuple[str, dict[str, Any]]:
    """A family, and its config."""
    if kind in OTHERS:
        original = {"original_max_position_embeddings": SWITCH} if kind == "llama3" else {}
        size = {"max_position_embeddings": 96} if kind == "dynamic" else {}
        return "llama", {"rope_parameters": {**OTHERS[kind], **original, "rope_theta": 10000.0}, **size}
    scaling = {**LONGROPE, "original_max_position_embeddings": switch}
    if kind == "gemma3_text":
        scaling = {"full_attention": scaling, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    phi = {"original_max_position_embeddings": switch, "sliding_window": None}
    if kind == "phimoe":
        phi |= {"num_local_experts": 2}
        scaling |= {"short_mscale": 1.1, "long_mscale": 1.5}
    return kind.split()[0], {
        **(phi if kind in ("phi3", "phimoe") else {"original_max_position_embeddings": switch} if "phi" in kind else {}),
        "rope_parameters": scaling,
    }


def causal(kind: str, switch: int = SWITCH, **more: Any) -> Any:
    family, config = options(kind, switch)
    return tiny.causal(family, eos_token_id=None, **{**config, **more})


def classifier(kind: str, **more: Any) -> Any:
    family, config = options(kind)
    return tiny.classifier(family, **config, **more)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`made("phi3")` is the folder of a model whose texts do not end."""
    known: dict[Any, str] = {}

    def folder(kind: str, maker: Callable[..., Any] = causal, **more: Any) -> str:
        key = (kind, maker, *more.items())
        if key not in known:
            tokenizer = tiny.words(eos_token=None)
            known[key] = tiny.save(tmp_path_factory.mktemp("rope"), maker(kind, **more), tokenizer)
        return known[key]

    return folder


def next_logits(model: Any, prompt: Sequence[int]) -> Callable[[list[int]], torch.Tensor]:
    """What the family's own `generate` draws from: Phi-3 reads again what has grown long, others go on."""

    @torch.inference_mode()
    def after(ids: list[int]) -> torch.Tensor:
        if "phi" in model.config.model_type or not rope_switch(model.config):
            return model(torch.tensor([ids])).logits[0, -1]
        cache = DynamicCache(config=model.config)
        found = model(torch.tensor([prompt]), past_key_values=cache).logits
        for token in ids[len(prompt) :]:
            found = model(torch.tensor([[token]]), past_key_values=cache).logits
        return found[0, -1]

    return after


def greedily(model: Any, prompt: list[int], tokens: int) -> tuple[list[int], float]:
    """The tokens, and their log p in nats."""
    after, ids, log_p = next_logits(model, prompt), list(prompt), 0.0
    for _ in range(tokens):
        logits = after(ids).log_softmax(-1)
        ids.append(int(logits.argmax()))
        log_p += float(logits.max())
    return ids[len(prompt) :], log_p


def prompt_ids(prompt: str) -> list[int]:
    return tiny.words(eos_token=None)(prompt)["input_ids"]


def asked(count: int, seed: int = 0, **more: Any) -> Request:
    return Request(words(count, seed), Sampling(), sampler=GREEDY, max_tokens=ROOM, seed=seed, **more)


@pytest.mark.parametrize("kind", TABLE)
def test_a_text_is_the_same_alone_beside_others_and_growing(kind: str, made: Callable[..., str], start: Start) -> None:
    engine, model = start(made(kind)), causal(kind)
    table = [asked(SHORT, 1), asked(GROWING, 2), asked(LONG, 3), asked(SHORT, 4), asked(SWITCH, 5), asked(SWITCH + 1, 6)]
    written = [*map(engine.run, table), *engine.run_many(table), *engine.run_many(table[::-1])[::-1]]
    for request, found in zip(table * 3, written, strict=True):
        expected, log_p = greedily(model, prompt_ids(str(request.prompt)), ROOM)
        assert list(found.token_ids) == expected
        assert found.log_likelihood == pytest.approx(log_p, abs=1e-4)
    assert engine.inspect().idle


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_the_family_s_own_generate_is_what_is_meant(kind: str, made: Callable[..., str], start: Start) -> None:
    engine, model = start(made(kind)), causal(kind)
    assert reads_again(model, SWITCH) == (kind == "phi3")
    texts = set()
    for count in (GROWING, SWITCH - 1, SWITCH, SWITCH + 1, LONG):
        request = asked(count, count)
        ids = torch.tensor([prompt_ids(str(request.prompt))])
        plain = model.generate(ids, max_new_tokens=ROOM, do_sample=False, attention_mask=torch.ones_like(ids))
        found = engine.run(request)
        assert list(found.token_ids) == plain[0, count:].tolist()
        texts.add(found.token_ids)
    assert len(texts) == 5


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_the_frequencies_matter_here(kind: str) -> None:
    ids = torch.tensor([prompt_ids(words(LONG))])
    one, other = (causal(kind, switch)(ids).logits[0, -1] for switch in (SWITCH, 128))
    assert float((one - other).abs().max()) > 0.1


# --- with a method and a reward ---


def by_the_paper(kind: str, prompt: str, seed: int, judge: Any, method: Cards = CARDS) -> reference.Reference:
    model, ids = causal(kind), prompt_ids(prompt)
    loop = reference.plain(model, tiny.words(), judge, ids, temperature=1.0)
    loop.next_logits, loop.eos = next_logits(model, ids), -1
    loop.expected = loop.generate(ids, method, ROOM, seed)  # type: ignore[attr-defined]
    return loop


def assert_same(found: Alignment, expected: Any) -> None:
    assert list(found.token_ids) == expected.expected
    for segment, drafts in zip(found.segments, expected.segments, strict=True):
        assert [list(draft.token_ids) for draft in segment.drafts] == [draft.ids for draft in drafts]
        assert [draft.reward for draft in segment.drafts] == pytest.approx([d.reward for d in drafts], abs=1e-4)


def guided(made: Callable[..., str], reward: str, method: Decoding = CARDS, seeds: int = 6) -> list[Request]:
    judge = ClassifierReward(model=made(reward, classifier), prompt_format="{prompt} {response}")
    counts = [12, GROWING, 26, SWITCH, 15, LONG]
    return [
        Request(words(counts[seed % 6], seed), method, judge, DRAWN, ROOM, seed=seed, timeout=100)
        for seed in range(seeds)
    ]


@pytest.mark.parametrize("reward", ["phi3", "llama"])
@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_guided_texts_are_those_of_the_paper(
    kind: str, reward: str, made: Callable[..., str], start: Start
) -> None:
    requests, judge = guided(made, reward), classifier(reward)
    expected = [by_the_paper(kind, str(request.prompt), request.seed or 0, judge) for request in requests]
    assert any(len(drafts) > 2 for each in expected for drafts in each.segments)
    for width in (1, "auto"):
        engine = start(made(kind), width=width)
        for found in ([engine.run(request) for request in requests], engine.run_many(requests)):
            for one, other in zip(found, expected, strict=True):
                assert_same(one, other)
        assert engine.inspect().idle
    engine = start(made(kind))
    eager = Eager(engine, most=40, wait=3)
    for one, other in zip(engine.run_many(requests), expected, strict=True):
        assert_same(one, other)
    assert eager.adopted
    internals.assert_idle(engine)
