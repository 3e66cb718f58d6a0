"""All methods on the same prompts: `cards compare` with a fixed set, on SmolLM2 or on the tiny pair.

    python benchmarks/methods.py smollm2 --prompts ../shared/data/hh_harmless_test.jsonl.gz --limit 100
    python benchmarks/methods.py tiny --models ../shared/models

Writes results/methods-<which>.jsonl (every answer; an interrupted run goes on), .json, .png and .html.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from frontier import BOUNDARY, DID, WHO
from rich.console import Console

from cards_integrations import CardsLLM
from cards_integrations.decoding import (
    Args,
    BestOfN,
    Cards,
    Decoding,
    FixedLength,
    Particles,
    Punctuation,
    RejectionSampling,
    Sampling,
    SegmentBestOfN,
    SpeculativeRejection,
    TreeBoN,
    Uncertainty,
)
from cards_integrations.rewards import NAMED, ClassifierReward
from cards_integrations.study import compare, read_prompts

RESULTS = Path(__file__).parent / "results"
FAMILY = ["best-of-4", "best-of-8", "best-of-16", "best-of-32"]


def arms(boundary: Uncertainty, target: float) -> dict[str, Decoding]:
    """The methods, and CARDS with one thing changed at a time; `target` is another one than "auto" takes."""
    return {
        "plain": Sampling(),
        **{f"best-of-{n}": BestOfN(n=n) for n in (4, 8, 16, 32)},
        "rejection of whole answers": RejectionSampling(max_rejections=31),
        "speculative rejection 16": SpeculativeRejection(n=16, checkpoint=12),
        "segment best-of-4": SegmentBestOfN(n=4, boundary=boundary),
        "TreeBoN 16": TreeBoN(n=16, children=4, boundary=FixedLength(length=12)),
        "particles 8": Particles(n=8, boundary=boundary),
        "CARDS": Cards(boundary=boundary),
        f"CARDS, target {target}": Cards(target_reward=target, boundary=boundary),
        "CARDS, hard": Cards(acceptance="hard", boundary=boundary),
        "CARDS, fixed length 8": Cards(boundary=FixedLength(length=8)),
        "CARDS, punctuation": Cards(boundary=Punctuation(max_length=32)),
        "CARDS, max probability": Cards(boundary=Uncertainty(measure="max_probability", threshold=0.7)),
        "ARGS": Args(k=10, weight=1.5),
    }


def tiny(models: Path) -> tuple[CardsLLM, list[Any], str, dict[str, Decoding]]:
    """stories260K, guided by a reward of its size."""
    llm = CardsLLM(
        model=str(models / "stories260k"), reward=ClassifierReward(model=str(models / "rm-sentiment-stories260k")),
        max_tokens=96, temperature=0.9,
    )  # fmt: skip
    return llm, [f"{who} {did}" for did in DID for who in WHO], "sentiment-minilm", arms(BOUNDARY, 1.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["smollm2", "tiny"])
    parser.add_argument("--prompts", default="../shared/data/hh_harmless_test.jsonl.gz")
    parser.add_argument("--models", type=Path, default=Path("../shared/models"))
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--only", nargs="+", help="Some of the methods.")
    options, console = parser.parse_args(), Console()
    if options.which == "tiny":
        llm, prompts, judge, methods = tiny(options.models)
    else:
        guide = NAMED["sentiment"].parts[0]  # without its guard
        llm, judge, methods = CardsLLM(max_tokens=48, reward=guide), "sentiment-minilm", arms(Uncertainty(), 1.1)
        prompts = [prompt for prompt in read_prompts(options.prompts)[0] if len(str(prompt)) < 600]
    chosen = {name: methods[name] for name in options.only or methods}
    name = f"methods-{options.which}"
    found = compare(llm, chosen, prompts[: options.limit], judge=judge, out=RESULTS / f"{name}.jsonl")
    summary: dict[str, Any] = found.summary()
    for arm in ("CARDS", "particles 8", "segment best-of-4", "TreeBoN 16"):
        reached = found.arms[arm].mean("judged") if arm in found.arms else None
        if reached and set(FAMILY) <= set(found.arms):
            own = {cost: found.arms[arm].mean(cost) for cost in ("seconds", "drafted_tokens", "looked_at_tokens")}
            summary[arm]["best-of-n at its judge's score, over its own cost"] = {
                cost: paid and value and paid / value.value
                for cost, value in own.items()
                for paid in [found.cost_at(reached.value, cost, FAMILY)]
            }
    (RESULTS / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    found.plot("looked_at_tokens").savefig(RESULTS / f"{name}.png", dpi=130)
    found.to_html(RESULTS / f"{name}.html")
    console.print(found.table())


if __name__ == "__main__":
    main()
