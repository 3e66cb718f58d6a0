"""Results as lines of JSON, to which an interrupted run adds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from cards_integrations.errors import SettingsError, short_repr

Row = dict[str, Any]


@with_config(ConfigDict(extra="allow"))
class Turn(TypedDict):
    role: str
    content: str


FORMS: dict[str, TypeAdapter[Any]] = {
    **{name: TypeAdapter(int) for name in ("line", "prompt", "seed")},
    **{name: TypeAdapter(str) for name in ("arm", "text", "question", "ours", "theirs", "verdict")},
    "asked": TypeAdapter(str | list[Turn]),
}


def read_rows(path: str | Path, needed: Set[str] = frozenset()) -> list[Row]:
    """Every line of a file, each an object with what is `needed`."""
    path, rows = Path(path), []
    try:
        with path.open(encoding="utf-8") as file:
            lines = list(file)  # str.splitlines would end lines within an answer, at U+2028 for one
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"The results {str(path)!r} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            raise SettingsError(f"{str(path)!r}, line {number}, is not JSON.") from None
        if not isinstance(rows[-1], dict) or not needed <= rows[-1].keys():
            told = f"an object with {', '.join(sorted(needed))}" if needed else "an object"
            raise SettingsError(f"{str(path)!r}, line {number}, is not {told}.")
        for name in sorted(needed):
            try:
                FORMS[name].validate_python(rows[-1][name], strict=True)
            except ValidationError:
                value = short_repr(rows[-1][name])
                raise SettingsError(f"{str(path)!r}, line {number}: {value} is not of the form of {name!r}.") from None
    return rows


class Results:
    """A file that grows; what stands there when it is opened is in `rows`. Without a path nothing is written.

    Half a line at its end, of a run that was killed, is cut off.
    """

    def __init__(self, path: str | Path | None, needed: Set[str] = frozenset()) -> None:
        self.path = Path(path) if path else None
        self.rows: list[Row] = []
        if self.path is not None and self.path.exists():
            whole, newline, half = self.path.read_bytes().rpartition(b"\n")
            if half:
                self.path.write_bytes(whole + newline)
            self.rows = read_rows(self.path, needed)

    def add(self, rows: Iterable[Row]) -> None:
        """Write them, each as a line."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
