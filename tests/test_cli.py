"""The `cards` command, run as a user would."""

from __future__ import annotations

import errno
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, version
from pathlib import Path
from typing import Any

import faces
import pytest
import scripted
from typer.testing import CliRunner

from cards_integrations import CardsLLM, CardsSettings
from cards_integrations.cli import app, demo, main
from cards_integrations.decoding import BestOfN, Cards, Particles, as_decoding
from cards_integrations.engine import Engine
from cards_integrations.errors import SettingsError
from cards_integrations.rewards import NAMED
from cards_integrations.rewards.registry import GROUP
from cards_integrations.transformer.step_times import POINTS


@pytest.fixture
def config(tmp_path: Path) -> Iterator[str]:
    """Settings of a tiny model; engines end with the test."""
    from cards_integrations.settings import CardsSettings

    file = tmp_path / "cards.yaml"
    file.write_text(CardsSettings(**faces.options(max_tokens=8)).to_yaml())
    yield str(file)
    for engine in list(Engine._shared.values()):
        engine.close()


@pytest.fixture
def failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """What the command leaves on standard output and error when it ends with 1."""

    def failed(*words: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["cards", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1
        return capsys.readouterr()

    return failed


def run(*words: str, input: str | None = None, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(words), input=input)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def answers(config: str, prompts: list[str]) -> list[str]:
    with CardsLLM.from_settings(config) as llm:
        return [answer.text for answer in llm.align_batch(prompts)]


def test_a_reward_may_be_imported_from_here_if_that_is_allowed(config, tmp_path, monkeypatch):
    (tmp_path / "my_rewards_of_here.py").write_text("def short(prompt, texts): return [-len(text) for text in texts]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    asked = ("generate", "Hello", "--config", config, "--json")
    reward = ("--reward", json.dumps({"kind": "function", "function": "my_rewards_of_here.short"}))
    refused = CliRunner().invoke(app, [*asked, *reward])
    assert isinstance(refused.exception, SettingsError)
    assert "--allow-imports" in str(refused.exception)
    found = json.loads(run(*asked, *reward, "--allow-imports").stdout)
    assert found["reward"] == -len(found["text"])
    assert isinstance(CliRunner().invoke(app, [*asked, *reward]).exception, SettingsError)  # that was for one command


def test_generate_prints_the_answer(config):
    (expected,) = answers(config, ["Hello"])
    assert run("generate", "Hello", "--config", config).stdout == expected + "\n"
    for piped in ("Hello", "Hello\n"):  # as printf and as echo give it
        assert run("generate", "-", "--config", config, input=piped).stdout == expected + "\n"
    found = json.loads(run("generate", "Hello", "--config", config, "--json").stdout)
    assert found["text"] == expected
    assert found["usage"]["completion_tokens"] == 8
    short = json.loads(run("generate", "Hello", "--config", config, "--json", "--max-tokens", "3").stdout)
    assert short["usage"]["completion_tokens"] == 3


def test_generate_draws_a_picture(config, tmp_path):
    page = tmp_path / "trace.html"
    run("generate", "Hello", "--config", config, "--trace", str(page))
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_generate_answers_a_file_and_goes_on_where_it_stopped(config, tmp_path):
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked = [f"Prompt {i}" for i in range(5)]
    prompts.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in asked))
    words = ("generate", "--prompts", str(prompts), "--config", config, "--concurrency", "2")

    def rows(lines):
        return sorted(map(json.loads, lines), key=lambda row: row["line"])

    run(*words, "--out", str(out))
    found = rows(out.read_text().splitlines())
    assert [(row["line"], row["prompt"]) for row in found] == list(enumerate(asked))
    assert [row["text"] for row in found] == answers(config, asked)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:3]) + '{"line": 3, "text": "half')
    run(*words, "--out", str(out))
    assert out.read_text().splitlines(keepends=True)[:3] == lines[:3]  # each is answered once
    again = rows(out.read_text().splitlines())
    assert [(row["line"], row["text"]) for row in again] == [(row["line"], row["text"]) for row in found]
    assert [row["text"] for row in rows(run(*words).stdout.splitlines())] == [row["text"] for row in found]


