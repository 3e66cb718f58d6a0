"""Every type of model gives what plain transformers gives, or is refused when it is loaded."""

from __future__ import annotations

import census
import pytest

FAST = {  # some of every kind of attention, position, cache and head
    "causal": [
        "llama", "qwen3", "gemma2", "gemma3_text", "gemma4_text", "mistral", "phi3", "gpt2", "gpt_neox", "opt",
        "mixtral", "cohere2", "gpt_oss", "deepseek_v3", "minicpm3", "llama4_text", "jetmoe", "diffllama", "roberta",
        "bart", "whisper", "bloom", "mamba", "jamba", "qwen3_5", "lfm2", "smollm3",
    ],
    "classifier": ["qwen3", "gpt_oss", "bloom", "roberta", "qwen3_5", "xlnet", "reformer"],
    "composite": ["gemma3", "gemma4", "mistral3", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "paligemma"],
}  # fmt: skip
KNOWN = census.known()


def check(task: str, kind: str, verdict: census.Verdict) -> None:
    """Right; and exact if it was so when the tables were written."""
    assert verdict.found in census.RIGHT, verdict
    before = KNOWN[task].get(kind, verdict)
    assert before.found != census.EXACT or verdict.found == census.EXACT, verdict


@pytest.mark.slow
@pytest.mark.parametrize(("task", "kind"), [(task, kind) for task, kinds in FAST.items() for kind in kinds])
def test_a_type_is_right_or_refused(task: str, kind: str) -> None:
    check(task, kind, census.judged(task, kind))


@pytest.mark.models
@pytest.mark.parametrize(("task", "kind"), [(task, kind) for task, kinds in census.TYPES.items() for kind in kinds()])
def test_every_type_is_right_or_refused(task: str, kind: str) -> None:
    check(task, kind, census.judged_apart(task, kind))


def test_the_page_has_what_the_census_found() -> None:
    text = census.PAGE.read_text(encoding="utf-8")
    assert census.page(text, KNOWN) == text, "run `python tests/census.py --write`"


def test_nothing_was_wrong() -> None:
    for verdicts in KNOWN.values():
        assert {verdict.found for verdict in verdicts.values()} <= {*census.RIGHT}
