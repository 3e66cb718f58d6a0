"""`cards generate`"""

from __future__ import annotations

import asyncio
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
    file_to_write,
    llm_from,
)
from cards_integrations.errors import CardsError, SettingsError

if TYPE_CHECKING:
    from rich.progress import TaskID

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
    out: Annotated[Path | None, file_to_write("Where the answers to a file go, as JSON lines.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Prompts of a file that are answered at once.")] = 64,
    trace: Annotated[Path | None, file_to_write("Write a picture of the answer here, as a page.")] = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt, or every prompt of a file; an interrupted file goes on where it stopped."""
    if (prompt is None) == (prompts is None):
        raise SettingsError("cards generate: give a prompt or --prompts FILE, one of the two.")
    if prompts is None and out is not None:
        raise SettingsError("--out is for the answers to --prompts FILE; that to one prompt is printed.")
    if prompts is not None and trace is not None:
        raise SettingsError("--trace draws the answer to one prompt: leave --prompts out.")
    with llm_from(
        config, allow_imports, model=model, reward=reward, decoding=decoding, max_tokens=max_tokens,
        temperature=temperature, seed=seed,
    ) as llm:  # fmt: skip
        if prompts is not None:
            if failed := answer_file(llm, prompts, out, concurrency):
                raise CardsError(f"{failed} prompts have no answer; the same command tries them again.")
            return
        answer = llm.align(sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt)
        print(json.dumps(as_row(answer), ensure_ascii=False) if as_json else answer.text, flush=True)
        if trace is not None:
            answer.to_html(trace)


def answer_file(llm: CardsLLM, prompts: Path, out: Path | None, concurrency: int) -> int:
    """One line for each prompt, written when it is answered; what stands in `out` already is not asked again.

    A prompt that fails is told of and left out. Returns how many did.
    """
    from rich.console import Console
    from rich.progress import Progress

    from cards_integrations.http_client import gathered
    from cards_integrations.study.prompts import read_prompts
    from cards_integrations.study.rows import Results

    llm.engine = llm.engine.model_copy(update={"max_rows": max(concurrency, llm.engine.max_rows)})
    asked, contexts = read_prompts(prompts)
    results, console = Results(out, {"line"}), Console(stderr=True)
    known = {row["line"]: row.get("prompt") for row in results.rows}
    for line, before in known.items():
        if asked[line : line + 1] != [before]:
            raise SettingsError(
                f"Line {line} of {str(prompts)!r} is not what {str(out)!r} answers: give another --out."
            )
    todo = iter([line for line in range(len(asked)) if line not in known])
    failed = 0

    async def answer(progress: Progress, task: TaskID) -> None:
        nonlocal failed
        for line in todo:
            try:
                found = await llm.aalign(asked[line], context=contexts[line])
            except CardsError as error:
                failed += 1
                console.print(f"line {line}: {type(error).__name__}: {error}", markup=False, soft_wrap=True)
            else:
                row = {"line": line, "prompt": asked[line], **as_row(found)}
                results.add([row])
                if out is None:
                    print(json.dumps(row, ensure_ascii=False), flush=True)
            progress.advance(task)

    async def answer_all() -> None:
        with Progress(console=console, disable=out is None) as progress:
            task = progress.add_task("answers", total=len(asked), completed=len(known))
            await gathered(answer(progress, task) for _ in range(concurrency))

    asyncio.run(answer_all())
    return failed


def as_row(answer: Alignment) -> dict[str, Any]:
    return {"text": answer.text, **answer.summary()}