def test_generate_does_not_go_on_with_a_file_that_was_edited(config, tmp_path, failed):
    prompts, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    out.write_text("".join(json.dumps({"line": i, "prompt": p, "text": "."}) + "\n" for i, p in enumerate(("A", "B"))))
    words = ("generate", "--prompts", str(prompts), "--config", config, "--out", str(out))
    for edited in ("A\nC\n", "A\n"):
        prompts.write_text(edited)
        told = failed(*words).err
        assert told.startswith("SettingsError: Line 1 of ")
        assert told.count("\n") == 1
    assert len(out.read_text().splitlines()) == 2
    prompts.write_text("A\nB\n")
    run(*words)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["Hi", "--out", "out.jsonl"], "--out is for"),
        (["--prompts", "in.txt", "--trace", "trace.html"], "--trace draws"),
        (["Hi", "--prompts", "in.txt"], "one of the two"),
    ],
)
def test_generate_ignores_nothing(failed, words, told):
    assert told in failed("generate", *words).err


class Closed(io.StringIO):
    """A pipe whose reader has gone, as the first flush finds out."""

    def flush(self) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_generate_is_quiet_when_nobody_reads_on(config, tmp_path, monkeypatch, failed):
    prompts = tmp_path / "in.txt"
    prompts.write_text("Hello\nWho?\nWhy?\n")
    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(sys, "stderr", sys.stderr)  # typer puts another in its place
    assert failed("generate", "--prompts", str(prompts), "--config", config).err == ""


def test_generate_leaves_out_what_fails_and_tries_it_again(config, tmp_path):
    prompts, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    prompts.write_text("Hello\n" + "far too long " * 5000 + "\nAnd?\n")
    failed = run("generate", "--prompts", str(prompts), "--config", config, "--out", str(out), code=1)
    assert "line 1: PromptError" in failed.stderr.replace("\n", " ")
    assert sorted(json.loads(line)["line"] for line in out.read_text().splitlines()) == [0, 2]


def test_chat_remembers_and_shows_what_was_rejected(config):
    shown = run("chat", "--config", config, "--rejected", "--system", "Be brief.", input="Hello\nAnd?\n\n").stdout
    with CardsLLM.from_settings(config) as llm:
        first = llm.align([("system", "Be brief."), ("user", "Hello")])
        said = [("system", "Be brief."), ("user", "Hello"), ("assistant", first.text), ("user", "And?")]
        second = llm.align(said)
    for answer in (first, second):
        for segment in answer.segments:
            assert segment.text in shown
            for draft in segment.drafts:
                assert draft.text in shown
        assert f"{answer.usage.completion_tokens} tokens kept" in shown


def test_compare_and_judge(config, tmp_path, monkeypatch):
    prompts, out, report = (tmp_path / name for name in ("prompts.txt", "out.jsonl", "report.html"))
    prompts.write_text("Hello\nWho?\nWhy?\n")
    words = (
        "compare", str(prompts), "--config", config, "--method", "sampling", "--method", "best_of_n:n=2",
        "--limit", "2", "--out", str(out), "--report", str(report),
    )  # fmt: skip
    assert "best_of_n:n=2" in run(*words).stdout
    assert len(out.read_text().splitlines()) == 4
    assert "best_of_n:n=2" in report.read_text(encoding="utf-8")
    found = json.loads(run(*words, "--json").stdout)
    assert found["sampling"]["drafted_tokens"][0] == 8
    assert found["best_of_n:n=2"]["drafted_tokens"][0] == 16
    arms = ("--our-arm", "best_of_n:n=2", "--their-arm", "sampling", "--llm", f"cards:{scripted.save_model(tmp_path)}")
    said = json.loads(run("judge", str(out), str(out), *arms, "--json").stdout)
    assert sum(said["counts"].values()) == 2
    assert said["counts"]["unparsed"] == 0
    assert "2 pairs: 4 calls" in run("judge", str(out), str(out), *arms).stderr
    with pytest.raises(SettingsError, match="several methods"):
        CliRunner().invoke(app, ["judge", str(out), str(out)], catch_exceptions=False)


