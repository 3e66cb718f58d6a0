"""A step of SmolLM2 here against one of llama.cpp on the same GGUF file: the forward alone, for 1, 4 and 16 texts.

    python benchmarks/llama_cpp.py --python ENVIRONMENT/bin/python [--threads 1] [--steps 40]
        [--results benchmarks/results/llama-cpp.json]

ENVIRONMENT is one of its own, with `llama-cpp-python==0.3.36` (built for this CPU by `pip install`). llama.cpp runs in
a process of it; both take turns at every step, each with a token for each text, so that a noisy machine is noisy for
both. With one thread the time is what the process spent on the CPU, and the wall's otherwise. Neither samples.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TEXTS = (1, 4, 16)
PROMPT = 40
COLUMNS = 256  # of each text's cache in llama.cpp


def clock(threads: int) -> Callable[[], float]:
    """What tells the seconds."""
    return time.process_time if threads == 1 else time.perf_counter


def prompts(texts: int) -> list[list[int]]:
    """As in benchmarks/quantized.py."""
    return [[(7 * i + j) % 40_000 + 50 for j in range(PROMPT)] for i in range(texts)]


# --- llama.cpp: a process that answers each line by one ---


class LlamaCpp:
    """A model and, for each number of texts, a context."""

    def __init__(self, gguf: str, threads: int) -> None:
        sys.path.pop(0)  # where this file would be found instead
        self.lib: Any = importlib.import_module("llama_cpp.llama_cpp")
        self.threads = threads
        self.clock = clock(threads)
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(gguf.encode(), self.lib.llama_model_default_params())
        self.texts = self.length = 0

    def begin(self, texts: int) -> float:
        """Read so many prompts; returns the seconds."""
        options = self.lib.llama_context_default_params()
        options.n_seq_max, options.n_ctx, options.n_batch = texts, texts * COLUMNS, texts * PROMPT
        options.n_threads = options.n_threads_batch = self.threads
        self.context = self.lib.llama_init_from_model(self.model, options)
        self.batch = self.lib.llama_batch_init(texts * PROMPT, 0, 1)
        self.texts, self.length = texts, 0
        return self.read(prompts(texts))

    def read(self, ids: Sequence[Sequence[int]]) -> float:
        """Seconds of a forward with these tokens of each text."""
        at, batch = 0, self.batch
        for text, own in enumerate(ids):
            for i, token in enumerate(own):
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, self.length + i, 1
                batch.seq_id[at][0], batch.logits[at] = text, i == len(own) - 1
                at += 1
        batch.n_tokens = at
        began = self.clock()
        if self.lib.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp failed")
        self.lib.llama_synchronize(self.context)
        self.length += len(ids[0])
        return self.clock() - began


def work(gguf: str, threads: int) -> None:
    """Answer each line of the input, [what, argument], by the seconds that it took."""
    model = LlamaCpp(gguf, threads)
    for line in sys.stdin:
        what, given = json.loads(line)
        print(json.dumps(model.begin(given) if what == "begin" else model.read(given)), flush=True)


class OtherProcess:
    """llama.cpp in its environment."""

    def __init__(self, python: str, gguf: str, threads: int) -> None:
        command = [python, __file__, "--worker", gguf, "--threads", str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, what: str, given: Any) -> float:
        """Have it done, and wait."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([what, given]), file=self.process.stdin, flush=True)
        return float(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# --- ours ---


class Ours:
    """SmolLM2 in the form that is the default here."""

    def __init__(self, threads: int) -> None:
        from cards_integrations.models.local.loader import ModelLoader
        from cards_integrations.models.local.settings import LocalModel, Placement
        from cards_integrations.transformer.flat_batch import ForwardInput
        from cards_integrations.transformer.forward import Transformer
        from cards_integrations.transformer.quantization import precision

        model, _ = ModelLoader(Placement(device="cpu", threads=threads)).causal(LocalModel())
        self.form, self.clock = precision(model), clock(threads)
        self.transformer, self.input = Transformer(model), ForwardInput
        self.texts: list[Any] = []

    def begin(self, texts: int) -> float:
        """Read so many prompts; returns the seconds."""
        for branch in self.texts:
            self.transformer.cache.close(branch.tree)
        self.texts = [self.transformer.cache.open().branch() for _ in range(texts)]
        return self.read(prompts(texts))

    def read(self, ids: Sequence[Sequence[int]]) -> float:
        """Seconds of a forward with these tokens of each text."""
        inputs = [self.input(branch, list(own)) for branch, own in zip(self.texts, ids, strict=True)]
        began = self.clock()
        self.transformer.logits(inputs)
        return self.clock() - began


def measured(ours: Ours, theirs: OtherProcess, steps: int) -> dict[str, dict[str, float]]:
    """Medians of the ratios of all pairs of steps, ours over theirs, and of the milliseconds of both."""
    found = {}
    for texts in TEXTS:
        ours.begin(texts), theirs.ask("begin", texts)
        pairs = [_pair(ours, theirs, [[100 + step + i] for i in range(texts)], step) for step in range(steps)]
        ratios = [own / other for own, other in pairs]
        own, other = (round(1e3 * statistics.median(side), 1) for side in zip(*pairs, strict=True))
        found[f"{texts} texts"] = {
            "ratio": round(statistics.median(ratios), 2), "least": round(min(ratios), 2),
            "greatest": round(max(ratios), 2), "ours, ms": own, "llama.cpp, ms": other,
        }  # fmt: skip
        print(f"{texts:2} texts: {found[f'{texts} texts']}", flush=True)
    return found


def _pair(ours: Ours, theirs: OtherProcess, ids: list[list[int]], step: int) -> tuple[float, float]:
    """Seconds of a step on both, who begins in turns."""
    if step % 2:
        own = ours.read(ids)
        return own, theirs.ask("read", ids)
    other = theirs.ask("read", ids)
    return ours.read(ids), other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="Of the environment that has llama-cpp-python.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.worker, options.threads)
    if not options.python:
        parser.error("--python is needed: that of an environment with llama-cpp-python")
    from cards_integrations.models.local.embedded import _gguf_file

    ours = Ours(options.threads)
    theirs = OtherProcess(options.python, str(_gguf_file()), options.threads)
    try:
        rows = measured(ours, theirs, options.steps)
    finally:
        theirs.close()
    if options.results:
        said = {"threads": options.threads, "ours is": ours.form, "ours over llama.cpp 0.3.36": rows}
        options.results.write_text(json.dumps(said, indent=2) + "\n")


if __name__ == "__main__":
    main()
