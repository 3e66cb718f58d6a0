"""`cards compare`"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cards_integrations.cli.options import (
    AllowImportsOption,
    ConfigOption,
    JsonOption,
    MaxTokensOption,
    ModelOption,
    RewardOption,
    SetOption,
    TemperatureOption,
    file_to_write,
    llm_from,
)

METHODS = ("sampling", "best_of_n:n=8", "cascade")  # plain answers, the simplest method, and the default


def compare(
    prompts: Annotated[Path, typer.Argument(help="Lines of text, JSON lines, or HH-RLHF.")],
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A method to compare, as for --decoding; repeat it for each. "
            f"By default {', '.join(METHODS[:-1])} and {METHODS[-1]}."
        ),
    ] = None,
    config: ConfigOption = None,
    allow_imports: AllowImportsOption = False,
    model: ModelOption = None,
    reward: RewardOption = None,
    judge: Annotated[str | None, typer.Option(help="A reward that only judges and does not guide.")] = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    assigned: SetOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first prompts.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="The number of answers to each prompt.")] = 1,
    at_once: Annotated[int, typer.Option(min=1, help="Prompts that are answered in one batch.")] = 16,
    out: Annotated[
        Path | None, file_to_write("Write every answer here, as JSON lines; an interrupted run continues.")
    ] = None,
    report: Annotated[Path | None, file_to_write("Write a page with table, charts and answers here.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Answer the same prompts with several methods, and compare what each gains and costs."""
    from rich.console import Console

    from cards_integrations.decoding import as_decoding
    from cards_integrations.study import compare as run
    from cards_integrations.study import read_prompts

    arms = {name: as_decoding(name) for name in method or METHODS}
    texts, contexts = read_prompts(prompts)
    with llm_from(
        config, allow_imports, assigned, model=model, reward=reward, max_tokens=max_tokens, temperature=temperature
    ) as llm:
        found = run(
            llm, arms, texts[:limit], contexts=contexts[:limit], judge=judge, seeds=range(seeds), at_once=at_once,
            out=out,
        )  # fmt: skip
    if as_json:
        print(json.dumps(found.summary()))
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(found.table())  # 160 columns in a file
    if report:
        found.to_html(report)
