"""Distributions with one module and one entry point, as an installer leaves them."""

from __future__ import annotations

from pathlib import Path


def leave(folder: Path, group: str, name: str, code: str) -> None:
    """The entry point `name` of `cards_integrations.{group}` is `Mine` in this code."""
    module = f"cards_plugin_{name}"
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[cards_integrations.{group}]\n{name} = {module}:Mine\n")
