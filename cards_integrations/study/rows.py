"""Results as lines of JSON, to which an interrupted run adds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cards_integrations.errors import SettingsError

Row = dict[str, Any]


def read_rows(path: str | Path) -> list[Row]:
    """Every line of a file."""
    path, rows = Path(path), []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"The results {str(path)!r} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise SettingsError(f"{str(path)!r}, line {number}, is not JSON.") from None
    return rows


class Results:
    """A file that grows; what stands there when it is opened is in `rows`. Without a path nothing is written.

    Half a line at its end, of a run that was killed, is cut off.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = Path(path) if path else None
        self.rows: list[Row] = []
        if self.path is not None and self.path.exists():
            whole, newline, half = self.path.read_text(encoding="utf-8").rpartition("\n")
            if half:
                self.path.write_text(whole + newline, encoding="utf-8")
            self.rows = read_rows(self.path)

    def add(self, rows: Iterable[Row]) -> None:
        """Write them, each as a line."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