def test_the_demo_answers_from_documents_and_beside_best_of_n(monkeypatch):
    monkeypatch.setattr("cards_integrations.llm.CardsLLM", lambda max_tokens: faces.cards_llm(max_tokens=8))
    monkeypatch.setattr(demo, "PROMPTS", ["Hello"])
    monkeypatch.setattr(demo, "QUESTIONS", demo.QUESTIONS[:1])
    monkeypatch.setattr(demo, "JUDGE", None)
    monkeypatch.setattr(demo, "BEST_OF", 3)
    shown = run("demo").stdout
    rows = {cells[1].strip(): cells for line in shown.splitlines() if len(cells := line.split("│")) == 9}
    with faces.cards_llm(max_tokens=8) as llm:
        default = llm.decoding.method
        for name, decoding in {"plain": "sampling", "best-of-3": BestOfN(n=3), default: llm.decoding}.items():
            answer = llm.align("Hello", decoding=decoding, seed=0)
            [reward] = llm.score("Hello", [answer.text])
            assert [cell.strip() for cell in rows[name][2:6]] == [
                f"{reward:.2f}", f"{reward:.2f}", str(answer.usage.completion_tokens), str(answer.usage.drafted_tokens),
            ]  # fmt: skip
    assert "of 1 plain answers" in shown
    assert f"document: {demo.QUESTIONS[0][1]}" in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 120


def test_rewards_and_models():
    assert "groundedness" in run("rewards").stdout
    assert set(json.loads(run("rewards", "--json").stdout)) >= {"classifier", "judge", "weighted"}
    schema = json.loads(run("rewards", "length").stdout)
    assert {"target", "unit"} <= schema["properties"].keys()
    assert json.loads(run("models", "--json").stdout)["embedded"] == ["smollm2", "minilm"]
    assert "smollm2" in run("models").stdout


def test_a_broken_plugin_is_a_line_of_the_list(monkeypatch):
    broken = EntryPoint("broken", "nowhere.at_all:Mine", GROUP)
    monkeypatch.setattr("cards_integrations.registry.entry_points", lambda group: [broken])
    assert "groundedness" in run("rewards").stdout
    assert "does not load: No module named 'nowhere'" in json.loads(run("rewards", "--json").stdout)["broken"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cards", Cards()),
        ("best_of_n:n=3", BestOfN(n=3)),
        ("cards:target_reward=1.5,beta=0.1,acceptance=hard", Cards(target_reward=1.5, beta=0.1, acceptance="hard")),
        ('{"method": "particles", "n": 3}', Particles(n=3)),
        ("particles:boundary={kind: fixed_length}", Particles(boundary={"kind": "fixed_length"})),
    ],
)
def test_methods_of_the_command_line(text, expected):
    assert as_decoding(text) == expected


def test_the_help_tells_the_defaults():
    fields, said = CardsSettings.model_fields, " ".join(run("generate", "--help").stdout.replace("│", " ").split())
    defaults = {
        "model": fields["model"].default.model, "reward": "sentiment", "decoding": fields["decoding"].default.method,
        **{name: f"{fields[name].default:g}" for name in ("max_tokens", "temperature", "top_k", "top_p")},
    }  # fmt: skip
    assert fields["reward"].default == NAMED["sentiment"]
    for name, default in defaults.items():
        assert re.search(rf"--{name.replace('_', '-')} .*?by default {re.escape(default)}\.", said), name


