"""Methods side by side: every answer once, scored alike, resumed, and reported."""

from __future__ import annotations

import gzip
import io
import json
import math
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import faces
import pytest

from cards_integrations import CardsLLM
from cards_integrations.decoding import BestOfN, Sampling, SegmentBestOfN
from cards_integrations.engine import EngineSettings
from cards_integrations.errors import SettingsError
from cards_integrations.rewards import LengthReward
from cards_integrations.study import Comparison, compare, read_prompts
from cards_integrations.study.compare import SHORT
from cards_integrations.study.metrics import distinct, mean, repeated_3grams, self_bleu
from cards_integrations.study.rows import Results, read_rows

PROMPTS = ["Hello", "Once upon a time", "Who <b>are</b> you?"]
ARMS = {"plain": Sampling(), "best of 4": BestOfN(n=4), "segments": SegmentBestOfN(n=2)}


def vowels(prompt: str, responses: list[str]) -> list[float]:
    return [sum(map(response.lower().count, "aeiou")) / 10 for response in responses]


@pytest.fixture(scope="module")
def llm() -> Iterator[CardsLLM]:
    with faces.cards_llm(max_tokens=12, engine=EngineSettings(device="cpu", width=4, max_rows=5)) as llm:
        yield llm


@pytest.fixture(scope="module")
def found(llm: CardsLLM) -> Comparison:
    return compare(llm, ARMS, PROMPTS, judge=vowels, seeds=(1, 2), progress=False)


def test_every_arm_answers_every_prompt_with_every_seed(llm, found):
    assert list(found.arms) == list(ARMS)
    for name, arm in found.arms.items():
        assert sorted((row["prompt"], row["seed"]) for row in arm.rows) == [(p, s) for p in range(3) for s in (1, 2)]
        for row in arm.rows:
            alone = llm.align(PROMPTS[row["prompt"]], decoding=ARMS[name], seed=row["seed"])
            assert row["text"] == alone.text
            assert row["reward"] == pytest.approx(llm.score(PROMPTS[row["prompt"]], [alone.text])[0], abs=1e-4)
            assert row["judged"] == vowels("", [alone.text])[0]
            assert row["repeated_3grams"] == repeated_3grams(alone.text)
            assert row["out_of_reach"] == alone.out_of_reach
            assert row["tokens"] == len(alone.token_ids)
            assert row["log_p_per_token"] == pytest.approx(alone.log_likelihood / len(alone.token_ids), abs=1e-4)
            looked_at = [len(d.token_ids) for segment in alone.segments for d in segment.drafts]
            assert row["looked_at_tokens"] == sum(looked_at)
            assert row["seconds"] > 0


def test_plain_answers_are_scored_by_both_though_nothing_guided_them(found):
    plain = found.arms["plain"].rows
    assert all(math.isfinite(row["reward"]) and math.isfinite(row["judged"]) for row in plain)
    assert all(row["rm_forwards"] == 0 for row in plain)


