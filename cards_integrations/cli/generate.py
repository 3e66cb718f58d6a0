"""`cards generate`"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cards_integrations.cli.options import (
    AllowImportsOption,
    ConfigOption,
    DecodingOption,
    JsonOption,
    MaxTokensOption,
    ModelOption,
    RewardOption,
    SeedOption,
    SetOption,
    StopOption,
    SystemOption,
    TemperatureOption,
    ThinkingOption,
    TopKOption,
    TopPOption,
    after_system,
    file_to_write,
    llm_from,
)
from cards_integrations.errors import CardsError, SettingsError, said

if TYPE_CHECKING:
    from cards_integrations.llm import CardsLLM
    from cards_integrations.progress import Advance
    from cards_integrations.trace import Alignment


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - reads it from standard input, and so does a pipe without it.")
    ] = None,
    config: ConfigOption = None,
    allow_imports: AllowImportsOption = False,
    model: ModelOption = None,
    reward: RewardOption = None,
    decoding: DecodingOption = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    seed: SeedOption = None,
    thinking: ThinkingOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    stop: StopOption = None,
    system: SystemOption = None,
    assigned: SetOption = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Answer the prompts of a file instead: lines of text, or JSON lines.")
    ] = None,
    out: Annotated[Path | None, file_to_write("Write the answers to a file of prompts here, as JSON lines.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Prompts of a file that are answered at the same time.")] = 64,
    trace: Annotated[Path | None, file_to_write("Write a page that shows how the answer was drafted here.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt, or every prompt of a file; an interrupted run continues where it stopped."""
    if prompt == "-" or (prompt is None and prompts is None and not sys.stdin.isatty()):
        prompt = sys.stdin.read().removesuffix("\n") or None
        if prompt is None and prompts is None:
            raise SettingsError("cards generate: give a prompt, or --prompts FILE; standard input is empty.")
    if (prompt is None) == (prompts is None):
        raise SettingsError("cards generate: give a prompt or --prompts FILE, but only one of the two.")
    if prompts is None and out is not None:
        raise SettingsError("--out is for the answers to --prompts FILE; the answer to a single prompt is printed.")
    if prompts is not None and trace is not None:
        raise SettingsError("--trace draws the answer to a single prompt: omit --prompts.")
    from cards_integrations.models.randomness import answer_seeds

    with llm_from(
        config, allow_imports, assigned, model=model, reward=reward, decoding=decoding, max_tokens=max_tokens,
        temperature=temperature, seed=seed, thinking=thinking, top_k=top_k, top_p=top_p, stop=stop,
    ) as llm:  # fmt: skip
        if prompts is not None:
            if failed := answer_file(llm, prompts, out, concurrency, system):
                raise CardsError(f"{failed} prompts could not be answered; run the same command to try them again.")
            return
        if trace is not None and llm.n > 1:
            raise SettingsError(f"--trace draws a single answer: omit n={llm.n}.")
        seeds = None if llm.seed is None else answer_seeds(llm.seed, llm.n)
        for answer in llm.align_batch([after_system(prompt, system)] * llm.n, seeds, n=1):
            print(json.dumps(as_row(answer), ensure_ascii=False) if as_json else answer.text, flush=True)
        if trace is not None:
            answer.to_html(trace)


def answer_file(llm: CardsLLM, prompts: Path, out: Path | None, concurrency: int, system: str | None = None) -> int:
    """Answer every prompt of a file; a prompt that fails is reported and left out.

    Args:
        llm: The language model.
        prompts: The file of prompts.
        out: A file to which every answer is added as a line of JSON once it is finished; prompts that it
            already answers are skipped. None prints the answers.
        concurrency: Prompts that are answered at the same time.
        system: The system message before each.

    Returns:
        The number of prompts that failed.

    Raises:
        SettingsError: If `out` answers other prompts.
    """
    from rich.console import Console

    from cards_integrations.http_client import gathered
    from cards_integrations.progress import phase, shown
    from cards_integrations.study.prompts import read_prompts
    from cards_integrations.study.rows import Results

    llm.engine = llm.engine.model_copy(update={"max_rows": max(concurrency, llm.engine.max_rows)})
    texts, contexts = read_prompts(prompts)
    results, console = Results(out, {"line"}), Console(stderr=True)
    answered = {row["line"]: row.get("prompt") for row in results.rows}
    for line, prompt in answered.items():
        if texts[line : line + 1] != [prompt]:
            raise SettingsError(
                f"Line {line} of {str(prompts)!r} is not the prompt that {str(out)!r} answers: give another --out."
            )
    missing = iter([line for line in range(len(texts)) if line not in answered])
    failed = 0

    async def answer(advance: Advance) -> None:
        nonlocal failed
        for line in missing:
            try:
                alignment = await llm.aalign(after_system(texts[line], system), context=contexts[line])
            except CardsError as error:
                failed += 1
                console.print(f"line {line}: {said(error)}", markup=False, soft_wrap=True)
            else:
                row = {"line": line, "prompt": texts[line], **as_row(alignment)}
                results.add([row])
                if out is None:
                    print(json.dumps(row, ensure_ascii=False), flush=True)
            advance()

    async def answer_all() -> None:
        with shown(llm.progress and out is not None), phase("answering", len(texts) - len(answered)) as advance:
            await gathered(answer(advance) for _ in range(concurrency))

    asyncio.run(answer_all())
    return failed


def as_row(answer: Alignment) -> dict[str, Any]:
    """Return an answer as the command prints it in JSON."""
    logprobs = {"logprobs": [asdict(token) for token in answer.logprobs]} if answer.logprobs else {}
    return {"text": answer.text, **answer.summary(), **logprobs}
