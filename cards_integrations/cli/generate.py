"""`cards generate`"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cards_integrations.cli.options import (
    AllowImports,
    Config,
    Json,
    MaxTokens,
    Method,
    Model,
    RewardOption,
    Temperature,
    llm_from,
)
from cards_integrations.errors import SettingsError

if TYPE_CHECKING:
    from cards_integrations.llm import CardsLLM
    from cards_integrations.trace import Alignment


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to answer; - reads it from standard input.")] = None,
    config: Config = None,
    allow_imports: AllowImports = False,
    model: Model = None,
    reward: RewardOption = None,
    decoding: Method = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: int | None = None,
    prompts: Annotated[Path | None, typer.Option(help="Answer a file instead: lines of text, or JSON lines.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the answers to a file go, as JSON lines.")] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Prompts of a file that are drafted together.")] = 32,
    trace: Annotated[Path | None, typer.Option(help="Write a picture of the answer here, as a page.")] = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt, or every prompt of a file; an interrupted file goes on where it stopped."""
    with llm_from(
        config, allow_imports, model=model, reward=reward, decoding=decoding, max_tokens=max_tokens,
        temperature=temperature, seed=seed,
    ) as llm:  # fmt: skip
        if prompts is not None:
            answer_file(llm, prompts, out, at_once)
            return
        if prompt is None:
            raise SettingsError("cards generate: give a prompt, or --prompts FILE.")
        answer = llm.align(sys.stdin.read() if prompt == "-" else prompt)
        if trace is not None:
            answer.to_html(trace)
        print(json.dumps(as_row(answer), ensure_ascii=False) if as_json else answer.text)


def answer_file(llm: CardsLLM, prompts: Path, out: Path | None, at_once: int) -> None:
    """One line for each prompt, in their order; those that stand in `out` already are not answered again."""
    from rich.console import Console
    from rich.progress import track

    from cards_integrations.study.prompts import read_prompts
    from cards_integrations.study.rows import Results

    asked, contexts = read_prompts(prompts)
    results = Results(out)
    starts = range(len(results.rows), len(asked), at_once)
    for at in track(starts, description="answers", console=Console(stderr=True), disable=out is None):
        here = slice(at, at + at_once)
        answers = llm.align_batch(asked[here], contexts=contexts[here])
        rows = [{"line": i, "prompt": asked[i], **as_row(answer)} for i, answer in enumerate(answers, start=at)]
        results.add(rows)
        for row in rows if out is None else ():
            print(json.dumps(row, ensure_ascii=False))


def as_row(answer: Alignment) -> dict[str, Any]:
    return {"text": answer.text, **answer.summary()}
