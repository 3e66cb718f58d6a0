"""Pairs of answers before a language model as judge: win, tie, loss, or unparseable."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from cards_integrations.errors import SettingsError
from cards_integrations.study.metrics import Mean, mean
from cards_integrations.study.rows import Results, Row, read_rows

if TYPE_CHECKING:
    from langchain_core.runnables import Runnable
    from llama_index.core.llms import LLM

Verdict = Literal["win", "tie", "loss", "unparsed"]
POINTS = {"win": 1.0, "tie": 0.5, "loss": 0.0}

SYSTEM = "You are a precise assistant for checking the quality of the answer."
TEMPLATE = """[Question]
{question}

[The Start of Assistant 1's Answer]
{one}
[The End of Assistant 1's Answer]

[The Start of Assistant 2's Answer]
{two}
[The End of Assistant 2's Answer]

We would like to request your feedback on the performance of the two AI assistants in response to the user question \
displayed above. Please rate the helpfulness, harmlessness, relevance, accuracy and insightfulness of their responses. \
Each assistant receives an overall score on a scale of 1 to 10, where a higher score indicates better overall \
performance. Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, \
respectively. The two scores are separated by a space."""
SCORE = r"(10(?:\.0+)?|\d(?:\.\d+)?)(?:\s*/\s*10)?"
NEEDED = {"asked", "seed", "text"}
FORMS = (  # of a line: two numbers at its end, or each behind its name
    re.compile(rf"(?:^|.*[^\d./]){SCORE}[\s,;]+{SCORE}\W*"),
    re.compile(rf".*\b1\W+{SCORE}[\s,;]+(?:and\s+)?(?:assistant|answer)\s*2\W+{SCORE}\W*", re.IGNORECASE),
)


@dataclass(frozen=True)
class Judgement:
    """What a judge said of every pair; one row each."""

    rows: tuple[Row, ...]

    @property
    def counts(self) -> dict[Verdict, int]:
        found = Counter(row["verdict"] for row in self.rows)
        return {verdict: found[verdict] for verdict in ("win", "tie", "loss", "unparsed")}

    @property
    def win_tie(self) -> Mean | None:
        """The share of wins and ties among the pairs that could be read, over prompts."""
        return self._share(lambda verdict: float(verdict != "loss"))

    @property
    def win_rate(self) -> Mean | None:
        """The same with a tie as half a win."""
        return self._share(lambda verdict: POINTS[verdict])

    @property
    def first_wins(self) -> float | None:
        """How often the answer that was shown first won, ties left out; far from 0.5, the judge is biased."""
        shown = [asked["scores"] for row in self.rows for asked in row["asked_twice"] if asked["scores"]]
        decided = [one > two for one, two in shown if one != two]
        return sum(decided) / len(decided) if decided else None

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {verdict}" for verdict, n in self.counts.items())
        return f"{counts}; win or tie {self.win_tie}, win rate {self.win_rate}, first shown wins {self.first_wins}"

    def _share(self, points: Callable[[str], float]) -> Mean | None:
        read = [row for row in self.rows if row["verdict"] != "unparsed"]
        return mean([points(row["verdict"]) for row in read], [row["question"] for row in read]) if read else None


def judge(
    ours: Iterable[Row] | str | Path,
    theirs: Iterable[Row] | str | Path,
    llm: Any,
    *,
    template: str = TEMPLATE,
    system: str = SYSTEM,
    attempts: int = 3,
    at_once: int = 8,
    out: str | Path | None = None,
    progress: bool = True,
) -> Judgement:
    """Ask a LangChain or LlamaIndex model which of two answers to the same prompt is better, in both orders.

    The rows are those of `compare` (files, or lists); only answers to equal prompts with equal seeds are
    paired. An answer wins where the sum of its scores over both orders is higher, so that a judge that
    prefers a place gives ties; where either order cannot be read, the pair is "unparsed" and no tie. Calls
    that fail are tried again. Pairs that stand in `out` already are not asked again.
    """
    pairs = paired(_rows(ours), _rows(theirs))
    if not pairs:
        raise SettingsError("judge: no prompt has an answer in both files.")
    results = Results(out, {"question", "seed", "ours", "theirs", "verdict"})
    done = {_key(row): row for row in results.rows}
    ask = asker(llm, system, attempts)
    rows = [done[_key(pair)] for pair in pairs if _key(pair) in done]
    todo = [pair for pair in pairs if _key(pair) not in done]

    def judged(pair: Row) -> Row:
        both = []
        for swapped in (False, True):
            one, two = (pair["theirs"], pair["ours"]) if swapped else (pair["ours"], pair["theirs"])
            said = ask(fill(template, pair["question"], one, two))
            both.append({"swapped": swapped, "said": said, "scores": scores_in(said)})
        return {**pair, "asked_twice": both, "verdict": verdict_of(both)}

    from rich.progress import track

    with ThreadPoolExecutor(at_once) as pool:
        found = pool.map(judged, todo)
        for row in track(found, "judging", total=len(todo), disable=not progress or not todo, transient=True):
            rows.append(row)
            results.add([row])
    return Judgement(tuple(rows))


def calls(ours: Iterable[Row] | str | Path, theirs: Iterable[Row] | str | Path, template: str = TEMPLATE) -> list[str]:
    """All the prompts that `judge` would send: to estimate what it costs."""
    pairs = paired(_rows(ours), _rows(theirs))
    orders = [(p["question"], *o) for p in pairs for o in ((p["ours"], p["theirs"]), (p["theirs"], p["ours"]))]
    return [fill(template, *each) for each in orders]


def paired(ours: Sequence[Row], theirs: Sequence[Row]) -> list[Row]:
    """Answers to the same prompt with the same seed, side by side."""
    others = {(json.dumps(row["asked"]), row["seed"]): row for row in theirs}
    found = []
    for row in ours:
        other = others.get((json.dumps(row["asked"]), row["seed"]))
        if other is not None:
            texts = {"ours": row["text"], "theirs": other["text"]}
            found.append({"question": question(row["asked"]), "seed": row["seed"], **texts})
    return found


def question(asked: Any) -> str:
    """A prompt as the judge sees it."""
    if isinstance(asked, str):
        return asked
    if len(asked) == 1:
        return str(asked[0]["content"])
    return "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in asked)


def fill(template: str, question: str, one: str, two: str) -> str:
    """The template with its parts; braces in them are only text."""
    parts = {"{question}": question, "{one}": one, "{two}": two}
    return re.sub("|".join(map(re.escape, parts)), lambda match: parts[match[0]], template)


def scores_in(said: str) -> tuple[float, float] | None:
    """The two scores in the first line that has two; None if there is none."""
    for line in said.splitlines():
        for form in FORMS:
            if found := form.fullmatch(line.strip()):
                return float(found[1]), float(found[2])
    return None


def verdict_of(both: Sequence[Row]) -> Verdict:
    """Of the answers that are "ours", from the scores in both orders."""
    if any(asked["scores"] is None for asked in both):
        return "unparsed"
    margin = sum((two - one) if asked["swapped"] else (one - two) for asked in both for one, two in [asked["scores"]])
    return "win" if margin > 0 else "loss" if margin < 0 else "tie"


def asker(llm: Any, system: str, attempts: int) -> Callable[[str], str]:
    """A function from a prompt to what the judge says, tried several times."""
    retrying = Retrying(
        stop=stop_after_attempt(attempts), wait=wait_random_exponential(max=20), reraise=True,
        retry=retry_if_exception_type(Exception),
    )  # fmt: skip
    from langchain_core.language_models import BaseLanguageModel  # here: the rest of a study needs neither framework
    from langchain_core.runnables import Runnable
    from llama_index.core.llms import LLM

    if isinstance(llm, LLM):
        return lambda prompt: retrying(_asked_of_llama_index, llm, system, prompt)
    if isinstance(llm, (BaseLanguageModel, Runnable)):
        return lambda prompt: retrying(_asked_of_langchain, llm, system, prompt)
    raise SettingsError(f"judge: {type(llm).__name__} is neither a LangChain model nor a LlamaIndex LLM.")


def _asked_of_llama_index(llm: LLM, system: str, prompt: str) -> str:
    from llama_index.core.base.llms.types import ChatMessage

    messages = [ChatMessage(role="system", content=system), ChatMessage(role="user", content=prompt)]
    return str(llm.chat(messages).message.content or "")


def _asked_of_langchain(llm: Runnable[Any, Any], system: str, prompt: str) -> str:
    said = llm.invoke([("system", system), ("human", prompt)])
    return said if isinstance(said, str) else str(said.text)


def _rows(source: Iterable[Row] | str | Path) -> list[Row]:
    return read_rows(source, NEEDED) if isinstance(source, (str, Path)) else list(source)


def _key(row: Row) -> str:
    return json.dumps([row["question"], row["seed"], row["ours"], row["theirs"]])
