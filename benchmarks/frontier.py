"""Reward against time on a tiny pair: best-of-N and CARDS on the same engine, same batching, same caches.

    python benchmarks/frontier.py [--models ../shared/models]

stories260k drafts, its sentiment classifier guides, MiniLM (held out) judges. Targets and
betas of CARDS are swept; its time at the reward that best-of-N reaches is interpolated along the
curve of each beta, and the best beta counts.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cards_integrations.cli.demo import JUDGE
from cards_integrations.decoding import BestOfN, Cards, Decoding, Uncertainty
from cards_integrations.engine import Engine, EngineSettings, Request
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import NAMED, ClassifierReward
from cards_integrations.study.metrics import distinct, repeated_3grams

MAX_TOKENS = 96
BOUNDARY = Uncertainty(threshold=2.9)  # the 92% quantile of this model's entropy
WHO = ["Tom", "Lily", "The big dog", "Mom", "A little bird", "Ben", "The old man", "Sue"]
DID = [
    "went to the park", "found a box", "was very sad", "saw a cat", "had a red ball", "wanted to play",
    "made a cake", "looked at the rain",
]  # fmt: skip
BEST_OF = (4, 8, 16, 32)
SPREADS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
BETAS = (0.1, 0.2)  # in spreads


def measured(models: Path, prompts: int, concurrent: int, answers: int = 2) -> dict[str, Any] | None:
    """Runs, and ratios[n][reward or judge]: time of best-of-n over that of CARDS where both reach the same."""
    if not (models / "stories260k").is_dir():
        return None
    reward = ClassifierReward(model=str(models / "rm-sentiment-stories260k"))
    engine = Engine(
        LocalModel(model=str(models / "stories260k")), EngineSettings(max_rows=concurrent, prefix_reuse=False)
    )
    texts = [f"{who} {did}" for did in DID for who in WHO][:prompts] * answers

    def run(decoding: Decoding, seed: int = 0) -> dict[str, float]:
        requests = [
            Request(text, decoding, reward, Sampler(temperature=0.9), MAX_TOKENS, seed=seed + i)
            for i, text in enumerate(texts)
        ]
        began = time.perf_counter()
        found = engine.run_many(requests)
        seconds = time.perf_counter() - began
        judged = [engine.score(NAMED[JUDGE], text, [a.text])[0] for text, a in zip(texts, found, strict=True)]
        return {
            "seconds": seconds / len(texts),
            "reward": float(np.mean([a.reward for a in found])),
            "reward spread": float(np.std([a.reward for a in found])),
            "judge": float(np.mean(judged)),
            "repeated 3-grams, %": float(np.mean([repeated_3grams(a.text) for a in found])),
            "distinct-2": distinct([a.text for a in found], 2),
            "log p per token": float(np.mean([a.log_likelihood / max(1, len(a.token_ids)) for a in found])),
            "drafted": float(np.mean([a.usage.drafted_tokens for a in found])),
            "looked at": float(np.mean([sum(len(d.token_ids) for s in a.segments for d in s.drafts) for a in found])),
        }

    run(BestOfN(n=2))  # warm-up
    plain = run(BestOfN(n=1))
    mean, spread = plain["reward"], plain["reward spread"]
    runs = {"plain": [plain]}
    runs["best-of-N"] = [{"n": float(n), **run(BestOfN(n=n))} for n in BEST_OF]
    for beta in BETAS:
        curve = runs[f"CARDS, beta {beta:g} spreads"] = []
        for k in SPREADS:
            method = Cards(target_reward=mean + k * spread, beta=beta * spread, boundary=BOUNDARY)
            curve.append({"target in spreads": k, **run(method)})
    engine.close()
    curves = [curve for name, curve in runs.items() if name.startswith("CARDS")]
    ratios = {
        int(best["n"]): {by: best["seconds"] / _seconds_at(best[by], by, curves) for by in ("reward", "judge")}
        for best in runs["best-of-N"]
    }
    return {"runs": runs, "ratios": ratios}


def _seconds_at(level: float, by: str, curves: list[list[dict[str, float]]]) -> float:
    """The least time at which a curve reaches the level; infinite if none does."""
    found = [np.inf]
    for curve in curves:
        for low, high in pairwise(curve):
            if low[by] <= level <= high[by] and high[by] > low[by]:
                share = (level - low[by]) / (high[by] - low[by])
                found.append(low["seconds"] ** (1 - share) * high["seconds"] ** share)
    return float(min(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path(__file__).parents[2] / "shared" / "models")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--concurrent", type=int, default=16)
    options = parser.parse_args()
    found = measured(options.models, options.prompts, options.concurrent)
    if found is None:
        raise SystemExit(f"{options.models} does not hold the tiny pair.")
    for name, curve in found["runs"].items():
        for run in curve:
            print(f"{name:<24}", "  ".join(f"{key} {value:.3f}" for key, value in run.items()))
    print(found["ratios"])


if __name__ == "__main__":
    main()
