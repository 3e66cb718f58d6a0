"""Install into .venv what this checkout pins; say meanwhile what is installed, and how long it takes (`make setup`).

It imports nothing but the standard library, for nothing else is there yet.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
BIN = HERE / ".venv" / "bin"
WATCHED = sys.stdout.isatty()
SAYS_WHERE = re.compile(r"\s*(?:Collecting|Downloading|Installing) .*")


class Step:
    """A line that says what is done, for how long, and in a terminal also where pip is."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.where = ""
        self.began = time.monotonic()
        self.ended = threading.Event()

    def line(self) -> str:
        return f"  {self.what:<24}{time.monotonic() - self.began:5.0f} s"

    def redraw(self) -> None:
        while not self.ended.wait(0.2):
            print(f"\r\033[K{self.line()}  {self.where[:48]}", end="", flush=True)


@contextmanager
def step(what: str) -> Iterator[Step]:
    """Show a step while it is taken; a log gets a line when it begins and its time when it has ended."""
    shown = Step(what)
    drawing = threading.Thread(target=shown.redraw, daemon=True)
    if WATCHED:
        drawing.start()
    else:
        print(f"  {what} ...", flush=True)
    try:
        yield shown
    finally:
        shown.ended.set()
        if WATCHED:
            drawing.join()
        print(("\r\033[K" if WATCHED else "") + shown.line(), flush=True)


def run(what: str, *command: str | Path) -> None:
    """Run a command as a step; one that fails ends all of it, with its last words."""
    said: list[str] = []
    with step(what) as shown:
        process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in process.stdout or ():
            said.append(line)
            if SAYS_WHERE.match(line):
                shown.where = line.strip()
        failed = process.wait()
    if failed:
        sys.exit("".join(said[-20:]) + f"{' '.join(map(str, command))} has failed.")


def main() -> None:
    """Make the environment, then install what is locked, torch and this package."""
    began = time.monotonic()
    locked = re.findall(r"^\S+==", (HERE / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE)
    pip = (BIN / "pip", "--disable-pip-version-check", "--no-input", "install", "--progress-bar=off")
    print("Installing into .venv, once:", flush=True)
    if not (BIN / "pip").exists():
        run("a virtual environment", sys.executable, "-m", "venv", ".venv")
    run(f"{len(locked)} pinned packages", *pip, "--no-deps", "--require-hashes", "--requirement=requirements.lock")
    run("torch", *pip, "--constraint=constraints.txt", "torch")
    run("this package", *pip, "--no-deps", "--no-build-isolation", "--editable=.")
    print(f"All installed in {time.monotonic() - began:.0f} s.", flush=True)


if __name__ == "__main__":
    main()
