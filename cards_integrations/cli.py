"""The `cards` command."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cards_integrations.errors import CardsError, SettingsError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
console = Console(stderr=True)

Config = Annotated[Path | None, typer.Option(help="Settings as YAML; the other options override it.")]
AllowImports = Annotated[bool, typer.Option(help="The settings may name a reward function to import.")]


@app.callback()
def cards() -> None:
    """Aligned text from a local model: Cascade Reward Sampling."""


@app.command()
def calibrate(
    config: Config = None,
    allow_imports: AllowImports = False,
    model: Annotated[str | None, typer.Option(help="Name, hub id or directory of the language model.")] = None,
    reward: Annotated[str | None, typer.Option(help="Name, hub id, directory, or JSON of the reward.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Length limit of the answers.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="One prompt a line, or JSON lines with prompt (and context). Default: built in.")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Tokens to look at, as a multiple of a plain answer's.")] = None,
    goal: Annotated[float | None, typer.Option(help="The mean reward that answers should reach.")] = None,
    quantile: Annotated[float | None, typer.Option(help="The target as a quantile of plain answers' rewards.")] = None,
    segment_length: Annotated[float | None, typer.Option(help="Wanted mean length of a segment, in tokens.")] = None,
    candidates: Annotated[int, typer.Option(min=2, help="Scored drafts for each segment.")] = 4,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="Write settings as YAML here.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write charts here: .png, .svg, .pdf or .html.")] = None,
    remember: Annotated[bool, typer.Option(help='Make it what "auto" takes for these models.')] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Find the target reward, beta and entropy threshold for a language model and a reward model."""
    from cards_integrations.llm import CardsLLM

    asked, contexts = _prompts(prompts) if prompts else (None, None)
    options = {"model": model, "reward": reward, "max_tokens": max_tokens}
    llm = _llm(config, allow_imports, {name: value for name, value in options.items() if value is not None}, CardsLLM)
    with llm:
        found = llm.calibrate(
            asked, contexts=contexts, budget=budget, goal=goal, quantile=quantile, segment_length=segment_length,
            candidates=candidates, seed=seed, remember=remember, progress=not as_json,
        )  # fmt: skip
    if out:
        found.to_yaml(out)
    if report:
        found.save(report)
    if as_json:
        chosen = found.decoding.model_dump(mode="json")
        print(json.dumps({"decoding": chosen, "foreseen": asdict(found.chosen.foreseen), "warnings": found.warnings}))
    else:
        print(found)


def _llm(config: Path | None, allow_imports: bool, options: dict[str, Any], cls: Any) -> Any:
    """An LLM from a settings file and the options of the command line."""
    from cards_integrations.settings import CardsSettings

    settings = CardsSettings.from_yaml(config, allow_imports=allow_imports).options() if config else {}
    return cls(**{**settings, **options})


def _prompts(file: Path) -> tuple[list[Any], list[Any]]:
    """Prompts and contexts: JSON lines with `prompt`, or plain lines."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if file.suffix != ".jsonl":
            return lines, [None] * len(lines)
        rows = [json.loads(line) for line in lines]
        return [row["prompt"] for row in rows], [row.get("context") for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"--prompts {str(file)!r} cannot be read: {type(error).__name__}: {error}") from error


def main() -> None:
    """Entry point: errors of ours in one line, exit code 1; Ctrl-C exits with 130."""
    try:
        app()
    except CardsError as error:
        console.print(f"[red]{type(error).__name__}[/red]: ", end="")
        console.print(str(error), markup=False, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
