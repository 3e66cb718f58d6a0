"""Is one checkout faster than another? The same work on both, in turns, so that a noisy machine is noisy for both.

    python benchmarks/paired_speed.py --before ../before [--after .] [--pairs 7] [--smollm2] [--families qwen3 ...]

A process for each checkout loads the tiny pair once (`../shared/models`: a language model and its reward model), in
float32 on one thread of the CPU and with `width=4`, so that both do the same. In each pair of runs both measure
plain sampling and CARDS, for one request and for 16 at once, with the same seeds; who begins changes from pair to pair.

Prints for each of the four the median of the ratios after / before with the least and the greatest of them, and the
tokens of both sides, kept and drafted. If those differ, the two have not done the same work, and the exit code is 1.
With --smollm2 four more, of the embedded model and its sentiment reward, with fewer tokens and some minutes. With
--families two more for each, plain only: random weights with layers as wide as those of Llama 3.2 1B, Qwen3 0.6B or
Gemma 3 270M, fewer of them, and the tokenizer of the tiny pair.
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
    from cards_integrations import CardsLLM

ROOT = Path(__file__).resolve().parent.parent
WHO = ("Tom", "Lily", "The big dog", "Mom")
DID = ("went to the park", "found a box", "was very sad", "saw a cat")
STORIES = [f"{who} {did}" for did in DID for who in WHO]
SUBJECTS = (
    "rainy days", "the sea", "a good friend", "an old house", "a long flight", "a dog", "the city at night", "bread",
    "the first snow", "a train", "your favourite book", "the garden", "a neighbour", "learning to cook", "a lost key",
    "the moon",
)  # fmt: skip
QUESTIONS = [f"Write one sentence about {subject}." for subject in SUBJECTS]
MEAN, SPREAD = -0.15, 0.48  # of the tiny pair's reward over plain answers
FAMILIES: dict[str, dict[str, int]] = {
    "llama": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen3": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 6, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128,
    },
    "gemma3_text": {
        "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256,
    },
}  # fmt: skip
LIMITS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


# --- the worker: a line comes in for each run, and one goes out ---


@dataclass
class Loaded:
    """A model, what it is asked, and the method of each row."""

    llm: CardsLLM
    prompts: list[str]
    methods: dict[str, Any]

    def run(self, method: str, several: int, seed: int) -> dict[str, float]:
        """Seconds and tokens of so many requests at once."""
        options = {"decoding": self.methods[method]}
        began = time.perf_counter()
        if several == 1:
            answers = [self.llm.align(self.prompts[seed % len(self.prompts)], seed=seed, **options)]
        else:
            seeds = range(seed * several, (seed + 1) * several)
            answers = self.llm.align_batch(self.prompts[:several], seeds=seeds, **options)
        return {
            "seconds": time.perf_counter() - began,
            "kept": sum(answer.usage.completion_tokens for answer in answers),
            "drafted": sum(answer.usage.drafted_tokens for answer in answers),
        }


def random_weights(family: str, models: Path) -> str:
    """A model of a family with random weights, in the working directory, which is a temporary one; returns its path."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(models / "stories260k")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **ids, **FAMILIES[family])
    AutoModelForCausalLM.from_config(config).save_pretrained(family)
    tokenizer.save_pretrained(family)
    return str(Path(family).resolve())


def loaded(which: str, models: Path) -> Loaded:
    """The tiny pair with a target of one spread more than plain answers have, SmolLM2, or a family's random weights."""
    from cards_integrations import CardsLLM
    from cards_integrations.decoding import Cards, Sampling, Uncertainty
    from cards_integrations.engine import EngineSettings
    from cards_integrations.rewards import ClassifierReward

    engine = EngineSettings(device="cpu", dtype="float32", threads=1, width=4, kv_memory=2.0**30, prefix_reuse=False)
    if which == "smollm2":
        llm = CardsLLM(model="smollm2", reward="sentiment", decoding="cards", max_tokens=32, engine=engine)
        return Loaded(llm, QUESTIONS, {"plain": Sampling(), "CARDS": Cards(target_reward=1.1, beta=0.1)})
    if which in FAMILIES:
        llm = CardsLLM(model=random_weights(which, models), decoding="sampling", max_tokens=32, engine=engine)
        return Loaded(llm, STORIES, {"plain": Sampling()})
    cards = Cards(target_reward=MEAN + SPREAD, beta=0.2 * SPREAD, boundary=Uncertainty(threshold=2.9))
    llm = CardsLLM(
        model=str(models / "stories260k"), reward=ClassifierReward(model=str(models / "rm-sentiment-stories260k")),
        decoding="cards", max_tokens=96, temperature=0.9, engine=engine,
    )  # fmt: skip
    return Loaded(llm, STORIES, {"plain": Sampling(), "CARDS": cards})


