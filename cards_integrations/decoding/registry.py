"""The decoding methods by name, those of plug-ins included."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, SerializeAsAny

from cards_integrations.decoding.base import Decoding
from cards_integrations.errors import SettingsError, short_repr
from cards_integrations.registry import Registry, assignments, from_json

GROUP = "cards_integrations.decoding"
D = TypeVar("D", bound=Decoding)

_registry = Registry(Decoding, "decoding", "method", GROUP)
METHODS: dict[str, type[Decoding]] = _registry.classes
"""The methods of this package, and those of plug-ins that have been asked for, by name."""


def register_method(cls: type[D]) -> type[D]:
    """Decorate a subclass of `Decoding` so that settings and names can refer to it by its `method`.

    Raises:
        SettingsError: If it has no `method: Literal["my-method"] = "my-method"`, or that of another class.
    """
    _registry.register(cls)
    return cls


def known_methods() -> list[str]:
    """Return the names of all methods, those of installed plug-ins included."""
    return _registry.known()


def as_decoding(value: Any) -> Decoding:
    """Make a decoding method from its name, its settings as a dict or as JSON, or itself.

    Args:
        value: `"cascade"`, `"best_of_n:n=8"`, `"cards:target_reward=1.2,beta=0.1"`, a dict, JSON or a method.

    Raises:
        SettingsError: If there is no such method, or the value is of no such form.
    """
    if isinstance(value, Decoding):
        return value
    value = from_json("decoding", value)
    if isinstance(value, type):
        raise SettingsError(f"decoding={value.__name__} is a class: pass an object of it, {value.__name__}().")
    if isinstance(value, str):
        name, _, settings = value.partition(":")
        own = f"decoding={short_repr(value)}"
        value = {"method": name, **assignments(own, filter(None, settings.split(",")))}
    if not isinstance(value, dict):
        raise SettingsError(f"decoding={short_repr(value)}: pass a name, a dict with 'method', or a settings object.")
    method = value.get("method", "cards")
    return _registry[method if isinstance(method, str) else short_repr(method)].model_validate(value)


AnyDecoding = Annotated[SerializeAsAny[Decoding], BeforeValidator(as_decoding)]
"""A field that takes whatever `as_decoding` does."""