def test_methods_that_cannot_be_read():
    for text in ("card", "best_of_n:3", "best_of_n:n=x"):
        with pytest.raises((SettingsError, ValueError)):
            as_decoding(text)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "cards generate: give a prompt"),
        (["Hi", "--temperature", "-1"], "temperature=-1.0: Input should be greater"),
        (["Hi", "--max-tokens", "0"], "max_tokens=0: Input should be greater"),
        (["Hi", "--decoding", "cards:beta=-1"], "decoding.beta=-1: "),
        (["Hi", "--reward", "nosuch"], "The reward 'nosuch' is not known."),  # longer than a terminal is wide
        (["Hi", "--config", "bad.yaml"], "max_tokens='x': Input should be a valid integer"),
    ],
)
def test_errors_are_one_line_and_the_exit_code_says_so(tmp_path, monkeypatch, failed, words, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    Path("bad.yaml").write_text("max_tokens: x")
    said = failed("generate", *words).err
    assert said.startswith(f"SettingsError: {told}")
    assert said.count("\n") == 1


def test_the_version_is_that_of_the_package():
    assert run("--version").stdout == f"{version('cards-integrations')}\n"


def test_the_doctor_says_what_is_there_and_what_a_step_costs(config):
    found = json.loads(run("doctor", "--config", config, "--set", "engine={width: auto}", "--json").stdout)
    assert found["packages"]["torch"] == version("torch")
    times = found["model"]["milliseconds of a step"]
    assert [*times] == [*map(str, POINTS)]
    assert all(seconds > 0 for seconds in times.values())
    ratio = found["advice"][-1].partition(" takes ")[2].partition(" times")[0]
    assert float(ratio) > 0
    shown = run("doctor", "--config", config, "--set", "engine={width: 2}").stdout
    assert "Steps are not timed" in shown
    assert f"python: {sys.version.split()[0]}" in shown


def test_a_pipe_is_the_prompt(config):
    expected = run("generate", "Hello", "--config", config).stdout
    assert run("generate", "--config", config, input="Hello\n").stdout == expected


def test_options_of_sampling_reach_the_answer(config):
    plain = run("generate", "Hello", "--config", config).stdout.strip()
    greedy = {run("generate", "Hello", "--config", config, "--top-k", "1", "--seed", str(s)).stdout for s in range(2)}
    assert len(greedy) == 1
    middle = plain[len(plain) // 2 :][:3]
    stopped = run("generate", "Hello", "--config", config, "--stop", middle).stdout.strip()
    assert stopped == plain[: plain.index(middle)].strip()
    nucleus = run("generate", "Hello", "--config", config, "--top-p", "1e-9").stdout
    assert nucleus in greedy


def test_a_system_message_comes_before_each_prompt(config, tmp_path):
    with CardsLLM.from_settings(config) as llm:
        said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
        expected = llm.align(said).text
        assert expected != llm.align("Hello").text
    assert run("generate", "Hello", "--system", "Be brief.", "--config", config).stdout == expected + "\n"
    (prompts := tmp_path / "in.txt").write_text("Hello\n")
    rows = run("generate", "--prompts", str(prompts), "--system", "Be brief.", "--config", config).stdout
    assert json.loads(rows)["text"] == expected


def test_a_bad_variable_is_one_line(monkeypatch, failed):
    monkeypatch.setenv("CARDS_MAX_TOKENS", "x")
    assert failed("generate", "Hi").err.startswith("SettingsError: max_tokens='x': Input should be a valid integer")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is full is needed")
def test_a_full_disk_is_one_line_and_the_answer_is_not_lost(config, failed):
    (expected,) = answers(config, ["Hello"])
    shown = failed("generate", "Hello", "--config", config, "--trace", "/dev/full")
    assert shown.out == expected + "\n"
    assert shown.err == "OSError: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    "words",
    [
        *(["generate", "Hi", "--trace"], ["generate", "--prompts", "in.txt", "--out"]),
        *(["compare", "in.txt", "--out"], ["compare", "in.txt", "--report"], ["judge", "a.jsonl", "b.jsonl", "--out"]),
        *(["calibrate", "--out"], ["calibrate", "--report"], ["train-value", "in.txt", "--out"]),
    ],
    ids=" ".join,
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(words, tmp_path, monkeypatch):
    monkeypatch.setattr(CardsLLM, "__init__", None)
    assert "There is no folder '/nowhere'" in run(*words, "/nowhere/file", code=2).stderr
    assert "is a directory" in run(*words, "/", code=2).stderr


def test_a_trained_value_head_guides(config, tmp_path):
    prompts, head = tmp_path / "prompts.txt", tmp_path / "head.safetensors"
    prompts.write_text("".join(f"Tell me about {number}\n" for number in range(24)))
    told = run("train-value", str(prompts), "--config", config, "--out", str(head)).stdout
    assert "Pearson" in told
    assert "18 prompts" in told
    reward = json.dumps({"kind": "value", "path": str(head)})
    answer = run("generate", "Hi", "--config", config, "--reward", reward, "--decoding", "best_of_n:n=2", "--json")
    assert json.loads(answer.stdout)["usage"]["rm_forwards"] == 0


def test_help_is_quick_to_import():
    code = "import sys, cards_integrations.cli; print('torch' in sys.modules, 'langchain_core' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "False False\n"
