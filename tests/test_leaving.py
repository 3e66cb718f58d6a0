"""The end of the interpreter waits for native code that loads, and cuts it short."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

LEAVING = """
import faulthandler, sys, threading, time
import torch
from cards_integrations import threads
from cards_integrations.decoding import BestOfN, Sampling
from cards_integrations.engine import Engine, EngineSettings, Request, worker
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.rewards import Reward

threads.EXIT_PATIENCE = 0.2
begun = threading.Event()

def works(*args):
    numbers = torch.randn(300, 300)
    try:
        while True:
            numbers = (numbers @ numbers).tanh()
            begun.set()
    finally:
        print("given up", flush=True)

def waits(*args):
    begun.set()
    threading.Event().wait()

class Slow(Reward):
    kind: str = "slow"

    def build(self, loader):
        {"works": works, "waits": waits}[how]()

model, what, how = sys.argv[1:]
if what == "model":
    worker.build_model = {"works": works, "waits": waits}[how]
engine = Engine(LocalModel(model=model), EngineSettings(device="cpu"))
request = Request("w9", BestOfN(n=2), Slow(), max_tokens=4) if what == "reward" else Request("w9", Sampling())
engine.submit(request)
assert begun.wait(60)
faulthandler.dump_traceback_later(30, exit=True)
print("leaving", flush=True)
"""


@pytest.mark.parametrize(("how", "said"), [("works", ["leaving", "given up"]), ("waits", ["leaving"])])
@pytest.mark.parametrize("what", ["model", "reward"])
def test_leaving_while_something_is_loaded(models: Callable[..., str], what: str, how: str, said: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAVING, models("llama"), what, how],
        capture_output=True, text=True, timeout=120, env=os.environ.copy(),
    )  # fmt: skip
    assert (done.returncode, done.stdout.split("\n")[:-1]) == (0, said), done.stderr
    assert "Fatal" not in done.stderr
    assert "Traceback" not in done.stderr
