"""The typed errors of this package; their messages name the setting and say how to fix it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from reprlib import Repr
from types import MappingProxyType

__all__ = [
    "AnswerCut",
    "CardsError",
    "CardsTimeout",
    "EngineClosed",
    "ModelError",
    "OutOfMemory",
    "Problem",
    "PromptError",
    "RewardError",
    "SettingsError",
]

_UNION_MEMBER = re.compile(r"\[|^(constrained-)?(int|float|str|bool)$")  # as pydantic writes it into a path
_EXCERPT = Repr()
_EXCERPT.maxlevel, _EXCERPT.maxstring, _EXCERPT.maxother = 4, 200, 200


class CardsError(Exception):
    """Base of every error this package raises on purpose."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with one setting.

    Attributes:
        where: The path to the setting: names of settings, and indices in lists.
        what: What is wrong, and how to fix it.
        value: "=" and the value, where the message shows it; else "".
    """

    where: tuple[int | str, ...]
    what: str
    value: str = ""

    @property
    def path(self) -> str:
        """The path as messages show it: without the types of a union, which pydantic adds."""
        return ".".join(step for step in map(str, self.where) if not _UNION_MEMBER.search(step))

    def inside(self, outer: tuple[int | str, ...]) -> Problem:
        """Return the problem with its path behind that of the settings in which it is."""
        return replace(self, where=(*outer, *self.where))

    def __str__(self) -> str:
        path = self.path
        if not self.value and path in self.what.partition(". ")[0]:
            return self.what  # it names the setting itself
        return f"{path}{self.value}: {self.what}"


class SettingsError(CardsError, ValueError):
    """A setting or a per-call argument cannot be used as given."""

    problems: tuple[Problem, ...] = ()
    """All problems that were found, if a class of settings was validated."""


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
    """Return the error itself if it is one of this package, else a `ModelError` with it as the cause.

    Args:
        error: What was raised.
        what: What failed, at the beginning of the message.
    """
    if isinstance(error, CardsError):
        return error
    wrapped = ModelError(f"{what}: {said(error)}")
    wrapped.__cause__ = error
    return wrapped


def said(error: BaseException) -> str:
    """Return an error as messages quote it: its type and its own message."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # a bug in its own __str__
        return type(error).__name__


def short_repr(value: object) -> str:
    """Return the repr of a value, shortened to a few lines at most."""
    try:
        return _EXCERPT.repr(value)
    except Exception:  # deep nesting, a number of thousands of digits, or a bug in the object's own repr
        return f"<{type(value).__name__}>"


def unknown_name(
    what: str, name: str, known: Iterable[str], hint: str = "", elsewhere: Mapping[str, str] = MappingProxyType({})
) -> SettingsError:
    """Return the error for an unknown name, which quotes the most similar known names, and then all of them.

    Args:
        what: What the name is one of.
        name: What was given.
        known: The names that are known.
        hint: Further advice, at the end of the message.
        elsewhere: As for `nearest`.
    """
    known = sorted(known)
    name = name[:200]
    near = nearest(name, known, elsewhere)
    return SettingsError(f"The {what} {name!r} is not known.{near} Known: {', '.join(known)}.{hint}")


def nearest(name: str, known: Iterable[str], elsewhere: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return " Did you mean ...?" with the most similar names; "" if none is similar.

    Args:
        name: What was given.
        known: The names that are known.
        elsewhere: For each name that is known in another place only, how to write it there.
    """
    near = get_close_matches(name[:200], [*known, *elsewhere], n=3, cutoff=0.5)
    if near and near[0] in elsewhere:
        return f" Did you mean {elsewhere[near[0]]}?"
    near = [repr(each) for each in near if each not in elsewhere]
    return f" Did you mean {' or '.join(near)}?" if near else ""
