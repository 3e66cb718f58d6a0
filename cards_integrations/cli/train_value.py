"""`cards train-value`"""

from __future__ import annotations

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
    file_to_write,
    llm_from,
)


def train_value(
    prompts: Annotated[Path, typer.Argument(help="Lines of text, JSON lines, or HH-RLHF.")],
    out: Annotated[Path, file_to_write("Write the head here, as .safetensors.")],
    config: ConfigOption = None,
    allow_imports: AllowImportsOption = False,
    model: ModelOption = None,
    reward: RewardOption = None,
    max_tokens: MaxTokensOption = None,
    assigned: SetOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first prompts.")] = None,
    target: Annotated[
        str, typer.Option(help="Foretell the reward of the answer so far (prefix) or of the finished answer (value).")
    ] = "prefix",
    held_out: Annotated[float, typer.Option(help="The share of the prompts to test on.")] = 0.25,
    seed: Annotated[int, typer.Option(help="Seed of the first answer.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Train a value head on the language model's own hidden state, from what any reward says of its answers."""
    from cards_integrations.study.prompts import read_prompts

    texts, contexts = read_prompts(prompts)
    with llm_from(config, allow_imports, assigned, model=model, reward=reward, max_tokens=max_tokens) as llm:
        found = llm.train_value(
            texts[:limit], path=out, contexts=contexts[:limit], target=target, held_out=held_out, seed=seed,
        )  # fmt: skip
    print(found.card.model_dump_json() if as_json else found)
