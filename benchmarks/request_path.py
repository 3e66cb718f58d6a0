"""Which files a request enters, in order: from `llm.invoke` to its first kept segment.

    python benchmarks/request_path.py            # this checkout
    PYTHONPATH=OTHER python benchmarks/request_path.py --models ../shared/models    # another one

Prints the files in the order of the first call into each of them, grouped by room (folder or single file).
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections import Counter
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler

import cards_integrations
from cards_integrations import CardsLLM
from cards_integrations.decoding import Cards
from cards_integrations.engine import EngineSettings
from cards_integrations.rewards import ClassifierReward

PACKAGE = Path(cards_integrations.__file__).parent


class FirstCalls(BaseCallbackHandler):
    """Records the files of the package that are called into, in all threads it is installed in."""

    def __init__(self) -> None:
        self.files: dict[str, None] = {}
        self.recording = True

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        file = frame.f_code.co_filename
        if self.recording and event == "call" and file.startswith(str(PACKAGE)):
            self.files[Path(file).relative_to(PACKAGE).as_posix()] = None

    def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
        """Stop at the first kept segment."""
        self.recording = False


def first_calls(llm: CardsLLM) -> list[str]:
    """The files that one request enters, in order."""
    llm.invoke("Hello")  # everything is loaded
    calls, installed = FirstCalls(), threading.Event()
    worker: Any = llm._engine({})._worker
    worker.loop.call_soon_threadsafe(lambda: (sys.setprofile(calls), installed.set()))
    installed.wait()
    sys.setprofile(calls)
    llm.invoke("Once upon a time", config={"callbacks": [calls]})
    sys.setprofile(None)
    return list(calls.files)


def room(file: str) -> str:
    """The folder of a file, or the file itself at the top."""
    return file.partition("/")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path(__file__).parents[2] / "shared" / "models")
    models = parser.parse_args().models
    reward = ClassifierReward(model=str(models / "rm-sentiment-stories260k"))
    decoding = Cards(target_reward=0.3, beta=0.2)
    engine = EngineSettings(device="cpu", dtype="float32", width=2)
    model = str(models / "stories260k")
    with CardsLLM(model=model, reward=reward, decoding=decoding, seed=1, max_tokens=24, engine=engine) as llm:
        files = first_calls(llm)
    visits = [(name, list(entered)) for name, entered in groupby(files, room)]
    again = {name: times for name, times in Counter(name for name, _ in visits).items() if times > 1}
    print(f"{len(files)} files in {len({name for name, _ in visits})} rooms; entered again: {again}")
    for name, entered in visits:
        print(f"  {name}: {', '.join(file.partition('/')[2] or file for file in entered)}")


if __name__ == "__main__":
    main()
