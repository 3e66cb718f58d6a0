"""Puts the pinned versions of packages into a page, where it names them: `<!-- generated: versions torch ... -->`."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.utils import canonicalize_name

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
MARK = re.compile(r"<!-- generated: versions (?P<names>.+) -->")


def on_page_markdown(markdown: str, **_: object) -> str:
    return MARK.sub(lambda found: table(found["names"].split()), markdown)


def table(names: list[str]) -> str:
    """A row for each package."""
    pinned = re.findall(r"^([\w.-]+)==(\S+)", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    versions = {canonicalize_name(name): version for name, version in pinned}
    return "\n".join(["| package | version |", "|---|---|", *(f"| {name} | {versions[name]} |" for name in names)])
