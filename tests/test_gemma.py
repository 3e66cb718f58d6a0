"""Real weights of a base model, Gemma 3 270M as a 4-bit GGUF file, end to end (`make test-models`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cards_integrations.chat.grammar import Grammar
from cards_integrations.decoding import BestOfN, Cards, Sampling
from cards_integrations.engine import Engine, EngineSettings, Request
from cards_integrations.models.local.resolve import resolve_model
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward, FunctionReward, JudgeReward

FILE = os.environ.get("CARDS_GEMMA_GGUF", "")
PROMPT = "The capital of France is"

pytestmark = [pytest.mark.models, pytest.mark.skipif(not FILE, reason="CARDS_GEMMA_GGUF names no file")]


@pytest.fixture(scope="module")
def gemma() -> Iterator[Engine]:
    engine = Engine(LocalModel(model=FILE), EngineSettings(device="cpu", dtype="float32"))
    yield engine
    engine.close()


def test_it_writes_what_transformers_writes(gemma: Engine) -> None:
    answer = gemma.run(Request(PROMPT, Sampling(), sampler=Sampler(temperature=0), max_tokens=12))
    folder = resolve_model(FILE)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    written = plain.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    assert list(answer.token_ids) == written[: len(answer.token_ids)]


def test_it_is_guided(gemma: Engine) -> None:
    """By a function, by its own judgement, and with a grammar."""
    longer = FunctionReward(function=lambda prompt, responses: [float(len(response)) for response in responses])
    guided = gemma.run(Request(PROMPT, Cards(target_reward=60.0), longer, max_tokens=24, seed=1))
    assert guided.reward == len(guided.text)
    judged = gemma.run(Request(PROMPT, BestOfN(n=3), JudgeReward(words=("yes", "no")), max_tokens=8, seed=1))
    assert judged.reward is not None
    number = gemma.run(Request("2 + 2 =", Sampling(), max_tokens=4, seed=1, grammar=Grammar.regex("[0-9]{1,3}")))
    assert number.text.strip().isdigit()


def test_it_is_scored(gemma: Engine, shared_models: Path) -> None:
    """By a classifier with another tokenizer."""
    reward = ClassifierReward(model=str(shared_models / "rm-sentiment-stories260k"))
    good, bad = gemma.score(reward, "The day was", [" happy, and all smiled.", " sad, and all cried."])
    assert good != bad
    best = gemma.run(Request("Once upon a time", BestOfN(n=4), reward, max_tokens=16, seed=1))
    assert best.reward == max(draft.reward for draft in best.segments[0].drafts if draft.reward is not None)