def work(models: Path) -> None:
    """Answer each line of the input by one of the output, until the input ends."""
    import cards_integrations

    out = sys.stdout
    print(json.dumps({"package": str(Path(cards_integrations.__file__).parent)}), file=out, flush=True)
    known: dict[str, Loaded] = {}
    with contextlib.redirect_stdout(sys.stderr):  # whatever a library says is no answer
        for line in sys.stdin:
            which, method, several, seed = json.loads(line)
            if which not in known:
                known[which] = loaded(which, models)
            print(json.dumps(known[which].run(method, several, seed)), file=out, flush=True)
        for each in known.values():
            each.llm.close()


# --- the two of them ---


class Side:
    """The process of one checkout."""

    def __init__(self, name: str, checkout: Path, models: Path) -> None:
        self.name = name
        self.cache = tempfile.TemporaryDirectory()
        own = {name: value for name, value in os.environ.items() if not name.startswith("CARDS_")}
        if kept := os.environ.get("CARDS_CACHE_DIR"):
            own["CARDS_CACHE_DIR"] = kept
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--worker", "--models", str(models)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self.cache.name,
            env={**own, **LIMITS, "PYTHONPATH": str(checkout)},
        )  # fmt: skip
        self.package = Path(self._answer()["package"])
        if self.package.parent != checkout:
            raise SystemExit(f"{name}: {self.package} is used, and not what is in {checkout}.")

    def run(self, *what: Any) -> dict[str, float]:
        """Have it done, and wait."""
        assert self.process.stdin is not None
        print(json.dumps(what), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the worker ended with exit code {self.process.wait()}.")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.cache.cleanup()


@dataclass
class Row:
    """The runs of one kind of work on both sides, pair by pair."""

    which: str
    method: str
    several: int
    before: list[dict[str, float]] = field(default_factory=list)
    after: list[dict[str, float]] = field(default_factory=list)

    def measure(self, sides: dict[str, Side], pair: int) -> None:
        """Both once, in turns; pair 0 is the warm-up, and is not kept."""
        for name in sorted(sides, reverse=pair % 2 == 0):
            found = sides[name].run(self.which, self.method, self.several, pair)
            if pair:
                getattr(self, name).append(found)

    def total(self, side: list[dict[str, float]]) -> tuple[int, int]:
        """Tokens kept and drafted in all runs of a side."""
        return round(sum(run["kept"] for run in side)), round(sum(run["drafted"] for run in side))

    @property
    def equal(self) -> bool:
        """Have both done the same?"""
        return self.total(self.before) == self.total(self.after)

    def __str__(self) -> str:
        pairs = zip(self.before, self.after, strict=True)
        ratios = [after["seconds"] / before["seconds"] for before, after in pairs]
        seconds = [statistics.median(run["seconds"] for run in side) for side in (self.before, self.after)]
        tokens = [" / ".join(f"{count:,}" for count in self.total(side)) for side in (self.before, self.after)]
        return (
            f"{f'{self.which}, {self.method}, {self.several} at once':<28}{statistics.median(ratios):7.3f}"
            f"  [{min(ratios):.3f}, {max(ratios):.3f}]  {seconds[0]:8.3f} {seconds[1]:8.3f}"
            f"  {tokens[0]:>20}  {tokens[1]:>20}{'' if self.equal else '  DIFFERENT WORK'}"
        )


def compare(sides: dict[str, Side], rows: list[Row], pairs: int) -> None:
    """Run all rows, pair by pair, and print what came of it."""
    for pair in range(pairs + 1):
        for row in rows:
            row.measure(sides, pair)
        print(f"\r{f'pair {pair} of {pairs}' if pair else 'warmed up'}   ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(f"{'':<28}{'after / before':<26}{'seconds before, after':<22}{'kept / drafted before':>17}{'after':>22}")
    for row in rows:
        print(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--after", type=Path, default=ROOT)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument(
        "--models", type=Path, default=ROOT.parent / "shared" / "models", help="Where the tiny pair is."
    )
    parser.add_argument("--smollm2", action="store_true", help="The embedded model, too.")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=[], help="Random weights, too.")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    models = options.models.resolve()
    if options.worker:
        return work(models)
    if options.before is None:
        parser.error("--before is needed: the checkout to compare with")
    if not (models / "stories260k").is_dir():
        raise SystemExit(f"{models} does not hold the tiny pair; say where it is with --models.")
    which = ["tiny", "smollm2"] if options.smollm2 else ["tiny"]
    rows = [Row(model, method, several) for model in which for method in ("plain", "CARDS") for several in (1, 16)]
    rows += [Row(family, "plain", several) for family in options.families for several in (1, 16)]
    sides: dict[str, Side] = {}
    try:
        for name in ("before", "after"):
            sides[name] = Side(name, getattr(options, name).resolve(), models)
        compare(sides, rows, options.pairs)
    finally:
        for side in sides.values():
            side.close()
    if not all(row.equal for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
