"""Where does a guide stop to help, and what does a guard against repetition change?

    python benchmarks/overoptimisation.py smollm2 --prompts ../shared/data/hh_harmless_test.jsonl.gz
    python benchmarks/overoptimisation.py tiny --models ../shared/models

Two things, on SmolLM2 with its sentiment reward or on the tiny pair, each without a guard and with one:

    curve     a reward that does not guide over the target of the one that does, on prompts to tune on: its peak,
              and the target that a calibration would choose
    default   plain answers, and CARDS at its default target, on other prompts: both rewards, repeated 3-grams,
              distinct 2-grams and log p per token

and the guard's paired differences with 95% bootstrap intervals over prompts, at the default and over all targets.
`--earlier FILE` takes the answers of CARDS without the guard from results/methods-smollm2.jsonl, which are to the same
prompts with the same seeds, and `--guides guarded` leaves them out of the curve: on one slow core an answer of SmolLM2
takes half a minute.

Writes results/overoptimisation-<which>-<part>.jsonl (every answer; an interrupted run goes on), and the numbers of both
models to results/overoptimisation.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frontier import BOUNDARY, DID, WHO
from rich.console import Console
from rich.table import Table

from cards_integrations import CardsLLM
from cards_integrations.decoding import Cards, Sampling, Uncertainty
from cards_integrations.rewards import NAMED, ClassifierReward, GuardedReward, Reward
from cards_integrations.study import Comparison, compare, read_prompts
from cards_integrations.study.arms import Arm
from cards_integrations.study.held_out import HeldOutCurve, Level
from cards_integrations.study.metrics import distinct, mean, points

RESULTS = Path(__file__).parent / "results"
JUDGE = NAMED["sentiment-minilm"]
PLAIN = "plain"
NUMBERS = ("judged", "reward", "repeated_3grams", "log_p_per_token")


@dataclass(frozen=True)
class Setup:
    """A language model with its guide, and what it is asked."""

    name: str
    llm: CardsLLM
    guide: Reward
    boundary: Uncertainty
    targets: Sequence[float]
    tune: Sequence[Any]
    report: Sequence[Any]
    at_once: int
    guides: Sequence[str]
    earlier: Path | None

    def run(self, part: str, decodings: Mapping[str, Mapping[str, Any]], prompts: Sequence[Any]) -> Comparison:
        """Answer the prompts, with the guide's own reward as the one that is reported."""
        out = RESULTS / f"overoptimisation-{self.name}-{part}.jsonl"
        return compare(self.llm, decodings, prompts, judge=JUDGE, out=out, at_once=self.at_once)


def smollm2(options: argparse.Namespace) -> Setup:
    guarded = NAMED["sentiment"]
    assert isinstance(guarded, GuardedReward)
    prompts = [prompt for prompt in read_prompts(options.prompts)[0] if len(str(prompt)) < 600]
    report, tune = prompts[: options.report], prompts[100 : 100 + options.tune]
    targets = (0.4, 0.8, 1.1, 1.545, 2.0)
    llm = CardsLLM(decoding="cards", max_tokens=options.max_tokens, reward=guarded.reward)
    how = (options.at_once, options.guides, options.earlier)
    return Setup("smollm2", llm, guarded.reward, Uncertainty(), options.targets or targets, tune, report, *how)


def tiny(options: argparse.Namespace) -> Setup:
    guide = ClassifierReward(model=str(options.models / "rm-sentiment-stories260k"))
    model = str(options.models / "stories260k")
    llm = CardsLLM(model=model, reward=guide, decoding="cards", max_tokens=96, temperature=0.9)
    prompts = [f"{who} {did}" for did in DID for who in WHO]
    targets = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    how = (options.at_once, options.guides, options.earlier)
    return Setup("tiny", llm, guide, BOUNDARY, options.targets or targets, prompts[1::2], prompts[::2], *how)


def curves(setup: Setup) -> tuple[dict[str, HeldOutCurve], dict[str, Any]]:
    """The held-out reward over the target, by what guides; what the guard changes, over all targets."""
    known = {"unguarded": setup.guide, "guarded": GuardedReward(reward=setup.guide)}
    guides = {name: known[name] for name in setup.guides}
    arms: dict[str, dict[str, Any]] = {PLAIN: {"decoding": Sampling()}}
    for name, reward in guides.items():
        for target in setup.targets:
            decoding = Cards(target_reward=target, boundary=setup.boundary)
            arms[f"{name}, target {target:g}"] = {"decoding": decoding, "reward": reward}
    answers = setup.run("curve", arms, setup.tune)
    found, plain = answers.arms, level(answers.arms[PLAIN])
    by_guide = {
        name: HeldOutCurve(
            JUDGE, (plain, *(level(found[f"{name}, target {target:g}"], plain, target) for target in setup.targets))
        )
        for name in guides
    }
    pooled = Comparison(tuple({**row, "arm": row["arm"].split(",")[0]} for row in answers.rows))
    return by_guide, differences(pooled, [("guarded", "unguarded")] if len(guides) > 1 else [])