def test_an_interrupted_run_goes_on(llm, found, tmp_path, monkeypatch):
    out = tmp_path / "answers.jsonl"
    calls, warm_ups = [], 0
    own = CardsLLM.align_batch

    def counted(self: CardsLLM, prompts: Any, *args: Any, **options: Any) -> Any:
        nonlocal warm_ups
        if options.get("max_tokens") == SHORT["max_tokens"]:
            warm_ups += 1
            return own(self, prompts, *args, **options)
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return own(self, prompts, *args, **options)

    monkeypatch.setattr(CardsLLM, "align_batch", counted)
    again = {"judge": vowels, "seeds": (1, 2), "at_once": 4, "out": out, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        compare(llm, ARMS, PROMPTS, **again)
    assert len(out.read_text().splitlines()) == 6
    assert warm_ups == 2  # each of the arms that have begun, before its clock runs
    with out.open("a") as file:
        file.write('{"arm": "plain", "half a li')
    resumed = compare(llm, ARMS, PROMPTS, **again)
    assert sum(calls) - 4 == 3 * 6  # the four of the interrupted batch are not there twice
    texts = {(row["arm"], row["prompt"], row["seed"]): row["text"] for row in found.rows}
    assert {(row["arm"], row["prompt"], row["seed"]): row["text"] for row in resumed.rows} == texts
    assert len(resumed.rows) == len(texts)
    assert len(Comparison.load(out).rows) == len(texts)
    assert warm_ups == 2 + 2  # not the arm that was whole
    compare(llm, ARMS, PROMPTS, **again)
    assert sum(calls) - 4 == 3 * 6
    compare(llm, {"plain": Sampling(chunk=3)}, PROMPTS[:1], **again)  # other settings are another question
    assert sum(calls) - 4 == 3 * 6 + 2


def test_only_answers_to_the_same_question_are_taken_over(llm, tmp_path):
    out, arms = tmp_path / "answers.jsonl", {"plain": Sampling()}

    def asked(llm: CardsLLM = llm, prompts: Any = ("Hello",), **more: Any) -> tuple[int, Comparison]:
        """How many answers were not in the file, and what was found."""
        before = len(out.read_text().splitlines()) if out.exists() else 0
        found = compare(llm, arms, prompts, out=out, progress=False, **more)
        return len(out.read_text().splitlines()) - before, found

    def lasting(**options: Any) -> CardsLLM:
        return llm.model_copy(update=options)

    assert asked()[0] == 1
    assert asked()[0] == 0
    judged: dict[str, Any] = {"judge": lambda prompt, texts: [1.0 for _ in texts]}  # code has no settings but a name
    assert [asked(**judged)[0], asked(**judged)[0]] == [1, 0]
    assert asked(**judged)[1].rows[0]["judged"] == 1.0
    for other in ({"reward": LengthReward(target=4)}, {"top_k": 3}, {"stop": ("e",)}, {"temperature": 0.1}):
        assert asked(lasting(**other))[0] == 1
        assert asked(lasting(**other))[0] == 0
    with faces.cards_llm(model=faces.chat_model(1), max_tokens=12) as another:
        new, found = asked(another)
        assert new == 1
        assert found.rows[0]["text"] == another.align("Hello", decoding="sampling", seed=0).text
    twice: dict[str, Any] = {"prompts": ("Hello", "Hello"), "contexts": (["Tom"], "Lily")}
    assert asked(**twice)[0] == 2
    new, found = asked(**twice)
    assert new == 0
    assert [(row["prompt"], row["context"]) for row in found.rows] == [(0, ["Tom"]), (1, ["Lily"])]
    new, found = asked(prompts=("Who?", "Hello"))
    assert new == 1
    assert sorted((row["prompt"], row["asked"]) for row in found.rows) == [(0, "Who?"), (1, "Hello")]


def test_a_file_of_something_else_is_not_gone_on_with(llm, tmp_path):
    out = tmp_path / "answers.jsonl"
    out.write_text('{"line": 0, "prompt": "Hello", "text": "Hi"}\n')
    with pytest.raises(SettingsError, match="line 1, is not an object with arm"):
        compare(llm, ARMS, PROMPTS, out=out, progress=False)


def test_files_of_earlier_versions_load_and_are_asked_anew(llm, tmp_path):
    for file in sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("methods-*.jsonl")):
        assert len(Comparison.load(file).arms) > 10
    out = tmp_path / "answers.jsonl"
    compare(llm, {"plain": Sampling()}, PROMPTS[:1], out=out, progress=False)
    (row,) = read_rows(out)
    out.write_text(json.dumps({name: value for name, value in row.items() if name not in ("model", "guide")}) + "\n")
    compare(llm, {"plain": Sampling()}, PROMPTS[:1], out=out, progress=False)
    assert [read["text"] for read in read_rows(out)] == [row["text"]] * 2


