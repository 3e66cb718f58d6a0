"""What takes long is shown on stderr while it runs; transformers is quiet in the thread that loads, and only there."""

from __future__ import annotations

import io
import logging
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import faces
import pytest
from conftest import Start
from rich.console import Console
from transformers.utils import logging as transformers_logging

from cards_integrations import CardsLLM, ChatCards, progress
from cards_integrations.decoding import BestOfN
from cards_integrations.engine import Engine, EngineSettings, Request
from cards_integrations.models.local.load_lock import load_lock
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.progress import Board, LogScreen, NotebookScreen, Phase, TerminalScreen, answering, phase, shown
from cards_integrations.rewards import FunctionReward


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all phases that begin."""
    names: list[str] = []
    monkeypatch.setattr(progress, "_board", Board())  # answers of other tests may hang for ever
    begin = Board.begin

    def noted(self: Board, what: str, total: int | None, lasting: bool) -> Phase:
        names.append(what)
        return begin(self, what, total, lasting)

    monkeypatch.setattr(Board, "begin", noted)
    return names


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long is what takes a twentieth of a second."""
    for name, seconds in {"APPEARS_AFTER": 0.01, "LONG": 0.05, "PERIOD": 0.01}.items():
        monkeypatch.setattr(progress, name, seconds)


@pytest.mark.usefixtures("fast")
def test_a_log_gets_one_line_for_each_long_phase_and_stdout_none(capsys):
    with phase("loading it"):
        time.sleep(0.3)
    with phase("loading nothing"):
        pass
    with answering():
        time.sleep(0.3)
    with shown(False), phase("loading unseen"):
        time.sleep(0.3)
    assert capsys.readouterr() == ("", "cards: loading it ...\n")


def test_a_terminal_shows_what_goes_on_and_keeps_what_took_long():
    script = (
        "import time; from cards_integrations import progress as p; p.LONG = 0.8; p.PERIOD = 0.05\n"
        "with p.phase('loading [it]'): time.sleep(1)\n"
        "with p.phase('loading that'): time.sleep(0.5)\n"
        "print('the answer')"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    ran = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=theirs, env=environment, check=True, text=True
    )
    os.close(theirs)
    drawn = os.read(ours, 2**16).decode()
    assert ran.stdout == "the answer\n"
    assert drawn.count("loading [it]") > 3
    assert "loading that" in drawn
    [last] = [line for line in drawn.split("\n") if "✓" in line]
    assert "loading [it]" in last
    assert "\x1b[?25h" in drawn.rpartition("\x1b[?25l")[2]  # the cursor is back


def test_a_terminal_counts_and_clears():
    screen = TerminalScreen(Console(file=(file := io.StringIO()), force_terminal=True, width=80))
    waiting = Phase("measuring", 8, lasting=True)
    for _ in range(3):
        waiting.advance()
    screen.draw([waiting, Phase("timing", None, lasting=True)])
    screen.close()
    drawn, _, cleared = file.getvalue().rpartition("\x1b[?25h")
    assert "3/8" in drawn
    assert "timing" in drawn
    assert cleared.count("\x1b[2K") == 2


def test_a_notebook_has_one_output_that_changes(monkeypatch):
    shows: list[Any] = []

    class Handle:
        update = staticmethod(shows.append)

    def display(what: Any, display_id: bool) -> Handle:
        shows.append(what)
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    screen, loading = NotebookScreen(), Phase("loading", None, lasting=True)
    screen.draw([loading])
    screen.leave(loading)
    screen.draw([Phase("answering", 4, lasting=False)])
    screen.close()
    texts = [show._repr_mimebundle_((), ())["text/plain"] for show in shows]
    assert ["loading" in text for text in texts] == [True] * 4
    assert ["0/4" in text for text in texts] == [False, False, True, False]


def test_answers_are_counted_together_but_not_where_a_phase_counts_them(begun):
    seen: list[str] = []
    inside = threading.Barrier(3)

    def answer() -> None:
        with answering() as advance:
            inside.wait()
            [found] = progress._board._phases.values()
            seen.append(found.count)
            inside.wait()
            advance()

    threads = [threading.Thread(target=answer) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["0/3"] * 3
    with phase("comparing", 2), answering():
        pass
    assert begun == ["answering"] * 3 + ["comparing"]
    assert progress._board._phases == {}


def test_a_screen_that_cannot_be_drawn_ends_no_answer(monkeypatch):
    def broken(*_: object) -> None:
        raise OSError("no terminal")

    monkeypatch.setattr(progress, "APPEARS_AFTER", 0.0)
    monkeypatch.setattr(LogScreen, "draw", broken)
    with phase("loading"):
        time.sleep(0.4)


def short(prompt: str, answers: list[str]) -> list[float]:
    return [-float(len(answer)) for answer in answers]


def test_an_engine_shows_loading_measuring_and_answering(start: Start, models: Callable[..., str], begun) -> None:
    engine = start(models("llama"))
    request = Request("w1", BestOfN(n=2), FunctionReward(function=short), max_tokens=4)
    engine.run(request)
    assert f"loading {models('llama')}" == begun[0]
    assert "loading reward 'function short'" in begun
    assert begun[-1] == "answering"
    begun.clear()
    list(engine.stream(request))
    list(engine.stream_many([request]))
    assert "answering" not in begun  # the caller sees what comes
    engine.progress = False
    begun.clear()
    engine.run(request)
    assert begun == []


@pytest.mark.parametrize("face", [CardsLLM, ChatCards])
def test_progress_is_an_option(face, monkeypatch, begun):
    monkeypatch.setenv("CARDS_PROGRESS", "0")
    assert face().progress is False
    assert face(progress=True).progress is True
    assert Engine(LocalModel(), EngineSettings()).progress is False
    with faces.cards_llm(max_tokens=4, progress=False) as llm:
        llm.align("Hello")
        llm.align_batch(["Hello"], progress="greeting")
    assert begun == []
    with faces.cards_llm(max_tokens=4, progress=True) as llm:
        llm.align("Hello", progress=False)
        assert begun == []
        llm.align_batch(["Hello", "World"], progress="greeting")
    assert "greeting" in begun
    assert "answering" not in begun


def test_transformers_is_quiet_only_where_this_package_loads(monkeypatch):
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)
    logger = transformers_logging.get_logger("transformers.some_model")
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    root, ear = logging.getLogger("transformers"), Ear()
    root.addHandler(ear)
    before = (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled())
    bars: list[Any] = []

    def load_elsewhere() -> None:
        logger.warning("a neighbour's")
        bars.append(transformers_logging.tqdm([1], disable=True))

    try:
        with load_lock(), load_lock():
            logger.warning("ours")
            logger.error("an error of ours")
            bars.append(transformers_logging.tqdm([1], desc="ours"))
            neighbour = threading.Thread(target=load_elsewhere)
            neighbour.start()
            neighbour.join()
            assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
        logger.warning("later")
    finally:
        root.removeHandler(ear)
    assert heard == ["an error of ours", "a neighbour's", "later"]
    assert isinstance(bars[0], transformers_logging.EmptyTqdm)
    assert not isinstance(bars[1], transformers_logging.EmptyTqdm)
    assert ear.filters == []
    assert transformers_logging.set_tqdm_hook(None) is None
