"""A Python callable as a reward."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, ImportString, PlainSerializer, TypeAdapter, ValidationError, field_validator

from cards_integrations.errors import SettingsError
from cards_integrations.rewards.base import CallableModel, Loader, ObjectReward, RewardModel, refusal
from cards_integrations.rewards.registry import register_reward

if TYPE_CHECKING:
    from collections.abc import Iterator

_allowed: ContextVar[bool] = ContextVar("imports_allowed", default=False)


@contextmanager
def imports_allowed(allowed: bool = True) -> Iterator[None]:
    """Allow settings that are read inside the block to name code to import; CARDS_ALLOW_IMPORTS=1 always does."""
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


def _permitted(value: Any) -> Any:
    if isinstance(value, str) and not (_allowed.get() or os.environ.get("CARDS_ALLOW_IMPORTS") == "1"):
        raise SettingsError(
            f"reward.function={value!r} would import code that settings name. If you trust it, pass --allow-imports on "
            "the command line, allow_imports=True to from_settings or from_yaml, or set CARDS_ALLOW_IMPORTS=1."
        )
    return value


def _import_string(function: Any) -> str:
    """Return the name of a function in a settings file; a lambda, or a function inside another one, has none."""
    name = f"{function.__module__}.{function.__qualname__}"
    with suppress(ValidationError):
        if TypeAdapter(ImportString).validate_python(name) is function:
            return name
    raise ValueError(f"{function!r} cannot be imported by name")


def _name(function: Any) -> str:
    return f"function {getattr(function, '__name__', repr(function))}"


@register_reward
class FunctionReward(ObjectReward):
    """A Python function of the prompt and several answers.

    `function(prompt, responses) -> list[float]` gets the user's text (or the whole conversation with roles, if it has
    several messages) and answers that may be unfinished. The reward of the prompt alone is `function(prompt, [""])`.
    """

    kind: Literal["function"] = "function"
    """Names this class in settings files."""
    function: Annotated[
        ImportString[Callable[[str, list[str]], Any]],
        BeforeValidator(_permitted),
        PlainSerializer(_import_string, when_used="json"),
    ]
    """Sync (run in a thread) or async (run in the engine's loop, which it must not block). A settings file names it
    "module.name"; it is only imported if whoever reads the file allows that."""

    @property
    def name(self) -> str:
        return _name(self.function)

    @field_validator("function")
    @classmethod
    def _takes_prompt_and_answers(cls, function: Any) -> Any:
        if why := refusal(_name(function), function):
            raise SettingsError(why)
        return function

    @property
    def held(self) -> tuple[Any, ...]:
        return (self.function,)

    def build(self, loader: Loader) -> RewardModel:
        return CallableModel(self.name, self.function)
