"""A reward, a decoding method and a language model of another package: a few lines each, and really installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

OUTSIDE = Path(__file__).parent / "outside"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, installed by pip into a folder of its own, without a network."""
    pytest.importorskip("pip")
    source, target = tmp_path_factory.mktemp("source") / "outside", tmp_path_factory.mktemp("site")
    shutil.copytree(OUTSIDE, source)  # setuptools builds in place
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps"]
    subprocess.run(
        [*command, "--disable-pip-version-check", "--quiet", "--target", str(target), str(source)], check=True
    )
    return target


def run(code: str, installed: Path, *arguments: str) -> dict[str, Any]:
    """What the code prints, as JSON, in a process that finds the package."""
    path = os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


@pytest.mark.parametrize(("file", "most"), [("reward", 25), ("method", 25), ("backend", 80)])
def test_it_takes_few_lines(file: str, most: int) -> None:
    assert len((OUTSIDE / "cards_outside" / f"{file}.py").read_text(encoding="utf-8").splitlines()) <= most


GUIDED = """
import json, sys
from dataclasses import asdict
from cards_integrations import CardsLLM, CardsSettings
from cards_integrations.decoding import METHODS
from cards_integrations.rewards import REWARDS

near = []
for wrong in ({"reward": {"kind": "brevty"}}, {"decoding": "clim"}):
    try:
        CardsSettings(**wrong)
    except ValueError as error:
        near.append(str(error))
known = ["brevity" in REWARDS, "climb" in METHODS, "cards_outside" in sys.modules]
settings = CardsSettings.from_yaml(sys.argv[1])
with CardsLLM.from_settings(settings) as llm:
    answer = llm.align("w6")
    print(json.dumps({
        "near": near,
        "known": known,
        "classes": [f"{type(each).__module__}.{type(each).__qualname__}" for each in (llm.reward, llm.decoding)],
        "again": CardsSettings(**json.loads(settings.model_dump_json())) == settings,
        "scores": llm.score("w6", ["w7 w8 w9", ""]),
        "method": answer.method,
        "text": answer.text,
        "segments": [asdict(segment) for segment in answer.segments],
        "langchain": llm.invoke("w6").content,
        "llama_index": llm.complete("w6").text,
    }))
"""


def test_a_reward_and_a_method_from_a_settings_file(
    installed: Path, models: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "cards.yaml"
    file.write_text(
        f"model: {models('llama')}\nreward: {{kind: brevity, words: 12}}\ndecoding: {{method: climb, tries: 3}}\n"
        "max_tokens: 40\nseed: 3\nengine: {device: cpu, dtype: float32}\n"
    )
    found = run(GUIDED, installed, str(file))
    assert found["known"] == [False, False, False]  # nothing is imported before it is asked for
    assert ["Did you mean 'brevity'" in found["near"][0], "Did you mean 'climb'" in found["near"][1]] == [True, True]
    assert found["classes"] == ["cards_outside.reward.BrevityReward", "cards_outside.method.Climb"]
    assert found["again"]
    assert found["scores"] == [-9.0, -12.0]
    assert found["method"] == "climb"
    assert found["text"] == found["langchain"] == found["llama_index"]
    before, verdicts = -12.0, set()
    for segment in found["segments"]:
        kept = segment["drafts"][-1] if segment["drafts"][-1]["verdict"] == "accepted" else None
        verdicts |= {draft["verdict"] for draft in segment["drafts"]}
        assert (kept is not None) == (segment["reward"] > before)
        assert all(draft["reward"] <= before for draft in segment["drafts"] if draft is not kept)
        assert kept is not None or segment["reward"] == max(draft["reward"] for draft in segment["drafts"])
        before = segment["reward"]
    assert verdicts == {"accepted", "rejected", "best"}


BACKEND = """
import json, sys
from itertools import pairwise
from cards_integrations import CardsLLM, CardsSettings
from cards_integrations.decoding import BestOfN, Cards, FixedLength, Punctuation, TreeBoN
from cards_integrations.trace import Alignment

settings = CardsSettings(
    model={"kind": "bigram"}, reward={"kind": "brevity", "words": 4}, decoding="climb", max_tokens=60, seed=7
)
written = settings.model.text
with CardsLLM.from_settings(settings) as llm:
    answer = llm.align("the dog")
    methods = [Cards(target_reward=0.0, beta=1.0, boundary=Punctuation()), BestOfN(n=4),
               TreeBoN(n=4, children=2, boundary=FixedLength(length=10))]
    answers = [answer, *(llm.align("the dog", decoding=method) for method in methods)]
    *chunks, last = llm.align_stream("the dog")
    try:
        llm.align("the dog", decoding=Cards(target_reward=0.0, beta=1.0))
    except ValueError as error:
        refused = str(error)
    stopped = llm.align("the dog", stop=["cat"])
    greedy = [llm.align("the dog", temperature=0, seed=seed).text for seed in (1, 2)]
    print(json.dumps({
        "again": CardsSettings(**json.loads(settings.model_dump_json())) == settings,
        "strange": [pair for each in answers for pair in map("".join, pairwise(each.text)) if pair not in written],
        "lengths": [[len(each.token_ids), each.finish_reason] for each in answers],
        "texts": [each.text for each in answers],
        "rewards": [[each.reward, -abs(len(each.text.split()) - 4)] for each in answers],
        "together": [each.text for each in llm.align_batch(["the dog"] * 3, seeds=[5, 6, 7])][-1],
        "streamed": "".join(chunk.text for chunk in chunks),
        "last": last.text,
        "langchain": llm.invoke("the dog").content,
        "llama_index": llm.complete("the dog").text,
        "stopped": [stopped.text, stopped.finish_reason],
        "greedy": greedy,
        "refused": refused,
        "after": llm.align("the dog").text,
        "drafted": answer.usage.drafted_tokens,
    }))
"""


def test_a_language_model_in_a_few_lines(installed: Path) -> None:
    found = run(BACKEND, installed)
    assert found["again"]
    assert not found["strange"]  # only what follows each other in the model's text
    for length, finish in found["lengths"]:
        assert finish == ("length" if length == 60 else "stop")
        assert length <= 60
    assert all(reward == expected for reward, expected in found["rewards"])
    text = found["texts"][0]
    same = ("together", "streamed", "last", "langchain", "llama_index", "after")
    assert {name: found[name] for name in same} == dict.fromkeys(same, text)
    assert "cat" not in found["stopped"][0]
    assert len(set(found["greedy"])) == 1
    assert "have no logits" in found["refused"]
    assert found["drafted"] >= found["lengths"][0][0]
