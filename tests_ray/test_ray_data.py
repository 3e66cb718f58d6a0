"""The example for Ray Data, with workers of a local Ray and a tiny model; `make test-ray`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray_data
import tiny

from cards_integrations import CardsLLM
from cards_integrations.decoding import Cards, FixedLength
from cards_integrations.engine import EngineSettings
from cards_integrations.rewards import ClassifierReward
from cards_integrations.settings import CardsSettings

ROOT = Path(__file__).parent.parent
PROMPTS = [{"prompt": f"w{i} w{j}", "seed": 10 * i + j} for i in range(6, 11) for j in (20, 31)]
PATHS = os.pathsep.join(str(ROOT / folder) for folder in (".", "tests", "cookbook"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models")
    causal = tiny.save(folder / "causal", tiny.causal(), tiny.words())
    judge = tiny.save(folder / "judge", tiny.classifier(), tiny.words())
    settings = CardsSettings(
        model=causal,
        reward=ClassifierReward(model=judge, prompt_format="{prompt} {response}"),
        decoding=Cards(target_reward=0.5, beta=0.3, boundary=FixedLength(length=4)),
        max_tokens=12,
        engine=EngineSettings(device="cpu", dtype="float32", width=1),
    )
    path = folder / "cards.yaml"
    path.write_text(settings.to_yaml())
    return str(path)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    environment = {"PYTHONPATH": PATHS, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": environment}, object_store_memory=10**8)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def expected(config: str) -> dict[int, tuple[str, int]]:
    """By seed: what this process answers."""
    with CardsLLM.from_settings(config) as llm:
        answers = llm.align_batch([each["prompt"] for each in PROMPTS], seeds=[each["seed"] for each in PROMPTS])
    return {answer.seed: (answer.text, answer.usage.completion_tokens) for answer in answers}


def by_seed(rows: list[dict[str, Any]]) -> dict[int, tuple[str, int]]:
    assert sorted(row["seed"] for row in rows) == sorted(each["seed"] for each in PROMPTS)
    return {row["seed"]: (row["answer"], row["tokens"]) for row in rows}


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("workers", "batch_size"), [(1, 64), (2, 3)])
def test_answers_are_those_of_one_process(
    config: str, expected: dict[int, tuple[str, int]], workers: int, batch_size: int
) -> None:
    """Whatever the batches and whoever writes them; and each prompt is answered once."""
    rows = ray_data.align(ray.data.from_items(PROMPTS), config, workers, batch_size=batch_size).take_all()
    assert by_seed(rows) == expected
    assert all(isinstance(row["reward"], float) for row in rows)
    assert {row["prompt"] for row in rows} == {each["prompt"] for each in PROMPTS}


@pytest.mark.usefixtures("cluster")
def test_a_batch_that_fails_says_why(config: str) -> None:
    long = [{"prompt": " ".join(["w7"] * 300), "seed": 1}]
    with pytest.raises(Exception, match="the model's context is 256"):
        ray_data.align(ray.data.from_items(long), config).take_all()


def test_from_the_command_line(config: str, expected: dict[int, tuple[str, int]], tmp_path: Path) -> None:
    given, answers = tmp_path / "in.jsonl", tmp_path / "out"
    given.write_text("".join(json.dumps(each) + "\n" for each in PROMPTS))
    ray.shutdown()
    done = subprocess.run(
        [sys.executable, ROOT / "cookbook" / "ray_data.py", given, answers, "--config", config],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": PATHS, "HF_HUB_OFFLINE": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for file in answers.glob("*.json") for line in file.read_text().splitlines()]
    assert by_seed(rows) == expected