def test_arms_may_differ_in_anything_that_a_call_takes(llm):
    arms = {"cool": {"decoding": "sampling", "temperature": 0.0}, "other": {"decoding": Sampling(), "max_tokens": 3}}
    found = compare(llm, arms, PROMPTS[:1], progress=False)
    assert found.arms["cool"].rows[0]["text"] == llm.align("Hello", decoding="sampling", temperature=0.0).text
    assert found.arms["other"].rows[0]["tokens"] <= 3
    assert found.arms["other"].mean("judged") is None
    with pytest.raises(SettingsError, match="arm 'what'"):
        compare(llm, {"what": 3}, PROMPTS, progress=False)  # type: ignore[dict-item]


def test_means_differences_and_costs_between_arms():
    def row(arm: str, prompt: int, judged: float, cost: float) -> dict[str, Any]:
        return {"arm": arm, "prompt": prompt, "judged": judged, "seconds": cost, "text": "a b", "seed": 0}

    rows = [row(f"n{n}", p, n / 4 + p, 10.0 * n) for n in (1, 2, 4) for p in range(5)]
    found = Comparison((*rows, row("mine", 0, 9.0, 1.0)))
    judged = found.arms["n2"].mean("judged")
    assert judged is not None
    assert judged.value == pytest.approx(0.5 + 2)
    difference = found.difference("n4", "n1", "judged")
    assert difference == pytest.approx((0.75, 0.75, 0.75))
    family = ["n1", "n2", "n4"]
    assert found.cost_at(2.25, "seconds", family) == pytest.approx(10)
    assert found.cost_at(2.75, "seconds", family) == pytest.approx((20 * 40) ** 0.5, rel=0.01)
    assert found.cost_at(3.5, "seconds", family) is None


def test_wins_and_repetition_by_hand(tmp_path):
    def row(arm: str, prompt: int, seed: int, judged: float | None, text: str) -> dict[str, Any]:
        decoding = {"decoding": {"method": "sampling" if arm == "plain" else "cards"}}
        return {
            "arm": arm,
            "prompt": prompt,
            "seed": seed,
            "judged": judged,
            "text": text,
            "asked": "?",
            "settings": decoding,
        }

    looping = "a b c a b c"
    rows = [
        row("guided", 0, 0, 1.0, looping), row("guided", 0, 1, 1.0, "d e f g"), row("guided", 1, 0, 0.0, "h"),
        row("plain", 0, 0, 0.0, "x y"), row("plain", 0, 1, 1.0, "x y"), row("plain", 1, 0, 1.0, "x y"),
        row("plain", 2, 0, 1.0, "x y"), row("unjudged", 0, 0, None, "x y"),
    ]  # fmt: skip
    found = Comparison(tuple(rows))
    assert found.baseline == "plain"
    wins = found.wins["guided"]["judged"]
    assert wins is not None
    assert wins.value == pytest.approx((0.75 + 0.0) / 2)  # over prompts, of which one has a win and a tie
    assert found.win_rate("plain", "guided", "judged")[0] == pytest.approx(1 - wins.value)  # type: ignore[index]
    assert found.wins["plain"]["judged"] is None
    assert found.wins["unjudged"]["judged"] is None
    assert found.wins["guided"]["reward"] is None
    summary = found.summary()["guided"]
    assert summary["repeated_3grams"].value == pytest.approx((25 / 2 + 0) / 2)  # files of earlier versions lack it
    assert summary["judged_win_rate"] == wins
    assert Comparison(tuple(rows[:3])).baseline == "guided"
    page = found.to_html(tmp_path / "page.html").read_text()
    assert "over the answers of plain" in " ".join(page.split())


