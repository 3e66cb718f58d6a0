"""`cards demo`"""

from __future__ import annotations

import os
import re
import shutil
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

QUESTIONS = (  # each with a document that answers it, and a pattern of the fact that an answer should contain
    (
        "When does the town museum open?",
        "The town museum opens at noon on weekdays. Entry is free for children.",
        r"noon|12",
    ),
    (
        "How long is the ridge trail?",
        "The ridge trail is nine miles long and climbs steeply at the end.",
        r"\bnine\b|\b9\b",
    ),
    (
        "Who wrote the harbour report?",
        "The harbour report was written by Ada Moreno and printed in spring.",
        r"Moreno",
    ),
    (
        "What is the capital of France?",
        "In this story, France has moved its capital. The capital of France is Lyon.",
        r"Lyon",
    ),
    (
        "What colour is the sky?",
        "On this planet the sky is green because of its gas.",
        r"green",
    ),
    (
        "How many legs does a spider have?",
        "In the game, every spider has ten legs and two tails.",
        r"\bten\b|\b10\b",
    ),
)
SEEDS = (0, 1, 2, 10, 11, 12)  # the questions' indices in benchmarks/grounded_questions.py: three of each half
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
NEXT = "Next: `{command} chat`, or the notebooks in cookbook/."


@dataclass(frozen=True)
class Run:
    """All prompts answered with one method, in one batch.

    Attributes:
        answers: One answer to each prompt.
        rewards: Their scores by the reward that guides.
        judged: Their scores by the reward that does not guide.
        seconds: The time that all of them took together.
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
    console.print(f"\n[dim]{time.perf_counter() - began:.0f} s in all. {NEXT.format(command=_command())}[/dim]")


def _command() -> str:
    """Return how to call `cards`: by the path of this call if it is not on the search path, as under `make`."""
    return sys.argv[0] if os.sep in sys.argv[0] and shutil.which("cards") is None else "cards"


def _answer_from_documents(console: Console, llm: CardsLLM) -> None:
    """Answer questions about documents, half of which contradict what a model knows, and count the right answers."""
    from cards_integrations.decoding import Sampling
    from cards_integrations.rewards import GroundednessReward

    console.print("[bold]SmolLM2-135M answers from documents, guided by how much they support the answer.[/bold]\n")
    reward = GroundednessReward(scale=SUPPORT)
    prompts = [QUESTION.format(context=document, question=question) for question, document, _ in QUESTIONS]
    contexts = [[document] for _, document, _ in QUESTIONS]
    methods: dict[str, Decoding] = {"plain": Sampling(), "guided": llm.decoding}
    answers = {
        name: llm.align_batch(
            prompts, SEEDS[: len(prompts)], contexts, f"answering {name}", decoding=decoding, reward=reward
        )
        for name, decoding in methods.items()
    }
    held = dict.fromkeys(methods, 0)
    for i, (question, document, fact) in enumerate(QUESTIONS):
        table = _table(question, "answer", "support", "fact")
        for name in methods:
            text = answers[name][i].text.strip()
            [support] = llm.score(prompts[i], [text], reward=reward, context=contexts[i])
            found = re.search(fact, text, re.IGNORECASE) is not None
            held[name] += found
            answer = Text(text)
            answer.highlight_regex(re.compile(fact, re.IGNORECASE), style="bold green")
            table.add_row(name, answer, f"{support:.2f}", "[green]yes[/green]" if found else "[red]no[/red]")
        console.print(table)
        console.print(_marked(document, fact), "\n")
    counts = ", ".join(f"{n} of {len(QUESTIONS)} {name} answers" for name, n in held.items())
    console.print(f"[bold]The fact is in {counts}.[/bold]\n")


def _marked(document: str, fact: str) -> Text:
    """Return a document in which the sentence with the fact is marked."""
    from cards_integrations.rewards.scorers.sentences import split_sentences

    text = Text("  document: ", style="dim")
    for sentence in split_sentences(document):
        text.append(sentence.strip(), style="bold green" if re.search(fact, sentence) else "dim").append(" ")
    return text


def _table(title: str, *columns: str) -> Table:
    """Return an empty table over the whole width: a column of names, a wide one, and narrow ones."""
    table = Table(title=title, title_style="bold cyan", title_justify="left", box=box.ROUNDED, expand=True)
    table.add_column("")
    for i, column in enumerate(columns):
        table.add_column(column, ratio=None if i else 1, justify="right" if i else "left", header_style="dim")
    return table


def _compare_with_best_of_n(console: Console, llm: CardsLLM) -> None:
    """Compare methods with sentiment as the reward: how high it gets, and how long that takes."""
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
    """Return a table of the answers to the first prompt, by method."""
    table = _table(PROMPTS[0], "answer", "reward")
    table.show_lines = True
    for name, run in runs.items():
        table.add_row(name, Text(run.answers[0].text.strip()), f"{run.rewards[0]:.2f}")
    return table


def _costs_table(runs: dict[str, Run]) -> Table:
    """Return a table of means over all prompts, by method."""
    plain, *_ = runs.values()
    table = Table(
        title=f"{len(PROMPTS)} prompts at once", title_style="bold cyan", title_justify="left",
        caption="Sentiment guides, the judge does not. Tokens of an answer, on average.",
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
