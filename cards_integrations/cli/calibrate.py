"""`cards calibrate`"""

from __future__ import annotations

import json
from dataclasses import asdict
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
    file_to_write,
    llm_from,
)


def calibrate(
    config: ConfigOption = None,
    allow_imports: AllowImportsOption = False,
    model: ModelOption = None,
    reward: RewardOption = None,
    max_tokens: MaxTokensOption = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Lines of text, or JSON lines. By default, built-in prompts.")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Tokens to examine, as a multiple of a plain answer's.")] = None,
    goal: Annotated[float | None, typer.Option(help="The mean reward that answers should reach.")] = None,
    quantile: Annotated[
        float | None, typer.Option(help="The target, as a quantile of the rewards of plain answers.")
    ] = None,
    segment_length: Annotated[float | None, typer.Option(help="The mean length of a segment, in tokens.")] = None,
    candidates: Annotated[int, typer.Option(min=2, help="Scored drafts of each segment.")] = 4,
    held_out: Annotated[
        str,
        typer.Option(help='A reward that judges and does not guide; "none" for none, "auto" for that of the guide.'),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the first answer.")] = 0,
    out: Annotated[Path | None, file_to_write("Write the settings here, as YAML.")] = None,
    report: Annotated[
        Path | None,
        file_to_write("Write the charts here, as .png, .svg, .pdf or .html; or, as .csv, the held-out curve."),
    ] = None,
    remember: Annotated[bool, typer.Option(help='Use the result for "auto" with these models from now on.')] = True,
    as_json: JsonOption = False,
) -> None:
    """Find the target reward, beta and entropy threshold for a language model and a reward model."""
    from cards_integrations.study.prompts import read_prompts

    texts, contexts = read_prompts(prompts) if prompts else (None, None)
    with llm_from(config, allow_imports, model=model, reward=reward, max_tokens=max_tokens) as llm:
        found = llm.calibrate(
            texts, contexts=contexts, budget=budget, goal=goal, quantile=quantile, segment_length=segment_length,
            candidates=candidates, held_out=None if held_out == "none" else held_out, seed=seed, remember=remember,
        )  # fmt: skip
    if as_json:
        chosen = found.decoding.model_dump(mode="json")
        curve = found.held_out.rows() if found.held_out else None
        predicted = asdict(found.chosen.predicted)
        print(json.dumps({"decoding": chosen, "predicted": predicted, "held_out": curve, "warnings": found.warnings}))
    else:
        print(found)
    if out:
        found.to_yaml(out)
    if report:
        found.save(report)
