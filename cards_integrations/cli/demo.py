"""`cards demo`"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from cards_integrations.decoding import Decoding
    from cards_integrations.llm import CardsLLM
    from cards_integrations.trace import Alignment

DOCUMENTS = (
    "The town museum opens at noon on weekdays. Children enter free of charge.",
    "The ridge trail is nine miles long. It starts behind the old mill.",
    "In this town the buses are painted violet. They run until midnight.",
    "The harbour report was written by Ada Moreno. It was printed in spring.",
)
QUESTIONS = (  # each with the fact that an answer should hold
    ("When does the town museum open?", r"noon|12"),
    ("How long is the ridge trail?", r"\bnine\b|\b9\b"),
    ("What colour are the buses?", r"violet"),
    ("Who wrote the harbour report?", r"Moreno"),
)
QUESTION = "Context: {context}\n\nQuestion: {question}\n\nAnswer the question in one sentence."
SUPPORT = (1.55, 0.87)  # mean and standard deviation over plain answers of SmolLM2, as an engine measures them
JUDGE = "sentiment-minilm"
PROMPTS = [
    "Write a short review of a restaurant you visited last night.",
    "How was your day at work?",
    "Tell me about your new neighbours.",
    "Write a sentence about the train ride home.",
]
COLUMNS = (
    "reward", "judge", "repeated\n%", "log p\n/ token", "tokens\nkept", "tokens\ndrafted", "RM\ncalls", "s",
)  # fmt: skip


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer with the rewards of the guide and of the judge."""

    answer: Alignment
    reward: float
    judge: float

    @property
    def log_likelihood(self) -> float:
        """Mean log p per token, in nats."""
        return self.answer.log_likelihood / max(1, len(self.answer.token_ids))


def demo() -> None:
    """Answer plainly and with CARDS: questions about documents, and prompts that a sentiment reward guides."""
    from transformers.utils import logging as transformers_logging

    from cards_integrations.decoding import Sampling
    from cards_integrations.llm import CardsLLM

    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console(width=None if sys.stdout.isatty() else 120)
    llm = CardsLLM(max_tokens=64)
    methods: dict[str, Decoding] = {"plain": Sampling(), "CARDS": llm.decoding}
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    with llm, bar:
        _answer_from_documents(llm, methods, bar)
        _answer_in_good_spirits(llm, methods, bar)


def _answer_from_documents(llm: CardsLLM, methods: dict[str, Decoding], bar: Progress) -> None:
    """Questions about documents: is what they say in the answers?"""
    from cards_integrations.rewards import GroundednessReward

    bar.print("[bold]SmolLM2-135M answers from documents, guided by how much they support the answer.[/bold]\n")
    task = bar.add_task("loading", total=len(QUESTIONS) * len(methods))
    reward, held = GroundednessReward(scale=SUPPORT), dict.fromkeys(methods, 0)
    for seed, (question, fact) in enumerate(QUESTIONS):
        prompt = QUESTION.format(context=" ".join(DOCUMENTS), question=question)
        table = Table(title=f"[bold]{question}[/bold]", title_justify="left", show_lines=True, width=bar.console.width)
        for column in ("", "answer", "support", "fact"):
            table.add_column(column, ratio=1 if column == "answer" else None)
        for name, decoding in methods.items():
            bar.update(task, description=f"{name:>5}")
            text = llm.align(prompt, decoding=decoding, reward=reward, context=DOCUMENTS, seed=seed).text.strip()
            [support] = llm.score(prompt, [text], reward=reward, context=DOCUMENTS)
            found = re.search(fact, text, re.IGNORECASE) is not None
            held[name] += found
            table.add_row(name, text, f"{support:.2f}", "[green]yes[/green]" if found else "[red]no[/red]")
            bar.advance(task)
        bar.print(table)
        bar.print(_marked(fact), "\n")
    bar.remove_task(task)
    counts = ", ".join(f"{n} of {len(QUESTIONS)} {name} answers" for name, n in held.items())
    bar.print(f"[bold]The fact is in {counts}.[/bold]\n")


