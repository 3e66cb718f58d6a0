"""`cards demo`"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cards_integrations.progress import phase

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
BEST_OF = 8
NEXT = "Next: `cards chat`, or the notebooks in cookbook/."


@dataclass(frozen=True)
class Run:
    """All prompts answered with one method, in one batch.

    Attributes:
        answers: One for each prompt.
        rewards: Of the reward that guides.
        judged: Of the reward that does not.
        seconds: That all answers took together.
    """

    answers: list[Alignment]
    rewards: list[float]
    judged: list[float]
    seconds: float


def demo() -> None:
    """Answer questions about documents, plain and guided by what supports the answer; then measure what guidance costs.

    The first run loads and measures what later ones find in the cache.
    """
    began = time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    with phase("importing the frameworks"):
        from cards_integrations.llm import CardsLLM
    with CardsLLM(max_tokens=48) as llm:
        _answer_from_documents(console, llm)
        _compare_with_best_of_n(console, llm)
    console.print(f"\n[dim]{time.perf_counter() - began:.0f} s in all. {NEXT}[/dim]")


def _answer_from_documents(console: Console, llm: CardsLLM) -> None:
    """Questions about documents: is what they say in the answers?"""
    from cards_integrations.decoding import Sampling
    from cards_integrations.rewards import GroundednessReward

    console.print("[bold]SmolLM2-135M answers from documents, guided by how much they support the answer.[/bold]\n")
    methods: dict[str, Decoding] = {"plain": Sampling(), "guided": llm.decoding}
    reward, held = GroundednessReward(scale=SUPPORT), dict.fromkeys(methods, 0)
    for seed, (question, fact) in enumerate(QUESTIONS):
        prompt = QUESTION.format(context=" ".join(DOCUMENTS), question=question)
        table = Table(title=question, title_style="bold cyan", title_justify="left", box=box.ROUNDED, expand=True)
        for column in ("", "answer", "support", "fact"):
            table.add_column(column, ratio=1 if column == "answer" else None, header_style="dim")
        for name, decoding in methods.items():
            text = llm.align(prompt, decoding=decoding, reward=reward, context=DOCUMENTS, seed=seed).text.strip()
            [support] = llm.score(prompt, [text], reward=reward, context=DOCUMENTS)
            found = re.search(fact, text, re.IGNORECASE) is not None
            held[name] += found
            answer = Text(text)
            answer.highlight_regex(re.compile(fact, re.IGNORECASE), style="bold green")
            table.add_row(name, answer, f"{support:.2f}", "[green]yes[/green]" if found else "[red]no[/red]")
        console.print(table)
        console.print(_source(fact), "\n")
    counts = ", ".join(f"{n} of {len(QUESTIONS)} {name} answers" for name, n in held.items())
    console.print(f"[bold]The fact is in {counts}.[/bold]\n")


def _source(fact: str) -> Text:
    """The document with the fact, its sentence marked."""
    from cards_integrations.rewards.scorers.sentences import split_sentences

    text = Text("  document: ", style="dim")
    document = next(document for document in DOCUMENTS if re.search(fact, document))
    for sentence in split_sentences(document):
        text.append(sentence.strip(), style="bold green" if re.search(fact, sentence) else "dim").append(" ")
    return text


def _compare_with_best_of_n(console: Console, llm: CardsLLM) -> None:
    """The simplest reward, sentiment: how high it gets, and in what time."""
    from cards_integrations.decoding import BestOfN, Sampling

    console.print("[bold]The same with sentiment as the reward: what it brings, and what it costs.[/bold]\n")
    with phase("getting ready to measure"):
        llm.align(PROMPTS[0], max_tokens=8)  # loads the reward and times its steps
        llm.score(PROMPTS[0], ["Yes."], reward=JUDGE)
    methods: dict[str, Decoding] = {
        "plain": Sampling(), f"best-of-{BEST_OF}": BestOfN(n=BEST_OF), llm.decoding.method: llm.decoding,
    }  # fmt: skip
    runs = {name: _run(llm, name, decoding) for name, decoding in methods.items()}
    console.print(_answers_table(runs))
    console.print(_costs_table(runs))


def _run(llm: CardsLLM, name: str, decoding: Decoding) -> Run:
    began = time.perf_counter()
    answers = llm.align_batch(PROMPTS, range(len(PROMPTS)), progress=f"answering by {name}", decoding=decoding)
    seconds = time.perf_counter() - began
    texts = list(zip(PROMPTS, answers, strict=True))
    rewards, judged = (
        [llm.score(prompt, [answer.text], reward=reward)[0] for prompt, answer in texts] for reward in (None, JUDGE)
    )
    return Run(answers, rewards, judged, seconds)


def _answers_table(runs: dict[str, Run]) -> Table:
    """The answers to the first prompt, by method."""
    table = Table(
        title=PROMPTS[0], title_style="bold cyan", title_justify="left", box=box.ROUNDED, show_lines=True, expand=True
    )
    table.add_column("")
    table.add_column("answer", ratio=1, header_style="dim")
    table.add_column("reward", justify="right", header_style="dim")
    for name, run in runs.items():
        table.add_row(name, Text(run.answers[0].text.strip()), f"{run.rewards[0]:.2f}")
    return table


def _costs_table(runs: dict[str, Run]) -> Table:
    """Means over all prompts, by method."""
    plain, *_ = runs.values()
    table = Table(
        title=f"{len(PROMPTS)} prompts at once", title_style="bold cyan", title_justify="left",
        caption="reward: sentiment, which guides; judge: a model that does not. Tokens are of an answer, on average.",
        caption_justify="left", box=box.ROUNDED,
    )  # fmt: skip
    table.add_column("")
    for column in ("reward", "judge", "tokens kept", "drafted", "seconds", "of plain's"):
        table.add_column(column, justify="right", header_style="dim")
    for name, run in runs.items():
        usages = [answer.usage for answer in run.answers]
        table.add_row(
            name,
            f"{fmean(run.rewards):.2f}",
            f"{fmean(run.judged):.2f}",
            f"{fmean(usage.completion_tokens for usage in usages):.0f}",
            f"{fmean(usage.drafted_tokens for usage in usages):.0f}",
            f"{run.seconds:.1f}",
            f"x {run.seconds / plain.seconds:.1f}",
        )
    return table


if __name__ == "__main__":
    demo()
