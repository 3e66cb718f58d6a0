"""A model as judge of pairs: both orders, no tie out of what cannot be read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.runnables import RunnableLambda
from llama_index.core.llms import CompletionResponse, CustomLLM, LLMMetadata

from cards_integrations.errors import SettingsError
from cards_integrations.study import judge
from cards_integrations.study.judge import judge_prompts, pair_verdict, paired, parse_scores


def rows(texts: list[str], **more: Any) -> list[dict[str, Any]]:
    return [{"asked": f"Question {i}", "seed": 0, "text": text} | more for i, text in enumerate(texts)]


OURS, THEIRS = rows(["long answer", "so", "equal", "}{"]), rows(["no", "long answer", "Equal", "{question}"])


def short_repr(prompt: str) -> tuple[str, str]:
    first, _, rest = prompt.partition("[The Start of Assistant 1's Answer]\n")[2].partition("\n[The End")
    return first, rest.partition("[The Start of Assistant 2's Answer]\n")[2].partition("\n[The End")[0]


def by_length(prompt: str, bias: float = 0.0) -> str:
    one, two = short_repr(prompt)
    return f"{min(10, len(one) / 2 + bias):g} {min(10, len(two) / 2):g}\nBecause."


def asked(function: Any) -> Any:
    return RunnableLambda(lambda messages: function(messages[-1][1]))


def test_the_longer_answer_wins_in_both_orders():
    found = judge(OURS, THEIRS, asked(by_length), progress=False)
    assert [row["verdict"] for row in found.rows] == ["win", "loss", "tie", "loss"]
    assert found.counts == {"win": 1, "tie": 1, "loss": 2, "unparsed": 0}
    assert found.win_tie is not None
    assert found.win_tie.value == 0.5
    assert found.win_rate is not None
    assert found.win_rate.value == pytest.approx(1.5 / 4)
    assert found.first_wins == 0.5


@pytest.mark.parametrize("bias", [3.0, -3.0])
def test_a_preference_for_a_place_cancels(bias):
    found = judge(OURS[2:3] * 1, THEIRS[2:3], asked(lambda prompt: by_length(prompt, bias)), progress=False)
    assert [row["verdict"] for row in found.rows] == ["tie"]
    fair = judge(OURS, THEIRS, asked(by_length), progress=False)
    biased = judge(OURS, THEIRS, asked(lambda prompt: by_length(prompt, bias)), progress=False)
    assert [row["verdict"] for row in biased.rows] == [row["verdict"] for row in fair.rows]
    assert biased.first_wins is not None
    assert (biased.first_wins > 0.6) == (bias > 0)
    assert (biased.first_wins < 0.4) == (bias < 0)


def test_what_cannot_be_read_is_no_tie():
    def sulks(prompt: str) -> str:
        return "I would rather not." if short_repr(prompt)[0] == "equal" else by_length(prompt)

    found = judge(OURS, THEIRS, asked(sulks), progress=False)
    assert [row["verdict"] for row in found.rows] == ["win", "loss", "unparsed", "loss"]
    assert found.win_tie is not None
    assert found.win_tie.value == pytest.approx(1 / 3)
    nothing = judge(OURS, THEIRS, asked(lambda prompt: ""), progress=False)
    assert (nothing.win_tie, nothing.win_rate, nothing.first_wins) == (None, None, None)
    assert "4 unparsed" in str(nothing)


def test_only_equal_prompts_with_equal_seeds_are_paired():
    others = [
        *rows(
            ["x"],
        ),
        {"asked": "Another", "seed": 0, "text": "y"},
        {"asked": "Question 0", "seed": 1, "text": "z"},
    ]
    assert [(p["ours"], p["theirs"]) for p in paired(OURS, others)] == [("long answer", "x")]
    with pytest.raises(SettingsError, match="no prompt has an answer in both"):
        judge(OURS, [], asked(by_length), progress=False)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Go"},
    ]
    (pair,) = paired([{"asked": messages, "seed": 0, "text": "a"}], [{"asked": messages, "seed": 0, "text": "b"}])
    assert pair["question"] == "User: Hi\nAssistant: Ho\nUser: Go"


def test_the_prompts_hold_answers_as_they_are():
    prompts = judge_prompts(OURS, THEIRS)
    assert len(prompts) == 8
    assert [short_repr(prompt) for prompt in prompts[-2:]] == [("}{", "{question}"), ("{question}", "}{")]


def test_calls_that_fail_are_tried_again(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    failures = {"left": 2}

    def flaky(prompt: str) -> str:
        if failures["left"]:
            failures["left"] -= 1
            raise ConnectionError("gone")
        return by_length(prompt)

    found = judge(OURS, THEIRS, asked(flaky), at_once=1, progress=False)
    assert found.counts["unparsed"] == 0

    def broken(prompt: str) -> str:
        raise ConnectionError("gone for good")

    with pytest.raises(ConnectionError, match="for good"):
        judge(OURS, THEIRS, asked(broken), at_once=1, progress=False)


def test_an_interrupted_judgement_goes_on(tmp_path):
    out = tmp_path / "judged.jsonl"
    seen: list[str] = []

    def counted(prompt: str) -> str:
        seen.append(prompt)
        return by_length(prompt)

    judge(OURS[:2], THEIRS, asked(counted), out=out, progress=False)
    found = judge(OURS, THEIRS, asked(counted), out=out, progress=False)
    assert len(seen) == 8
    assert len(out.read_text().splitlines()) == 4
    assert sorted(json.loads(line)["question"] for line in out.read_text().splitlines()) == sorted(
        row["question"] for row in found.rows
    )


def test_a_file_of_something_else_is_not_gone_on_with(tmp_path):
    out = tmp_path / "answers.jsonl"
    out.write_text(json.dumps(OURS[0]) + "\n")
    with pytest.raises(SettingsError, match="line 1, is not an object with ours"):
        judge(OURS, THEIRS, asked(by_length), out=out, progress=False)


class Judge(CustomLLM):
    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata()

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return CompletionResponse(text=by_length(prompt))

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        raise NotImplementedError


def test_models_of_both_frameworks_judge():
    assert judge(OURS, THEIRS, Judge(), progress=False).counts["win"] == 1
    assert judge(OURS, THEIRS, FakeListChatModel(responses=["7 7"]), progress=False).counts["tie"] == 4
    with pytest.raises(SettingsError, match="neither"):
        judge(OURS, THEIRS, "gpt-4", progress=False)


@pytest.mark.parametrize(
    ("said", "scores"),
    [
        ("8 7", (8, 7)),
        ("\n\n 8 7\nAssistant 1 was better.", (8, 7)),
        ("8/10, 7/10", (8, 7)),
        ("**9.5 10**", (9.5, 10)),
        ("Scores for Assistant 1 and 2: 9 6", (9, 6)),
        ("Assistant 1: 8, Assistant 2: 7.", (8, 7)),
        ("Answer 1: 8/10 and Answer 2: 3/10", (8, 3)),
        ("I think 2 of 3 are good", None),
        ("8\n7", None),
        ("18 7", None),
        ("8 77", None),
        ("", None),
    ],
)
def test_scores_are_read_from_a_line(said, scores):
    assert parse_scores(said) == scores


def test_verdicts_by_hand():
    def both(one: Any, two: Any) -> list[dict[str, Any]]:
        return [{"swapped": False, "scores": one}, {"swapped": True, "scores": two}]

    assert pair_verdict(both((8, 7), (7, 8))) == "win"
    assert pair_verdict(both((8, 7), (8, 7))) == "tie"
    assert pair_verdict(both((7, 8), (9, 1))) == "loss"
    assert pair_verdict(both((9, 1), None)) == "unparsed"