def _marked(fact: str) -> Text:
    """The documents, the sentence with the fact marked."""
    from cards_integrations.rewards.scorers.sentences import split_sentences

    text = Text("documents: ", style="dim")
    for sentence in (sentence for document in DOCUMENTS for sentence in split_sentences(document)):
        text.append(sentence.strip(), style="bold green" if re.search(fact, sentence) else "dim").append(" ")
    return text


def _answer_in_good_spirits(llm: CardsLLM, methods: dict[str, Decoding], bar: Progress) -> None:
    """The simplest reward: sentiment, with a judge that did not guide."""
    bar.print("[bold]The simplest reward: sentiment, judged by a held-out MiniLM.[/bold]\n")
    answers: dict[str, list[ScoredAnswer]] = {name: [] for name in methods}
    task = bar.add_task("loading", total=len(PROMPTS) * len(methods))
    for seed, prompt in enumerate(PROMPTS):
        for name, decoding in methods.items():
            bar.update(task, description=f"{name:>5}")
            answers[name].append(_answer(llm, prompt, decoding, seed))
            bar.advance(task)
        bar.print(_answers_table(bar.console, prompt, {name: found[-1] for name, found in answers.items()}))
    bar.remove_task(task)
    bar.print(_means_table(bar.console, answers))


def _answer(llm: CardsLLM, prompt: str, decoding: Decoding, seed: int) -> ScoredAnswer:
    answer = llm.align(prompt, decoding=decoding, seed=seed)
    [reward], [judge] = llm.score(prompt, [answer.text]), llm.score(prompt, [answer.text], reward=JUDGE)
    return ScoredAnswer(answer, reward, judge)


def _answers_table(console: Console, prompt: str, answers: dict[str, ScoredAnswer]) -> Table:
    """The answers to one prompt, by method."""
    table = Table(title=f"[bold]{prompt}[/bold]", title_justify="left", show_lines=True, width=console.width)
    table.add_column("")
    table.add_column("answer", ratio=1)
    for column in COLUMNS:
        table.add_column(column, justify="right", min_width=7)
    for name, scored in answers.items():
        table.add_row(name, scored.answer.text.strip(), *_means([scored]))
    return table


def _means_table(console: Console, answers: dict[str, list[ScoredAnswer]]) -> Table:
    """Means over all prompts, by method; how varied the texts are, and how often the judge prefers them to plain."""
    from cards_integrations.study.metrics import distinct, points

    table = Table(title=f"[bold]mean over {len(PROMPTS)} prompts[/bold]", title_justify="left", width=console.width)
    for column in ("", *COLUMNS, "distinct\n-2", "wins\n%"):
        table.add_column(column, justify="right")
    plain, *_ = answers.values()
    for name, found in answers.items():
        won = fmean(points(one.judge, other.judge) for one, other in zip(found, plain, strict=True))
        varied = distinct([scored.answer.text for scored in found], 2)
        table.add_row(name, *_means(found), f"{varied:.2f}", "" if found is plain else f"{100 * won:.0f}")
    return table


def _means(answers: Sequence[ScoredAnswer]) -> Iterable[str]:
    """The cells of `COLUMNS`."""
    from cards_integrations.study.metrics import repeated_3grams

    usages = [scored.answer.usage for scored in answers]
    return (
        f"{fmean(scored.reward for scored in answers):.2f}",
        f"{fmean(scored.judge for scored in answers):.2f}",
        f"{fmean(repeated_3grams(scored.answer.text) for scored in answers):.1f}",
        f"{fmean(scored.log_likelihood for scored in answers):.2f}",
        f"{fmean(usage.completion_tokens for usage in usages):.0f}",
        f"{fmean(usage.drafted_tokens for usage in usages):.0f}",
        f"{fmean(usage.rm_forwards for usage in usages):.0f}",
        f"{fmean(usage.seconds for usage in usages):.1f}",
    )


if __name__ == "__main__":
    demo()
