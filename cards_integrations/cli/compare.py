"""`cards compare`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cards_integrations.cli.options import (
    AllowImports,
    Config,
    Json,
    MaxTokens,
    Model,
    RewardOption,
    Temperature,
    decoding_from,
    file_to_write,
    llm_from,
)


def compare(
    prompts: Annotated[Path, typer.Argument(help="Lines of text, JSON lines, or HH-RLHF.")],
    method: Annotated[
        list[str] | None, typer.Option(help="A method to compare, as in --decoding; again for each one.")
    ] = None,
    config: Config = None,
    allow_imports: AllowImports = False,
    model: Model = None,
    reward: RewardOption = None,
    judge: Annotated[str | None, typer.Option(help="A reward that guides nothing, and only judges.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Answers to each prompt.")] = 1,
    at_once: Annotated[int, typer.Option(min=1, help="Prompts that are drafted together.")] = 16,
    out: Annotated[Path | None, file_to_write("Every answer as a JSON line; an interrupted run goes on.")] = None,
    report: Annotated[Path | None, file_to_write("A page with table, charts and answers.")] = None,
    as_json: Json = False,
) -> None:
    """Answer the same prompts with several methods, and see what each buys and costs."""
    from rich.console import Console

    from cards_integrations.study import compare as run
    from cards_integrations.study import read_prompts

    arms = {name: decoding_from(name) for name in method or ("sampling", "best_of_n:n=8", "cards")}
    asked, contexts = read_prompts(prompts)
    with llm_from(
        config, allow_imports, model=model, reward=reward, max_tokens=max_tokens, temperature=temperature
    ) as llm:
        found = run(
            llm, arms, asked[:limit], contexts=contexts[:limit], judge=judge, seeds=range(seeds), at_once=at_once,
            out=out, progress=not as_json,
        )  # fmt: skip
    if as_json:
        print(json.dumps(found.summary()))
    else:
        Console().print(found.table())
    if report:
        found.to_html(report)
