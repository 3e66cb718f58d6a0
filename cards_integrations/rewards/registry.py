"""All rewards: by kind, by name, and those that installed plug-ins bring."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, SerializeAsAny, WithJsonSchema

from cards_integrations.errors import SettingsError, short_repr, unknown_name
from cards_integrations.paths import is_directory
from cards_integrations.rewards.base import Reward

GROUP = "cards_integrations.rewards"
REWARDS: dict[str, type[Reward]] = {}
NAMED: dict[str, Reward] = {}
R = TypeVar("R", bound=Reward)


def register_reward(cls: type[R]) -> type[R]:
    """Make a subclass of `Reward` known by its `kind`, for settings files and names. A decorator."""
    kind = cls.model_fields["kind"].default
    if not isinstance(kind, str):
        raise SettingsError(f'{cls.__name__} has no kind: write kind: Literal["my-reward"] = "my-reward" in it.')
    before = REWARDS.get(kind)
    here, there = ((c.__module__, c.__qualname__) if c else None for c in (cls, before))
    if before is not None and here != there:  # a notebook's cell may run again
        raise SettingsError(f"The reward kind {kind!r} is taken by {before.__module__}.{before.__qualname__}.")
    REWARDS[kind] = cls
    return cls


def known_rewards() -> list[str]:
    """Return all kinds, including those of installed plug-ins."""
    return sorted({*REWARDS, *(point.name for point in entry_points(group=GROUP))})


def reward_class(kind: str) -> type[Reward]:
    """Return the class of a kind, from this package or from an installed plug-in.

    Raises:
        SettingsError: There is none, or the plug-in does not load.
    """
    if kind in REWARDS:
        return REWARDS[kind]
    plugins = {point.name: point for point in entry_points(group=GROUP)}
    if kind in plugins:
        try:
            found = plugins[kind].load()
        except Exception as error:
            raise SettingsError(
                f"The reward plug-in {kind!r} ({plugins[kind].value}) does not load: {error}"
            ) from error
        if not (isinstance(found, type) and issubclass(found, Reward)):
            raise SettingsError(f"The reward plug-in {kind!r} ({plugins[kind].value}) is not a subclass of Reward.")
        REWARDS[kind] = found
    if kind not in REWARDS:
        raise unknown_name("reward.kind", kind, known_rewards())
    return REWARDS[kind]


def as_reward(value: Any) -> Reward:
    """Make a reward from whatever `reward=` takes.

    Args:
        value: A name, a hub id, a directory, a callable, settings as a dict or as JSON, or a reward itself.

    Raises:
        SettingsError: It is none of these.
    """
    if isinstance(value, Reward):
        return value
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise SettingsError(f"reward is not JSON: {error}") from None
    if isinstance(value, (str, Path)):
        name = str(value)
        if name in NAMED:
            return NAMED[name]
        if "/" in name or is_directory(name):
            return REWARDS["classifier"].model_validate({"model": name})
        raise unknown_name("reward", name, NAMED, " Or pass a hub id, a directory, a function or a settings object.")
    if isinstance(value, dict):
        if "kind" not in value:
            given = ", ".join(map(short_repr, value))  # the values may hold a key
            raise SettingsError(f"reward with {given[:200]} names no kind: one of {', '.join(sorted(REWARDS))}.")
        try:
            kind = value["kind"]
            return reward_class(kind if isinstance(kind, str) else short_repr(kind)).model_validate(value)
        except RecursionError:
            raise SettingsError("reward contains itself, or is nested too deeply.") from None
    if isinstance(value, type):
        raise SettingsError(f"reward={value.__name__} is a class: pass an object of it, {value.__name__}(...).")
    if callable(value):
        return REWARDS["function"].model_validate({"function": value})
    raise SettingsError(
        f"reward={short_repr(value)}: pass a name, a hub id, a directory, a function or a settings object."
    )


_SCHEMA = WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object", "required": ["kind"]}], "title": "Reward"})
AnyReward = Annotated[SerializeAsAny[Reward], BeforeValidator(as_reward), _SCHEMA]
