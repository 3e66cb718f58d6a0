"""Shows on stderr what takes long while it runs: in a terminal, in a notebook, or with one line in a log.

    with phase("timing the steps of smollm2"):
        ...

A phase appears once it has taken `APPEARS_AFTER` seconds. One thread draws all phases of the process; it runs only
while there are phases. Nothing is written to stdout.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

APPEARS_AFTER = 0.3  # seconds; shorter phases are never shown
LONG = 2.0  # seconds; longer phases leave a line
PERIOD = 0.25  # seconds between two drawings

Advance = Callable[[], None]
"""Is called when a step of a phase is done."""

_shown: ContextVar[bool] = ContextVar("progress_shown", default=True)
_counted: ContextVar[bool] = ContextVar("answers_counted", default=False)


def wanted() -> bool:
    """Return whether the environment (`CARDS_PROGRESS`) allows progress; for phases before there are settings."""
    return os.environ.get("CARDS_PROGRESS", "1").lower() not in ("0", "false", "off", "no", "f", "n")


@contextmanager
def shown(wanted: bool) -> Iterator[None]:
    """Hide phases that begin inside the block, in this thread and in those it starts, unless they are wanted."""
    token = _shown.set(_shown.get() and wanted)
    try:
        yield
    finally:
        _shown.reset(token)


@contextmanager
def phase(what: str, total: int | None = None, *, lasting: bool = True) -> Iterator[Advance]:
    """Show a phase for as long as the block runs.

    Phases with the same name are shown as one, with the sum of their steps.

    Args:
        what: The name of the phase, as in "loading smollm2".
        total: The number of steps; None for a phase without steps. With a total, answers that are written inside the
            block are not counted as a phase of their own.
        lasting: Whether a long phase leaves a line that says how long it took.

    Yields:
        A function to be called after each step.
    """
    if not _shown.get():
        yield _nothing
        return
    begun, token = _board.begin(what, total, lasting), _counted.set(_counted.get() or total is not None)
    try:
        yield begun.advance
    finally:
        _counted.reset(token)
        _board.end(begun)


@contextmanager
def answering(total: int = 1, wanted: bool = True) -> Iterator[Advance]:
    """Show a phase whose steps are answers, those of all callers together; nothing inside of a phase with steps.

    Args:
        total: The number of answers.
        wanted: False shows nothing.

    Yields:
        A function to be called after each answer.
    """
    if _counted.get() or not wanted:
        yield _nothing
        return
    with phase("answering", total, lasting=False) as advance:
        yield advance


def _nothing() -> None:
    pass


@dataclass
class Phase:
    """Work that is shown while it runs.

    Attributes:
        what: Its name, as the user reads it.
        total: The number of steps; None if it has none.
        lasting: Whether it leaves a line if it takes long.
        done: The number of steps that are done.
        users: How many blocks with this name are running.
        began: When it began, in seconds of the monotonic clock.
        ended: When it ended, in seconds of the monotonic clock; None while it runs.
        said: True once its line is in a log.
    """

    what: str
    total: int | None
    lasting: bool
    done: int = 0
    users: int = 0
    began: float = field(default_factory=time.monotonic)
    ended: float | None = None
    said: bool = False

    def advance(self) -> None:
        """Count a step."""
        self.done += 1

    @property
    def seconds(self) -> float:
        """Seconds since it began, or from its beginning to its end."""
        return (self.ended or time.monotonic()) - self.began

    @property
    def count(self) -> str:
        """The steps done and all steps, as in "3/8"; "" if there are fewer than two."""
        return f"{self.done}/{self.total}" if self.total and self.total > 1 else ""


class Screen(Protocol):
    """Where phases are shown. There is a new one whenever a phase begins while there is none."""

    def draw(self, phases: Sequence[Phase]) -> None:
        """Show the phases that are running."""

    def leave(self, phase: Phase) -> None:
        """Leave a line for a long phase that has ended."""

    def close(self) -> None:
        """Remove what is shown of running phases."""


class Board:
    """All phases of the process."""

    def __init__(self) -> None:
        self._phases: dict[str, Phase] = {}
        self._screen: Screen | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._closed = False

    def begin(self, what: str, total: int | None, lasting: bool) -> Phase:
        """Add a phase, or join the one of this name."""
        with self._changed:
            if (found := self._phases.get(what)) is None:
                found = self._phases[what] = Phase(what, total, lasting)
            elif total is not None:
                found.total = (found.total or 0) + total
            found.users += 1
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._draw, name="cards-progress", daemon=True)
                self._thread.start()
            return found

    def end(self, phase: Phase) -> None:
        """Remove a phase once the last block with its name has ended; its drawing is gone when this returns."""
        with self._changed:
            phase.users -= 1
            if phase.users:
                return
            self._phases.pop(phase.what, None)  # a fork inside the phase has another board
            phase.ended = time.monotonic()
            if self._screen is not None:
                with suppress(Exception):  # a stream that is closed must not end an answer
                    if not self._visible:
                        self._screen.close()
                    if phase.lasting and phase.seconds >= LONG:
                        self._screen.leave(phase)
            if not self._phases:
                self._screen = None
                self._changed.notify()

    def close(self) -> None:
        """Stop drawing: a thread that writes while the interpreter exits would crash it."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _draw(self) -> None:
        while True:
            with self._changed:
                if not self._phases or self._closed:
                    self._thread = None
                    return
                visible, screen = self._visible, self._screen
                if visible and screen is not None:
                    with suppress(Exception):
                        screen.draw(visible)
                if screen is not None or not visible:
                    self._changed.wait(PERIOD)
                    continue
            try:
                screen = _screen()  # without the lock, as importing rich takes time
            except Exception:
                screen = NoScreen()
            with self._changed:
                self._screen = screen if self._phases else None

    @property
    def _visible(self) -> list[Phase]:
        return [phase for phase in self._phases.values() if phase.seconds >= APPEARS_AFTER]


