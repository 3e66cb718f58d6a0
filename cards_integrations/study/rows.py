"""Results of a study as lines of JSON, which an interrupted run continues."""

from __future__ import annotations

import json
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from cards_integrations.errors import SettingsError, short_repr

Row = dict[str, Any]
"""A result.

The row of an answer has `arm` (the name of its method), `prompt` (the prompt's index), `asked` (the prompt itself),
`context`, `seed`, `text`, `reward`, `judged` (the judge's reward), `repeated_3grams` (in percent), `log_p_per_token`,
`out_of_reach` (as in `Alignment`), what it cost, and the settings on which it depends. The row of a judged pair has
`question`, `seed`, `ours`, `theirs`, `verdict`, and `asked_twice`, the judge's replies to both orders.
"""


@with_config(ConfigDict(extra="allow"))
class StoredMessage(TypedDict):
    """A message of a prompt in a row."""

    role: str
    content: str


FIELD_TYPES: dict[str, TypeAdapter[Any]] = {
    **{name: TypeAdapter(int) for name in ("line", "prompt", "seed")},
    **{name: TypeAdapter(str) for name in ("arm", "text", "question", "ours", "theirs", "verdict")},
    "asked": TypeAdapter(str | list[StoredMessage]),
}


def read_rows(path: str | Path, required: Set[str] = frozenset()) -> list[Row]:
    """Read a file of rows, each a line of JSON.

    Args:
        path: The file.
        required: The fields that every row must have.

    Raises:
        SettingsError: The file cannot be read, or a line is not such a row.
    """
    path, rows = Path(path), []
    try:
        with path.open(encoding="utf-8") as file:
            lines = list(file)  # str.splitlines would end lines within an answer, at U+2028 for one
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"The results {str(path)!r} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise SettingsError(f"{str(path)!r}, line {number}, is not JSON: repair or remove it.") from None
        _check(row, required, f"{str(path)!r}, line {number}")
        rows.append(row)
    return rows


def _check(row: Any, required: Set[str], place: str) -> None:
    if not isinstance(row, dict) or not required <= row.keys():
        expected = f"an object with {', '.join(sorted(required))}" if required else "an object"
        raise SettingsError(f"{place}, is not {expected}.")
    for name in sorted(required):
        try:
            FIELD_TYPES[name].validate_python(row[name], strict=True)
        except ValidationError:
            raise SettingsError(f"{place}: {short_repr(row[name])} is not a valid {name!r}.") from None


class Results:
    """A file of rows that grows, so that an interrupted run can continue.

    Attributes:
        path: The file; None writes nothing.
        rows: The rows that were in the file when it was opened.
    """

    def __init__(self, path: str | Path | None, required: Set[str] = frozenset()) -> None:
        """Read the rows of the file, and cut off an incomplete line at its end, left by a run that was killed.

        Args:
            path: The file, which need not exist yet; None to write nothing.
            required: The fields that every row must have.

        Raises:
            SettingsError: The file contains something else.
        """
        self.path = Path(path) if path else None
        self.rows: list[Row] = []
        if self.path is not None and self.path.exists():
            whole, newline, half = self.path.read_bytes().rpartition(b"\n")
            if half:
                self.path.write_bytes(whole + newline)
            self.rows = read_rows(self.path, required)

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows to the file, each as a line."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
