"""`make demo`: the same prompts answered plainly and with CARDS, judged by a model that did not guide."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils import logging as transformers_logging

from cards_integrations.decoding import Decoding, Sampling
from cards_integrations.llm import CardsLLM
from cards_integrations.trace import Alignment

JUDGE = "sentiment-minilm"
PROMPTS = [
    "Write a short review of a restaurant you visited last night.",
    "How was your day at work?",
    "Describe the weather this week.",
    "Tell me about your new neighbours.",
    "What do you think of this old phone?",
    "Write a sentence about the train ride home.",
]


@dataclass(frozen=True)
class Outcome:
    """One answer and what is said of it."""

    answer: Alignment
    reward: float
    judge: float

    @property
    def log_likelihood(self) -> float:
        """Mean log p per token, nats."""
        return self.answer.log_likelihood / max(1, len(self.answer.token_ids))


def answered(llm: CardsLLM, prompt: str, decoding: Decoding, seed: int) -> Outcome:
    answer = llm.align(prompt, decoding=decoding, seed=seed)
    [reward], [judge] = llm.score(prompt, [answer.text]), llm.score(prompt, [answer.text], reward=JUDGE)
    return Outcome(answer, reward, judge)


def main() -> None:
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console(width=None if sys.stdout.isatty() else 120)
    llm = CardsLLM(max_tokens=64)
    methods: dict[str, Decoding] = {"plain": Sampling(), "CARDS": llm.decoding}
    outcomes: dict[str, list[Outcome]] = {name: [] for name in methods}
    console.print("[bold]SmolLM2-135M, guided by a sentiment reward; judged by a held-out MiniLM.[/bold]\n")
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    with llm, bar:
        task = bar.add_task("loading", total=len(PROMPTS) * len(methods))
        for seed, prompt in enumerate(PROMPTS):
            table = Table(title=f"[bold]{prompt}[/bold]", title_justify="left", show_lines=True, width=console.width)
            table.add_column("")
            table.add_column("answer", ratio=1)
            for column in COLUMNS:
                table.add_column(column, justify="right", min_width=7)
            for name, decoding in methods.items():
                bar.update(task, description=f"{name:>5}")
                outcome = answered(llm, prompt, decoding, seed)
                outcomes[name].append(outcome)
                table.add_row(name, outcome.answer.text.strip(), *_figures([outcome]))
                bar.advance(task)
            bar.print(table)
    means = Table(title=f"[bold]mean over {len(PROMPTS)} prompts[/bold]", title_justify="left", width=console.width)
    for column in ("", *COLUMNS):
        means.add_column(column, justify="right")
    for name, found in outcomes.items():
        means.add_row(name, *_figures(found))
    console.print(means)


COLUMNS = ("reward", "judge", "log p\n/ token", "tokens\nkept", "tokens\ndrafted", "RM\ncalls", "s")


def _figures(outcomes: list[Outcome]) -> list[str]:
    """A table row: means over the outcomes."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    usages = [o.answer.usage for o in outcomes]
    return [
        f"{mean([o.reward for o in outcomes]):.2f}",
        f"{mean([o.judge for o in outcomes]):.2f}",
        f"{mean([o.log_likelihood for o in outcomes]):.2f}",
        f"{mean([float(u.completion_tokens) for u in usages]):.0f}",
        f"{mean([float(u.drafted_tokens) for u in usages]):.0f}",
        f"{mean([float(u.rm_forwards) for u in usages]):.0f}",
        f"{mean([u.seconds for u in usages]):.1f}",
    ]


if __name__ == "__main__":
    main()