def _screen() -> Screen:
    """Return the screen that suits stderr."""
    if sys.stderr is None:  # a process without streams
        return NoScreen()
    from rich.console import Console

    as_table([Phase("", 2, lasting=False)])  # imports all that drawing needs
    if (shell := sys.modules.get("IPython")) and hasattr(shell.get_ipython(), "kernel"):
        return NotebookScreen()
    console = Console(stderr=True)
    is_terminal = sys.stderr.isatty() and not console.is_dumb_terminal  # console.is_terminal goes by FORCE_COLOR
    return TerminalScreen(console) if is_terminal else LogScreen()


class TerminalScreen:
    """A line for each phase, redrawn in place.

    Args:
        console: The console of stderr.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Live | None = None
        self._phases: Sequence[Phase] = ()

    def draw(self, phases: Sequence[Phase]) -> None:
        from rich.live import Live

        self._phases = phases
        if self._live is None:
            self._live = Live(
                get_renderable=lambda: as_table(self._phases), console=self.console, transient=True,
                auto_refresh=False, redirect_stdout=False, redirect_stderr=False,
            )  # fmt: skip
            self._live.start()
        self._live.refresh()

    def leave(self, phase: Phase) -> None:
        if self._live is not None:
            self.draw([other for other in self._phases if other is not phase])
        self.console.print(as_table((), [phase]))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


class NotebookScreen:
    """An output of the cell, replaced as phases go on; lines of long phases stay in it."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._left: list[Phase] = []

    def draw(self, phases: Sequence[Phase]) -> None:
        from IPython.display import display

        table = as_table(phases, self._left)
        if self._handle is None:
            self._handle = display(table, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(table)

    def leave(self, phase: Phase) -> None:
        self._left.append(phase)
        self.draw(())

    def close(self) -> None:
        if self._handle is not None:
            self.draw(())


class NoScreen:
    """Shows nothing."""

    def draw(self, phases: Sequence[Phase]) -> None:
        pass

    def leave(self, phase: Phase) -> None:
        pass

    def close(self) -> None:
        pass


class LogScreen(NoScreen):
    """One line for each long phase that would leave one, in a stream that is no terminal."""

    def draw(self, phases: Sequence[Phase]) -> None:
        for phase in phases:
            if phase.lasting and not phase.said and phase.seconds >= LONG:
                phase.said = True
                print(f"cards: {phase.what} ...", file=sys.stderr, flush=True)


def as_table(phases: Sequence[Phase], ended: Sequence[Phase] = ()) -> Table:
    """Return a table of phases that have ended, then of those that are running: name, seconds, and steps."""
    from rich.progress_bar import ProgressBar
    from rich.spinner import Spinner
    from rich.table import Table

    table = Table.grid(padding=(0, 1))
    for part in ("spinner", "what", "seconds", "bar", "count"):
        table.add_column(no_wrap=part != "what")  # the name is shortened if there is no room
    for phase in ended:
        table.add_row("[green]✓[/green]", _shortened(phase.what), f"[dim]{_duration(phase.seconds)}[/dim]")
    for phase in phases:
        spinner = Spinner("dots", style="cyan")
        spinner.start_time = 0.0
        bar = ProgressBar(phase.total, phase.done, width=20) if phase.count else ""
        table.add_row(spinner, _shortened(phase.what), f"[cyan]{_duration(phase.seconds)}[/cyan]", bar, phase.count)
    return table


def _shortened(what: str) -> Text:
    from rich.text import Text

    return Text(what, no_wrap=True, overflow="ellipsis")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes else f"{seconds:.1f} s"


_board = Board()
atexit.register(lambda: _board.close())


def _renew() -> None:
    """Replace the board in a forked child, which has neither its phases nor the thread that draws."""
    global _board
    _board = Board()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
