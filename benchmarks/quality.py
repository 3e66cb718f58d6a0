"""What CARDS buys on the embedded models: guiding reward, a held-out judge, likelihood, repetition, cost.

    python benchmarks/quality.py [--prompts 32] [--max-tokens 64]

Plain and CARDS answers to the same prompts with the same seeds; 95% bootstrap intervals of the means
and of the paired difference. Writes benchmarks/results/quality.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from cards_integrations import CardsLLM
from cards_integrations.cli.demo import JUDGE
from cards_integrations.decoding import Decoding, Sampling
from cards_integrations.study.metrics import distinct, points, repeated_3grams

PROMPTS = [
    "How was your day at work?", "Describe the weather this week.", "Tell me about your new neighbours.",
    "What do you think of this old phone?", "Write a sentence about the train ride home.",
    "Write a short review of a restaurant you visited last night.", "What happened at the meeting?",
    "Describe your street in the morning.", "What was the film like?", "How did the exam go?",
    "Write a postcard from a seaside town.", "Tell me about your landlord.", "How is the new bicycle?",
    "Describe a visit to the dentist.", "What is it like to live in a big city?", "Write a short post about Mondays.",
    "How was the concert?", "Tell me about the soup.", "What do people say about the new mayor?",
    "Describe a long flight.", "Write a review of a vacuum cleaner.", "How do you feel about winter?",
    "What did your sister say on the phone?", "Tell me about the hotel room.", "How was the football match?",
    "Write a line about an old dog.", "What do you think of modern art?", "Describe the office kitchen.",
    "How did the cake turn out?", "Tell me about moving house.", "Write a short review of a pair of shoes.",
    "What was school like for you?",
]  # fmt: skip


def interval(values: np.ndarray, rng: np.random.Generator) -> list[float]:
    """Mean and its 95% bootstrap interval."""
    means = rng.choice(values, (5000, len(values))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return [round(float(x), 3) for x in (values.mean(), low, high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    prompts, rng = PROMPTS[: options.prompts], np.random.default_rng(0)
    llm = CardsLLM(decoding="cards", max_tokens=options.max_tokens)
    methods: dict[str, Decoding] = {"plain": Sampling(), "cards": llm.decoding}
    columns: dict[str, dict[str, np.ndarray]] = {}
    texts: dict[str, list[str]] = {}
    seconds: dict[str, float] = {}
    for name, decoding in methods.items():
        began = time.perf_counter()
        answers = llm.align_batch(prompts, seeds=range(len(prompts)), decoding=decoding)
        seconds[name] = time.perf_counter() - began
        texts[name] = [answer.text for answer in answers]
        columns[name] = {
            "reward": np.array([llm.score(p, [a.text])[0] for p, a in zip(prompts, answers, strict=True)]),
            "judge": np.array([llm.score(p, [a.text], reward=JUDGE)[0] for p, a in zip(prompts, answers, strict=True)]),
            "log p per token": np.array([a.log_likelihood / max(1, len(a.token_ids)) for a in answers]),
            "repeated 3-grams, %": np.array([repeated_3grams(a.text) for a in answers]),
            "tokens kept": np.array([a.usage.completion_tokens for a in answers]),
            "tokens drafted": np.array([a.usage.drafted_tokens for a in answers]),
            "candidates": np.array([a.usage.drafts for a in answers]),
            "RM tokens": np.array([a.usage.rm_tokens for a in answers]),
        }
    rows = {name: {key: interval(values, rng) for key, values in found.items()} for name, found in columns.items()}
    rows["cards - plain"] = {key: interval(columns["cards"][key] - columns["plain"][key], rng) for key in rows["plain"]}
    judged = zip(columns["cards"]["judge"], columns["plain"]["judge"], strict=True)
    wins = interval(np.array([points(*pair) for pair in judged]), rng)
    diversity = {name: distinct(found, 2) for name, found in texts.items()}
    table = Table(title=f"{len(prompts)} prompts, {options.max_tokens} tokens; mean [95% interval]")
    for column in ("", *rows["plain"], "distinct-2", "wins by the judge", "seconds, all"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        won = f"{wins[0]:.2f} [{wins[1]:.2f}, {wins[2]:.2f}]" if name == "cards" else ""
        cells = [f"{m:.2f} [{low:.2f}, {high:.2f}]" for m, low, high in row.values()]
        table.add_row(name, *cells, f"{diversity[name]:.2f}" if name in diversity else "", won,
                      f"{seconds[name]:.0f}" if name in seconds else "")  # fmt: skip
    Console(width=220).print(table)
    target = Path(__file__).parent / "results" / "quality.json"
    target.write_text(
        json.dumps({"rows": rows, "wins": wins, "distinct-2": diversity, "seconds": seconds, **vars(options)}, indent=2)
        + "\n"
    )
    llm.close()


if __name__ == "__main__":
    main()
