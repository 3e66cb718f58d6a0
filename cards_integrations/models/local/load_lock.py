"""One load at a time, and errors that name the model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

from cards_integrations.errors import CardsError, ModelError
from cards_integrations.models.local.quiet import quiet_transformers

MOST = 600  # characters of an error of a load that are shown
_lock = RLock()


@contextmanager
def load_lock() -> Iterator[None]:
    """Let one thread load at a time, without what transformers says and shows meanwhile.

    transformers replaces methods of its classes during a load; two loads at once would leave them replaced.
    """
    with _lock, quiet_transformers():
        yield


@contextmanager
def load_errors(name: str, setting: str = "model") -> Iterator[None]:
    """Hold the load lock, and raise a `ModelError` that names the model, or another setting, for whatever is raised."""
    with load_lock():
        try:
            yield
        except CardsError:
            raise
        except Exception as error:
            raise ModelError(f"{setting}={name!r} cannot be loaded: {_in_one_line(error)}") from error


def _in_one_line(error: Exception) -> str:
    """Return the error of torch or transformers, which may be long, in one line."""
    told = " ".join(str(error).split()) or type(error).__name__
    if "ignore_mismatched_sizes" in told:  # the rest is in a report that only a log shows
        return "its weights have other shapes than its config.json says."
    return told if len(told) <= MOST else f"{told[:MOST]} ..."


def _renew() -> None:
    """Replace the lock in a forked child, which has no thread that would release it."""
    global _lock
    _lock = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
