"""`cards judge`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cards_integrations.cli.options import JsonOption, file_to_write
from cards_integrations.errors import SettingsError


def judge(
    ours: Annotated[Path, typer.Argument(help="A file of answers, as `cards compare --out` writes it.")],
    theirs: Annotated[Path, typer.Argument(help="A file of answers to compare with.")],
    llm: Annotated[
        str, typer.Option(help="provider:model for LangChain's init_chat_model, or cards:model for a local one.")
    ] = "cards:smollm2",
    our_arm: Annotated[str | None, typer.Option(help="Use only this method of the first file.")] = None,
    their_arm: Annotated[str | None, typer.Option(help="Use only this method of the second file.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first prompts.")] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Pairs that are judged at the same time.")] = 8,
    out: Annotated[
        Path | None, file_to_write("Write every pair here, as JSON lines; an interrupted run continues.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation before the calls.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Let a language model judge which of two files has the better answers: wins, ties and losses."""
    from cards_integrations.study.judge import REQUIRED_FIELDS, judge, judge_prompts, paired
    from cards_integrations.study.rows import read_rows

    sides = [
        _rows_of(read_rows(file, REQUIRED_FIELDS | {"arm"}), arm)
        for file, arm in ((ours, our_arm), (theirs, their_arm))
    ]
    prompts = {json.dumps(row["asked"]): None for row in sides[0]}
    kept = set(list(prompts)[:limit])
    mine = [row for row in sides[0] if json.dumps(row["asked"]) in kept]
    calls = judge_prompts(mine, sides[1])
    if not calls:
        raise SettingsError(
            "cards judge: no prompt has an answer in both files: answer the same prompts with the same seeds."
        )
    tokens = sum(map(len, calls)) // 4
    if not as_json:
        pairs = len(paired(mine, sides[1]))
        typer.echo(f"{pairs} pairs: {len(calls)} calls, about {tokens:,} tokens of prompts.", err=True)
    if not yes and not as_json and not llm.startswith("cards:"):
        typer.confirm("Continue?", abort=True, err=True)
    found = judge(mine, sides[1], _judge_llm(llm), at_once=at_once, out=out)
    if as_json:
        print(json.dumps({"counts": found.counts, "win_tie": found.win_tie, "win_rate": found.win_rate}))
    else:
        print(found)


def _rows_of(rows: list[dict[str, Any]], name: str | None) -> list[dict[str, Any]]:
    arms = dict.fromkeys(row["arm"] for row in rows)
    if name is None and len(arms) > 1:
        raise SettingsError(
            f"The file holds answers of several methods ({', '.join(arms)}): pass --our-arm and --their-arm."
        )
    return [row for row in rows if name in (None, row["arm"])]


def _judge_llm(name: str) -> Any:
    provider, _, model = name.partition(":")
    if provider == "cards":
        from cards_integrations.chat.grammar import Grammar
        from cards_integrations.langchain.chat_model import ChatCards

        llm = ChatCards(model=model or "smollm2", decoding="sampling", reward=None, temperature=0.0, max_tokens=16)
        return llm.bind(grammar=Grammar.regex("(10|[1-9]) (10|[1-9])"))  # a small model would write anything else
    try:
        from langchain.chat_models import init_chat_model
    except ImportError as error:
        raise SettingsError(f"--llm {name!r} needs LangChain and its provider: pip install langchain.") from error
    return init_chat_model(name)
