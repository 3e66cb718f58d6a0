"""The `cards` command; one module for each subcommand."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from cards_integrations.cli import (
    calibrate,
    chat,
    compare,
    demo,
    doctor,
    generate,
    judge,
    lists,
    mcp,
    serve,
    train_value,
)
from cards_integrations.errors import CardsError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(compare.compare)
app.command()(judge.judge)
app.command()(calibrate.calibrate)
app.command()(train_value.train_value)
app.command()(lists.rewards)
app.command()(lists.models)
app.command()(doctor.doctor)
app.command()(serve.serve)
app.command()(mcp.mcp)
app.command()(demo.demo)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(version("cards-integrations"))
        raise typer.Exit


@app.callback()
def cards(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Aligned text from a local model: Cascade Reward Sampling."""


def main() -> None:
    """Run the command. An error of this package or of a file is one line and exit code 1; Ctrl-C is exit code 130."""
    try:
        app()
    except (CardsError, OSError) as error:
        console = Console(stderr=True)
        console.print(f"[red]{type(error).__name__}[/red]: ", end="")
        console.print(" ".join(str(error).splitlines()), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("cards: interrupted", file=sys.stderr)
        sys.exit(130)
