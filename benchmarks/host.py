"""What the host does beside the model's forward: layout, sampling, scheduling, the loop and the books.

    python benchmarks/host.py [--against ../before] [--runs 9]

Sixty-four tiny requests at once, plain sampling with `width=1` from a small random model, float32, one thread of the
CPU; CPU time, so that a busy machine counts less. Prints, and writes to results/host.json, the medians over all runs:

step        milliseconds from one forward of all 64 to the next, without the model's own
model       milliseconds of the model's own forward, that is of transformers and the attention
whole       of the whole process, without the model's own, for each forward: with what begins and ends a request

once with one sampler for all, once with 64 temperatures, and once with four thresholds of uncertainty beside them.
With --against, another checkout does the same in a process of its own, in turns with this one; the ratios are
medians of those of neighbouring runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cards_integrations.engine import Request

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
REQUESTS, TOKENS = 64, 96
LIMITS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
KINDS = ("one sampler", "64 temperatures", "64 temperatures, 4 thresholds")
PARTS = ("step", "model", "whole")


# --- the worker: a line comes in for each run, and one goes out ---


@dataclass
class Watch:
    """Notes when the forwards of all requests begin and end, in seconds of the engine's thread."""

    spans: list[tuple[float, float, int]] = field(default_factory=list)

    def install(self) -> None:
        from cards_integrations.transformer.forward import Transformer

        run = Transformer._run

        def watched(transformer: Any, model: Any, tensors: Any, *args: Any, **options: Any) -> Any:
            began = time.thread_time()
            try:
                return run(transformer, model, tensors, *args, **options)
            finally:
                self.spans.append((began, time.thread_time(), tensors["ids"].numel()))

        Transformer._run = watched  # type: ignore[method-assign]

    def found(self, seconds: float) -> dict[str, float]:
        """Milliseconds of each part, in a run of so many seconds of the process."""
        pairs = zip(self.spans, self.spans[1:], strict=False)
        between = [after[0] - before[1] for before, after in pairs if before[2] == after[2] == REQUESTS]
        model = [end - began for began, end, _ in self.spans]
        alike = [end - began for began, end, tokens in self.spans if tokens == REQUESTS]
        parts = statistics.mean(between), statistics.mean(alike), (seconds - sum(model)) / len(alike)
        return {part: 1000 * each for part, each in zip(PARTS, parts, strict=True)}


def requests(kind: str) -> list[Request]:
    from cards_integrations.decoding import Sampling, SegmentBestOfN, Uncertainty
    from cards_integrations.engine import Request
    from cards_integrations.models.sampling import Sampler
    from cards_integrations.rewards import LengthReward

    made = []
    for i in range(REQUESTS):
        sampler = Sampler() if kind == KINDS[0] else Sampler(temperature=0.6 + i / 200)
        method: Any = Sampling()
        if kind == KINDS[2]:
            boundary = Uncertainty(threshold=9.0 + i % 4, min_length=1, max_length=8)  # never reached
            method = SegmentBestOfN(n=1, boundary=boundary)
        reward = LengthReward(target=9) if kind == KINDS[2] else None
        made.append(Request(f"w9 w20 w31 w{6 + i % 40}", method, reward, sampler, TOKENS, seed=i))
    return made


def work() -> None:
    """Answer each line of the input by one of the output, until the input ends."""
    sys.path.insert(0, str(Path.cwd() / "tests"))
    import tiny
    import torch

    from cards_integrations.engine import Engine, EngineSettings
    from cards_integrations.models.local.settings import LocalModel

    torch.set_num_threads(1)
    out, watch = sys.stdout, Watch()
    watch.install()
    settings = EngineSettings(device="cpu", dtype="float32", threads=1, width=1, max_rows=REQUESTS, prefix_reuse=False)
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        model = tiny.causal(eos_token_id=None, max_position_embeddings=4096)
        path = tiny.save(Path(folder), model, tiny.words(eos_token=None))
        with contextlib.closing(Engine(LocalModel(model=path), settings)) as engine:
            for line in sys.stdin:
                asked = requests(json.loads(line))
                watch.spans.clear()
                began = time.process_time()
                engine.run_many(asked)
                print(json.dumps(watch.found(time.process_time() - began)), file=out, flush=True)


# --- one or two of them ---


class Worker:
    """A process that measures one checkout."""

    def __init__(self, checkout: Path) -> None:
        environment = {**os.environ, **LIMITS, "PYTHONPATH": str(checkout)}
        command = [sys.executable, str(Path(__file__).resolve()), "--work"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=checkout, env=environment,
        )  # fmt: skip

    def run(self, kind: str) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(kind) + "\n")
        self.process.stdin.flush()
        found: dict[str, float] = json.loads(self.process.stdout.readline())
        return found

    def close(self) -> None:
        self.process.communicate()


def measured(checkouts: list[Path], kind: str, runs: int) -> list[list[dict[str, float]]]:
    """The runs of each checkout, in turns; the first of each only warms up."""
    workers = [Worker(checkout) for checkout in checkouts]
    try:
        found = [[worker.run(kind) for worker in workers] for _ in range(runs + 1)]
    finally:
        for worker in workers:
            worker.close()
    return [list(each) for each in zip(*found[1:], strict=True)]


def summary(found: list[list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of each part, here and against the other checkout, and of the ratios of neighbouring runs."""
    names = ("here", "against")[: len(found)]
    table: dict[str, Any] = {
        name: {part: round(statistics.median(run[part] for run in runs), 3) for part in PARTS}
        for name, runs in zip(names, found, strict=True)
    }
    if len(found) == 2:
        pairs = list(zip(*found, strict=True))
        ratios = {part: statistics.median(here[part] / there[part] for here, there in pairs) for part in PARTS}
        table["ratio"] = {part: round(ratio, 3) for part, ratio in ratios.items()}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work()
        return
    checkouts = [ROOT] + ([options.against.resolve()] if options.against else [])
    results = {}
    for kind in KINDS:
        results[kind] = summary(measured(checkouts, kind, options.runs))
        for name, parts in results[kind].items():
            print(f"{kind:30} {name:8}", *(f"{part} {value:6.2f}" for part, value in parts.items()), flush=True)
    (RESULTS / "host.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