def level(arm: Arm, plain: Level | None = None, target: float | None = None) -> Level:
    """The answers of an arm, one to each prompt, as a level of a curve."""
    rows = sorted(arm.rows, key=lambda row: row["prompt"])
    held_out = [row["judged"] for row in rows]
    wins = [points(*pair) for pair in zip(held_out, plain.by_prompt, strict=True)] if plain else None

    def average(name: str) -> float:
        return sum(row[name] for row in rows) / len(rows)

    return Level(
        target=target,
        beta=None,
        reward=mean([row["reward"] for row in rows]),
        held_out=mean(held_out),
        win_rate=mean(wins) if wins else None,
        repeated_3grams=average("repeated_3grams"),
        distinct_2=distinct([row["text"] for row in rows], 2),
        log_p_per_token=average("log_p_per_token"),
        tokens=average("tokens"),
        looked_at_tokens=average("looked_at_tokens"),
        out_of_reach=average("out_of_reach"),
        by_prompt=tuple(held_out),
    )


def at_default(setup: Setup) -> Comparison:
    """Plain answers, and those of CARDS as it comes, without and with the guard."""
    cards = Cards(boundary=setup.boundary)
    arms: dict[str, dict[str, Any]] = {
        PLAIN: {"decoding": Sampling()},
        "CARDS, guarded": {"decoding": cards, "reward": GuardedReward(reward=setup.guide)},
    }
    if setup.earlier is None:
        return setup.run("default", {**arms, "CARDS": {"decoding": cards, "reward": setup.guide}}, setup.report)
    found = setup.run("default", arms, setup.report)
    return Comparison((*found.rows, *earlier_rows(setup.earlier, found)))


def earlier_rows(file: Path, found: Comparison) -> list[dict[str, Any]]:
    """Answers of CARDS in another file, to the same prompts with the same seeds."""
    asked = {row["prompt"]: (row["asked"], row["seed"]) for row in found.arms[PLAIN].rows}
    rows = [row for row in Comparison.load(file).arms["CARDS"].rows if row["prompt"] in asked]
    assert {row["prompt"]: (row["asked"], row["seed"]) for row in rows} == asked
    return rows


def differences(found: Comparison, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Paired differences between arms: name of the pair -> name of the number -> mean with its interval."""
    return {f"{a} - {b}": {name: found.difference(a, b, name) for name in NUMBERS} for a, b in pairs}


def show_differences(console: Console, found: Mapping[str, Mapping[str, Any]]) -> None:
    for pair, by_name in found.items():
        for name, difference in by_name.items():
            console.print(f"{pair}, {name}: {difference}")


def show_curve(console: Console, title: str, found: HeldOutCurve) -> None:
    names = ("target", "reward", "held_out", "win_rate", "repeated_3grams", "distinct_2", "log_p_per_token",
             "looked_at_tokens", "out_of_reach")  # fmt: skip
    table = Table(*(name.replace("_", " ") for name in names), "", title=title)
    for row in found.rows():
        marks = ", ".join(name for name in ("peak", "chosen") if row[name])
        table.add_row(*("" if row[name] is None else f"{row[name]:.3g}" for name in names), marks)
    console.print(table)
    console.print(found.conclusion)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["smollm2", "tiny"])
    parser.add_argument("--parts", nargs="+", choices=["curve", "default"], default=["curve", "default"])
    parser.add_argument("--prompts", default="../shared/data/hh_harmless_test.jsonl.gz")
    parser.add_argument("--models", type=Path, default=Path("../shared/models"))
    parser.add_argument("--tune", type=int, default=16, help="Prompts for the curve of SmolLM2.")
    parser.add_argument("--report", type=int, default=100, help="Prompts for the default of SmolLM2, at most 100.")
    parser.add_argument("--max-tokens", type=int, default=48, help="Of SmolLM2.")
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--targets", nargs="+", type=float, help="Of the curve.")
    parser.add_argument("--guides", nargs="+", choices=["unguarded", "guarded"], default=["unguarded", "guarded"])
    parser.add_argument("--earlier", type=Path, help="Answers of CARDS without the guard, that `compare` wrote.")
    options, console = parser.parse_args(), Console(width=150)
    setup = {"smollm2": smollm2, "tiny": tiny}[options.which](options)
    path = RESULTS / "overoptimisation.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    own = results.setdefault(setup.name, {})
    if "curve" in options.parts:
        by_guide, changes = curves(setup)
        own["curve"] = {"prompts": len(setup.tune), "differences over all targets": changes}
        for name, found in by_guide.items():
            show_curve(console, f"{setup.name}, {name}, {len(setup.tune)} prompts", found)
            own["curve"][name] = {"conclusion": found.conclusion, "levels": found.rows()}
        show_differences(console, changes)
    if "default" in options.parts:
        answers = at_default(setup)
        console.print(answers.table())
        changes = differences(answers, [("CARDS, guarded", "CARDS"), ("CARDS, guarded", PLAIN), ("CARDS", PLAIN)])
        show_differences(console, changes)
        own["default"] = {"prompts": len(setup.report), "arms": answers.summary(), "differences": changes}
    path.write_text(json.dumps(results, indent=1) + "\n")
    setup.llm.close()


if __name__ == "__main__":
    main()
