"""What methods cost on a device where wide steps are cheap: real answers, real counts, simulated time.

    python benchmarks/wide.py tiny --models ../shared/models
    python benchmarks/wide.py smollm2 --prompts ../shared/data/hh_harmless_test.jsonl.gz
    python benchmarks/wide.py tiny --device l4 --at-once 16 --arms plain "best-of-32" "Cascade 1.4"
    python benchmarks/wide.py smollm2 --device here --at-once 16     # wall time of this machine, step times as measured
    python benchmarks/wide.py tiny --report                          # only prints what is known

The models here are small, and a forward of a large one takes as long as `DEVICES` says: seconds by the number of
tokens, the same for the language model and the reward model. The engine plans with that table, too, so what is
drafted ahead, and every plan, is as it would be there; forwards and tokens are counted as they happen. Reading the
caches is left out: at these lengths it is little beside the weights. Every answer is one line of
results/wide-<which>-<device>-<at once>.jsonl; an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from frontier import DID, WHO
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cards_integrations.decoding import (
    AdaSearch,
    BestOfN,
    Cards,
    Cascade,
    Decoding,
    FixedLength,
    OptimalStopping,
    Particles,
    SegmentBestOfN,
    TreeBoN,
    Uncertainty,
)
from cards_integrations.engine import Engine, EngineSettings, Request
from cards_integrations.models.local import language_model
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import NAMED, ClassifierReward
from cards_integrations.rewards.scorers import incremental
from cards_integrations.study import read_prompts
from cards_integrations.study.metrics import mean, repeated_3grams
from cards_integrations.trace import Alignment
from cards_integrations.transformer.flat_batch import FlatBatch
from cards_integrations.transformer.forward import ForwardInput, Transformer
from cards_integrations.transformer.step_times import StepTimes

RESULTS = Path(__file__).parent / "results"
JUDGE = NAMED["sentiment-minilm"]
DEVICES: dict[str, dict[int, float]] = {
    "here": {},  # the clock on the wall
    "h200": {1: 3.4174e-3, 16: 3.6784e-3, 64: 4.5136e-3},  # 7B in bf16: 3.4 ms for the weights, 17.4 us a token
    "l4": {1: 47.2e-3, 16: 50.2e-3, 64: 59.8e-3},  # 7B in bf16: 47 ms for the weights, 0.2 ms a token
    "cpu": {1: 20e-3, 16: 73e-3, 64: 125e-3},  # 135M on two cores
}
COSTS = ("forwards", "tokens", "seconds")


def arms(boundary: Uncertainty, targets: tuple[float, ...], layers: tuple[int, ...]) -> dict[str, Decoding]:
    """The methods by name, plain sampling first."""
    found: dict[str, Decoding] = {"plain": BestOfN(n=1)}
    found |= {f"best-of-{n}": BestOfN(n=n) for n in (16, 32, 64)}
    found |= {
        f"TreeBoN {n}, layers of {length}": TreeBoN(n=n, boundary=FixedLength(length=length))
        for n in (16, 32)
        for length in layers
    }
    found["TreeBoN 32, entropy"] = TreeBoN(n=32, boundary=boundary)
    found |= {
        f"best-of-{n} per {length} tokens": SegmentBestOfN(n=n, boundary=FixedLength(length=length))
        for n in (8, 16)
        for length in layers
    }
    found["particles 32"] = Particles(n=32, beta=0.1, boundary=boundary)
    found |= {"AdaSearch 16": AdaSearch(n=16), "AdaBeam 16": AdaSearch(n=16, beams=4, blocks=8)}
    found["STARS, blocks of 12"] = Cards(boundary=FixedLength(length=12))  # arXiv 2511.03827
    found["optimal stopping"] = Cards(acceptance=OptimalStopping(price=0.02, unit="std", batch=8), boundary=boundary)
    found["CARDS"] = Cards(boundary=boundary)
    found |= {f"CARDS, target {t}": Cards(target_reward=t, beta=0.1, boundary=boundary) for t in targets}
    found |= {f"Cascade {budget}": Cascade(budget=budget) for budget in (1.2, 1.35, 1.4, 1.6, 2.0, 3.0, 4.0, 8.0, 12.0)}
    found |= {f"Cascade tokens:{n}": Cascade(budget=f"tokens:{n}") for n in (4, 6, 8)}
    return found


class Clock:
    """The forwards of all models, and how long they would take on a device.

    Args:
        seconds: Of a forward, by the number of tokens; none for the time that passes here.
        plans: Whether engines plan with these, too, instead of with those that they measure.
    """

    def __init__(self, seconds: dict[int, float], plans: bool = True) -> None:
        self.times = StepTimes(seconds) if seconds else None
        self.passed = np.zeros(3)  # forwards, tokens, simulated seconds
        if self.times is not None and plans:
            language_model.step_times = incremental.step_times = lambda what, model, measure: self.times  # type: ignore[assignment,return-value]
        prepare = Transformer._prepare

        def counted(transformer: Transformer, flat: FlatBatch, inputs: Sequence[ForwardInput]) -> Any:
            tokens = sum(len(each.ids) for each in inputs)
            self.passed += (1, tokens, self.times.at(tokens) if self.times else 0.0)
            return prepare(transformer, flat, inputs)

        Transformer._prepare = counted  # type: ignore[method-assign]

    def read(self) -> NDArray[np.float64]:
        """Forwards, tokens and seconds so far, (3,)."""
        return self.passed if self.times else self.passed + np.array([0.0, 0.0, time.perf_counter()])


class Bench:
    """One pair of models, on one device.

    Args:
        options: What the command line says.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.clock = Clock(DEVICES[options.device])
        self.at_once = options.at_once
        if options.which == "tiny":
            model = str(options.models / "stories260k")
            self.guide: Any = ClassifierReward(model=str(options.models / "rm-sentiment-stories260k"))
            self.prompts: list[Any] = [f"{who} {did}" for did in DID for who in WHO][: options.limit or 64]
            self.sampler, self.max_tokens = Sampler(temperature=0.9), 96
        else:
            model, self.guide = "smollm2", NAMED["sentiment"]
            known = [prompt for prompt in read_prompts(options.prompts)[0] if len(str(prompt)) < 600]
            self.prompts = known[: options.limit or 32]
            self.sampler, self.max_tokens = Sampler(), 48
        settings = EngineSettings(max_rows=options.at_once, prefix_reuse=False)
        self.engine = Engine(LocalModel(model=model), settings)
        warm_up = [Request(self.prompts[0], Cards(), self.guide, max_tokens=8, seed=i) for i in range(self.at_once)]
        self.engine.run_many(warm_up)  # loads the reward, and measures its scale

    def rows(self, decoding: Decoding, known: Collection[int]) -> Iterator[dict[str, Any]]:
        """One for each prompt, but those known; requests that run together share their time."""
        for numbers in _groups(len(self.prompts), self.at_once):
            if set(numbers) <= set(known):
                continue
            before = self.clock.read().copy()
            answers = self.engine.run_many(
                [Request(self.prompts[i], decoding, self.guide, self.sampler, self.max_tokens, seed=i) for i in numbers]
            )
            passed = (self.clock.read() - before) / len(numbers)
            for i, answer in zip(numbers, answers, strict=True):
                yield {"prompt": i, **self._quality(i, answer), **dict(zip(COSTS, map(float, passed), strict=True))}

    def _quality(self, number: int, answer: Alignment) -> dict[str, float | None]:
        return {
            "guiding": answer.reward,
            "held-out": self.engine.score(JUDGE, self.prompts[number], [answer.text])[0],
            "log p": answer.log_likelihood / max(1, len(answer.token_ids)),
            "repeated 3-grams, %": repeated_3grams(answer.text),
            "kept": len(answer.token_ids),
            "drafted": answer.usage.drafted_tokens,
        }


