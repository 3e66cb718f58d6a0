"""All rewards by kind and by name, those of installed plug-ins included."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, SerializeAsAny, WithJsonSchema

from cards_integrations.errors import SettingsError, short_repr, unknown_name
from cards_integrations.paths import is_directory
from cards_integrations.registry import Registry, from_json
from cards_integrations.rewards.base import Reward

GROUP = "cards_integrations.rewards"
NAMED: dict[str, Reward] = {}
"""The embedded rewards, by name."""
HELD_OUT: dict[str, str] = {}
"""By the name of a reward, the name of another model of the same quality, which judges what the first one guides."""
R = TypeVar("R", bound=Reward)

_registry = Registry(Reward, "reward", "kind", GROUP)
REWARDS: dict[str, type[Reward]] = _registry.classes
"""The classes of rewards by kind, those of plug-ins once they have been asked for."""


def register_reward(cls: type[R]) -> type[R]:
    """Decorate a subclass of `Reward` so that settings and names can refer to it by its `kind`.

    Raises:
        SettingsError: It has no `kind: Literal["my-reward"] = "my-reward"`, or that of another class.
    """
    _registry.register(cls)
    return cls


def known_rewards() -> list[str]:
    """Return all kinds, including those of installed plug-ins."""
    return _registry.known()


def reward_class(kind: str) -> type[Reward]:
    """Return the class of a kind, from this package or from an installed plug-in.

    Raises:
        SettingsError: There is none, or the plug-in does not load.
    """
    return _registry[kind]


def as_reward(value: Any) -> Reward:
    """Make a reward from whatever `reward=` takes.

    Args:
        value: A name, a kind whose settings all have defaults, a hub id, a directory, a callable, settings as a dict
            or as JSON, or a reward itself.

    Raises:
        SettingsError: It is none of these.
    """
    if isinstance(value, Reward):
        return value
    value = from_json("reward", value)
    if isinstance(value, (str, Path)):
        name = str(value)
        if name in NAMED:
            return NAMED[name]
        if "/" not in name and name in known_rewards():  # last, as looking up plug-ins takes a while
            return _by_kind(name)
        if "/" in name or is_directory(name):
            return REWARDS["classifier"].model_validate({"model": name})
        known = {*NAMED, *known_rewards()}
        raise unknown_name("reward", name, known, " Or pass a hub id, a directory, a function or a settings object.")
    if isinstance(value, dict):
        if "kind" not in value:
            given = ", ".join(map(short_repr, value))  # without the values, which may contain a key
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


def known_as(reward: Reward) -> str:
    """Return the name by which a user asks for a reward if it has one, else the name that describes it."""
    return next((name for name, each in NAMED.items() if each == reward), reward.name)


def held_out_for(reward: Reward) -> Reward | None:
    """Return the named reward that judges answers guided by this one, alone or guarded; None if there is none."""
    guides = {name: NAMED[name].scale_source for name in HELD_OUT}
    return next((NAMED[HELD_OUT[name]] for name, guide in guides.items() if guide == reward.scale_source), None)


def _by_kind(kind: str) -> Reward:
    """Return the reward of a kind with default settings."""
    cls = reward_class(kind)
    needed = [name for name, field in cls.model_fields.items() if field.is_required()]
    if needed:
        shown = ", ".join(f"{name}=..." for name in needed)
        raise SettingsError(f"reward={kind!r} needs settings: pass {cls.__name__}({shown}), or a dict with its kind.")
    return cls.model_validate({})


_SCHEMA = WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object", "required": ["kind"]}], "title": "Reward"})
AnyReward = Annotated[SerializeAsAny[Reward], BeforeValidator(as_reward), _SCHEMA]
"""A field that takes whatever `as_reward` does."""
