"""Reads prompts from files."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from cards_integrations.errors import SettingsError, said

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def read_prompts(file: str | Path) -> tuple[list[Any], list[Any]]:
    """Read prompts from lines of text or of JSON.

    A JSON line has a `prompt` (a string or messages) or `messages`, and optionally a `context`; or it is a
    dialogue as in HH-RLHF, of which everything before the last answer is the prompt.

    Args:
        file: The file; `.jsonl` in its name makes it JSON lines, and `.gz` at the end compressed.

    Returns:
        The prompts, and the context of each or None.

    Raises:
        SettingsError: The file cannot be read.
    """
    path = Path(file)
    try:
        compressed = path.suffix == ".gz"
        with gzip.open(path, "rt", encoding="utf-8") if compressed else path.open(encoding="utf-8") as text:
            lines = [line.rstrip("\n") for line in text if line.strip()]
        if ".jsonl" not in path.suffixes:
            return lines, [None] * len(lines)
        rows = [json.loads(line) for line in lines]
        return [_prompt(row) for row in rows], [row.get("context") for row in rows]
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise SettingsError(f"The prompts {str(file)!r} cannot be read: {said(error)}") from error


def _prompt(row: dict[str, Any]) -> Any:
    for name in ("prompt", "messages"):
        if name in row:
            return row[name]
    return dialogue(row["chosen"])


def dialogue(text: str) -> list[dict[str, str]]:
    """Return the messages of an HH-RLHF dialogue before its last answer.

    Raises:
        ValueError: There are none.
    """
    messages = []
    for turn in text.split(HUMAN)[1:]:
        question, *answers = turn.split(ASSISTANT)
        messages.append({"role": "user", "content": question.strip()})
        messages += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise ValueError(f"not a dialogue: {text[:60]!r}")
    return [message for message in messages if message["content"]]
