"""Puts the commands of `cards`, as their own help describes them, into the page of the command line."""

from __future__ import annotations

import typer
from typer.cli import get_docs_for_click

from cards_integrations.cli import app

MARK = "<!-- generated: commands -->"


def on_page_markdown(markdown: str, **_: object) -> str:
    return markdown.replace(MARK, described()) if MARK in markdown else markdown


def described() -> str:
    """A section for each command."""
    group = typer.main.get_command(app)
    whole = get_docs_for_click(obj=group, ctx=typer.Context(group), name="cards")
    return whole[whole.index("\n## ") :]
