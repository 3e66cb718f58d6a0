"""Directories and files on this machine: the cache directory, and files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
import threading
from contextlib import suppress
from itertools import islice
from pathlib import Path

import platformdirs

MOST_BESIDE = 1000  # names that are looked at


def cache_dir() -> Path:
    """Return the directory for converted models, step times and scales.

    Returns:
        `CARDS_CACHE_DIR` if that is set, else the platform's cache directory of the user.
    """
    if chosen := os.environ.get("CARDS_CACHE_DIR"):
        return Path(chosen)
    try:
        return platformdirs.user_cache_path("cards-integrations")
    except RuntimeError:  # a user without a home directory
        return Path(tempfile.gettempdir()) / f"cards-integrations-{os.getuid()}"


def is_directory(name: str) -> bool:
    """Return True if `name` is an existing directory; False also for a name that no file system accepts."""
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False


def names_beside(path: Path) -> list[str]:
    """Return the folders beside a path that does not exist, and the files that end as it does; not all of very many."""
    with suppress(OSError, ValueError):
        entries = list(islice(path.absolute().parent.iterdir(), MOST_BESIDE))
        return [entry.name for entry in entries if entry.is_dir() or entry.suffix == path.suffix != ""]
    return []


def write_atomically(file: Path, text: str) -> None:
    """Write a file, and its directory if need be, so that readers see the old text or the new one, never a part.

    Raises:
        OSError: The directory cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    fresh.write_text(text)
    fresh.replace(file)