def test_metrics_by_hand():
    assert mean([1.0, 1.0]) == (1.0, 1.0, 1.0)
    low, high = mean([0.0, 1.0] * 50)[1:]
    assert 0.39 < low < 0.42
    assert 0.58 < high < 0.61
    grouped = mean([0.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"])
    assert grouped.value == 0.5
    assert distinct(["a b a b"], 2) == 2 / 3
    assert distinct(["", "a"], 2) == 0.0
    assert self_bleu([["the cat sat on the mat"] * 3]) == pytest.approx(1.0)
    assert self_bleu([["a b c d e"], ["f"]]) is None
    alike = self_bleu([["the cat sat on the mat", "a dog ran far away today"]])
    assert alike is not None
    assert alike < 0.05


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.text = ""
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_a_page_of_its_own_and_escapes_what_models_say(found, tmp_path):
    hostile = tuple({**row, "text": "<script>alert(1)</script>"} for row in found.rows[:1]) + found.rows[1:]
    path = Comparison(hostile).to_html(tmp_path / "report.html")
    tags = Tags()
    tags.feed(path.read_text(encoding="utf-8"))
    assert "script" not in tags.seen
    assert "b" not in tags.seen
    assert "<script>alert(1)</script>" in tags.text
    assert all(source.startswith("data:image/png") for source in tags.sources)
    for name in ARMS:
        assert name in tags.text


def test_the_table_and_the_chart(found):
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(found.table())
    shown = console.export_text()
    for name, arm in found.arms.items():
        assert name in shown
        assert f"{arm.mean('reward').value:.3g}" in shown
        assert f"{arm.mean('repeated_3grams').value:.3g}" in shown
        assert f"{arm.diversity['distinct_2']:.3g}" in shown
    assert f"{100 * found.wins['segments']['judged'].value:.0f}" in shown
    figure = found.plot("looked_at_tokens")
    assert [axis.get_ylabel() for axis in figure.axes] == ["guiding reward", "held-out reward"]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == set(ARMS)


# --- files ---

ODD = "one\u2028two\u2029three\x85four\x0cfive"  # all of them end a line for str.splitlines


def test_only_newlines_end_a_line(tmp_path):
    out, again = tmp_path / "rows.jsonl", {"arm": "a", "text": ODD}
    Results(out).add([again])
    assert Results(out).rows == read_rows(out) == [again]
    line = json.dumps({"prompt": ODD}, ensure_ascii=False)
    for file, data in (("p.txt", ODD), ("p.jsonl", line)):
        (tmp_path / file).write_text(f"{data}\n{data}", encoding="utf-8")
        (tmp_path / f"{file}.gz").write_bytes(gzip.compress((tmp_path / file).read_bytes()))
        for name in (file, f"{file}.gz"):
            assert read_prompts(tmp_path / name)[0] == [ODD, ODD]


def test_prompts_from_files(tmp_path):
    plain = tmp_path / "prompts.txt"
    plain.write_text("One\n\n  \nTwo  \n", encoding="utf-8")
    assert read_prompts(plain) == (["One", "Two  "], [None, None])
    lines = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "Hi"}]
    lines.write_text("\n".join(map(json.dumps, [{"prompt": "One", "context": ["a"]}, {"messages": chat}])))
    assert read_prompts(str(lines)) == (["One", chat], [["a"], None])
    packed = tmp_path / "hh.jsonl.gz"
    told = "\n\nHuman: One\n\nAssistant: Two\n\nHuman: Three\n\nAssistant: Four"
    packed.write_bytes(gzip.compress(json.dumps({"chosen": told, "rejected": told}).encode()))
    asked = [("user", "One"), ("assistant", "Two"), ("user", "Three")]
    assert [(m["role"], m["content"]) for m in read_prompts(packed)[0][0]] == asked


@pytest.mark.parametrize("text", ["{", '{"question": "x"}', "3", '{"chosen": "no dialogue"}', '{"chosen": 3}'])
def test_prompts_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(SettingsError, match=r"prompts\.jsonl"):
        read_prompts(file)
    with pytest.raises(SettingsError, match="nowhere"):
        read_prompts(tmp_path / "nowhere.txt")
