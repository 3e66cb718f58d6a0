"""The typed errors a caller can meet; every message names the setting and says the mend."""

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
    """The device's memory, or the share `kv_memory` of it, does not hold this request."""


class RewardError(CardsError):
    """A reward model failed, or returned something that is not one finite score per text."""


class AnswerCut(CardsError, ValueError):
    """`max_tokens` cut an answer that had to be whole: JSON of a schema, for one."""


class EngineClosed(CardsError, RuntimeError):
    """The engine was closed while, or before, the request ran."""


class CardsTimeout(CardsError, TimeoutError):
    """The answer was not ready within `timeout` seconds."""


def short_repr(value: object) -> str:
    """A value as an error quotes it: never longer than a few lines, whatever it is."""
    try:
        return _EXCERPT.repr(value)
    except Exception:  # nested too deeply, a number of thousands of digits, or an object's own fault
        return f"<{type(value).__name__}>"


def unknown_name(what: str, name: str, known: Iterable[str], hint: str = "") -> SettingsError:
    """The error for a name nobody registered: near matches first, then all known names."""
    known = sorted(known)
    name = name[:200]
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    guess = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return SettingsError(f"The {what} {name!r} is not known.{guess} Known: {', '.join(known)}.{hint}")