def _groups(n: int, size: int) -> list[list[int]]:
    return [list(range(n))[at : at + size] for at in range(0, n, size)]


def summary(rows: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """Means with 95% intervals, and the time over that of plain answers."""
    found = {key: mean([row[key] for row in rows]) for key in rows[0] if key not in ("prompt", "arm")}
    cost = float(np.mean([row["seconds"] for row in plain]))
    return {key: value._asdict() for key, value in found.items()} | {"over plain": found["seconds"].value / cost}


def table(found: dict[str, dict[str, Any]], title: str) -> Table:
    """A row for each arm."""
    drawn = Table(title=title)
    shown = ("guiding", "held-out", "log p", "repeated 3-grams, %", "drafted", "forwards")
    for column in ("method", *shown, "ms", "over plain"):
        drawn.add_column(column, justify="left" if column == "method" else "right")
    for arm, of in found.items():
        values = [f"{of[key]['value']:.2f} [{of[key]['low']:.2f}, {of[key]['high']:.2f}]" for key in shown[:2]]
        values += [f"{of[key]['value']:.2f}" for key in shown[2:4]] + [f"{of[key]['value']:,.0f}" for key in shown[4:]]
        drawn.add_row(arm, *values, f"{1e3 * of['seconds']['value']:,.0f}", f"{of['over plain']:.2f}")
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["tiny", "smollm2"])
    parser.add_argument("--models", type=Path, default=Path("../shared/models"))
    parser.add_argument("--prompts", default="../shared/data/hh_harmless_test.jsonl.gz")
    parser.add_argument("--device", choices=DEVICES, default="h200")
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--arms", nargs="+", help="Some of the methods.")
    parser.add_argument("--limit", type=int, help="Prompts; 64 or 32 by default.")
    parser.add_argument("--report", action="store_true", help="Only print what is known.")
    options, console = parser.parse_args(), Console(width=150)
    tiny = options.which == "tiny"
    methods = arms(Uncertainty(threshold=2.9), (0.6, 0.9, 1.2), (24, 12, 6)) if tiny else arms(
        Uncertainty(), (0.9, 1.1, 1.3), (12, 6, 3)
    )  # fmt: skip
    name = f"wide-{options.which}-{options.device}-{options.at_once}"
    file = RESULTS / f"{name}.jsonl"
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if not options.report:
        bench = Bench(options)
        for arm in options.arms or methods:
            done = {row["prompt"] for row in known if row["arm"] == arm}
            for row in bench.rows(methods[arm], done):
                known.append({"arm": arm, **row})
                with file.open("a") as out:
                    out.write(json.dumps(known[-1]) + "\n")
    by_arm = {arm: [row for row in known if row["arm"] == arm] for arm in methods}
    found = {arm: summary(rows, by_arm["plain"]) for arm, rows in by_arm.items() if rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    console.print(table(found, name))


if __name__ == "__main__":
    main()
