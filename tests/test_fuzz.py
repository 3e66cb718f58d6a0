"""Hostile input: an answer, or an error that says what is wrong. What was found before is tried again."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fuzz

from cards_integrations import picture
from cards_integrations.chat.message import as_prompt
from cards_integrations.chat.tool_formats import FORMATS
from cards_integrations.chat.tool_reader import ToolReader
from cards_integrations.chat.tools import as_tools
from cards_integrations.errors import CardsError

pytestmark = pytest.mark.slow

CORPUS = sorted((Path(__file__).parent / "fuzz_corpus").glob("*.json"))
GOOD = ("answered", "refused", "framework")
OPEN = [entry for file in CORPUS if (entry := json.loads(file.read_text(encoding="utf-8"))).get("open")]
"""Those that still fail; whoever hints one takes `open` out of its file."""
QUICK = {
    "messages as dicts": 30, "LangChain messages": 20, "LlamaIndex messages": 30, "settings": 60, "environment": 20,
    "numbers that answers are made with": 20, "stop strings": 30, "contexts": 20, "replies of reward servers": 60,
    "what a model writes": 60, "what a judge writes": 60, "traces as HTML": 60,
}  # fmt: skip


@pytest.fixture(scope="module")
def world() -> Iterator[fuzz.World]:
    world = fuzz.World()
    yield world
    world.close()


def marked(file: Path) -> Any:
    entry = json.loads(file.read_text(encoding="utf-8"))
    strict = sys.version_info < (3, 12)  # later ones recurse further
    marks = [pytest.mark.xfail(strict=strict, reason=entry["found"])] if entry.get("open") else []
    return pytest.param(file, id=file.stem, marks=marks)


@pytest.mark.parametrize("file", [marked(file) for file in CORPUS])
def test_what_was_found_before(file: Path, world: fuzz.World) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))
    outcome = fuzz.tried(found["surface"], found["case"], world)
    assert outcome.kind in GOOD, outcome


def known(outcome: fuzz.Outcome) -> bool:
    """Is it the failure of an open case of the corpus, at the same place?"""
    told = outcome.told.partition(":")[0][:11]
    return any(outcome.place in entry["found"] and entry["found"].startswith(told) for entry in OPEN)


@pytest.mark.parametrize("name", QUICK)
def test_a_quick_random_part(name: str, world: fuzz.World) -> None:
    for case in fuzz.cases(name, QUICK[name], seed=1):
        outcome = fuzz.tried(name, case, world)
        assert outcome.kind in GOOD or known(outcome), (outcome, case)


def test_the_runner_notices_what_it_is_there_for(world: fuzz.World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback, a hang and markup from a text are failures; an answer and a refusal are none."""

    def raises(case: Any, world: Any) -> None:
        raise case["error"]

    def never(case: Any, world: Any) -> None:
        while True:
            pass

    def marks(case: Any, world: Any) -> None:
        fuzz.escaped(f"<p title='{fuzz.CANARY}'>{fuzz.CANARY}</p>")

    def loses(case: Any, world: Any) -> None:
        fuzz.escaped("<p></p>")

    for take, case, kind in (
        (raises, {"error": KeyError("x")}, "failed"),
        (raises, {"error": CardsError("x")}, "refused"),
        (raises, {"error": CardsError("x" * 2_000_000)}, "failed"),
        (never, {}, "hang"),
        (marks, {}, "failed"),
        (loses, {}, "failed"),
    ):
        monkeypatch.setitem(fuzz.SURFACES, "this one", fuzz.Surface(dict, take))
        assert fuzz.tried("this one", case, world, limit=0.2).kind == kind


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150)
@given(PLAIN, st.sampled_from(["user", "assistant", "system", "tool"]))
def test_any_text_is_a_prompt_or_refused(content: Any, role: str) -> None:
    try:
        prompt = as_prompt([{"role": role, "content": content}])
    except CardsError:
        assert not isinstance(content, str) or not content
    else:
        assert isinstance(prompt, list)
        (message,) = prompt
        assert isinstance(message["content"], str)


@settings(max_examples=150)
@given(st.sampled_from(sorted(FORMATS)), st.lists(st.sampled_from(fuzz.WRITTEN[:24]) | st.text(max_size=9), max_size=8))
def test_what_is_streamed_of_calls_is_what_the_whole_text_calls(name: Any, parts: list[str]) -> None:
    tools = as_tools([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}])
    reader, text = ToolReader(tools, FORMATS[name]), ""
    calls: list[Any] = []
    for number, part in enumerate(parts):
        text += part
        calls += reader.update(text, number == len(parts) - 1)[1]
    assert calls == list(reader.parse(text).calls)


@settings(max_examples=60)
@given(st.text(max_size=60))
def test_any_text_is_only_text_in_html(text: str) -> None:
    case = {"segments": [], "calls": [], "model": text + fuzz.CANARY, "method": text, "text": f"<{fuzz.CANARY} {text}>"}
    fuzz.escaped(picture.page(fuzz.alignment(case)), times=2)
