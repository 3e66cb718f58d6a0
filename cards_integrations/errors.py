"""The typed errors of this package; every message names the setting and how to fix it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from reprlib import Repr

_EXCERPT = Repr()
_EXCERPT.maxlevel, _EXCERPT.maxstring, _EXCERPT.maxother = 4, 200, 200


class CardsError(Exception):
    """Base of every error this package raises on purpose."""


class SettingsError(CardsError, ValueError):
    """A setting or a per-call argument cannot be used as given."""


class PromptError(CardsError, ValueError):
    """The prompt or the messages cannot be turned into model input."""


class ModelError(CardsError):
    """A model or a tokenizer cannot be found, loaded or used."""


class OutOfMemory(ModelError):
    """The request does not fit into the device's memory, or into the share of it that `kv_memory` grants."""


class RewardError(CardsError):
    """A reward model failed, or returned something that is not one finite score per text."""


class AnswerCut(CardsError, ValueError):
    """`max_tokens` cut an answer that has to be complete, such as the JSON of a schema."""


class EngineClosed(CardsError, RuntimeError):
    """The engine was closed before the request ended."""


class CardsTimeout(CardsError, TimeoutError):
    """The answer was not ready within `timeout` seconds."""


def as_cards_error(error: BaseException, what: str) -> CardsError:
    """The error itself if it is one of this package, else a `ModelError` that it is the cause of.

    Args:
        error: What was raised.
        what: What failed, at the beginning of the message.
    """
    if isinstance(error, CardsError):
        return error
    wrapped = ModelError(f"{what}: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def short_repr(value: object) -> str:
    """A value as errors quote it, in a few lines at most."""
    try:
        return _EXCERPT.repr(value)
    except Exception:  # deep nesting, a number of thousands of digits, or a bug in the object's own repr
        return f"<{type(value).__name__}>"


def unknown_name(what: str, name: str, known: Iterable[str], hint: str = "") -> SettingsError:
    """The error for an unknown name, with the nearest known names and then all of them."""
    known = sorted(known)
    name = name[:200]
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    suggestion = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return SettingsError(f"The {what} {name!r} is not known.{suggestion} Known: {', '.join(known)}.{hint}")
