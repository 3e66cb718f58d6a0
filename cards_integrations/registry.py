"""Settings classes by name: those of this package, those that a program registers, those of installed plug-ins."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from cards_integrations.errors import SettingsError, short_repr, unknown_name

B = TypeVar("B", bound=BaseModel)


@dataclass(frozen=True, eq=False)
class Registry(Generic[B]):
    """The classes that one setting can have.

    A class is known by the default of its discriminator, `kind: Literal["length"] = "length"` for one. A plug-in is
    an entry point of that name in another distribution; its code is imported when its name is asked for, not before.

    Attributes:
        base: What every class inherits from.
        setting: The setting's name, for errors: "reward".
        discriminator: The field that names a class: "kind".
        group: The entry points of plug-ins: "cards_integrations.rewards".
        classes: The classes that are loaded by now, by name.
    """

    base: type[B]
    setting: str
    discriminator: str
    group: str
    classes: dict[str, type[B]] = field(default_factory=dict)

    def register(self, cls: type[B]) -> None:
        """Make a class known by its name.

        Raises:
            SettingsError: If it has no name, or that of another class. The same class may be defined again, as
                it is when a cell of a notebook runs twice.
        """
        name = self._name_of(cls)
        before = self.classes.get(name)
        if before is not None and _path(before) != _path(cls):
            raise SettingsError(f"The {self.setting} {self.discriminator} {name!r} is taken by {_path(before)}.")
        self.classes[name] = cls

    def known(self) -> list[str]:
        """All names, those of installed plug-ins included."""
        return sorted({*self.classes, *self._plugins()})

    def __getitem__(self, name: str) -> type[B]:
        """The class of a name, from this process or from an installed plug-in.

        Raises:
            SettingsError: If nobody has registered the name, or its plug-in cannot be used.
        """
        if name not in self.classes:
            plugin = self._plugins().get(name)
            if plugin is None:
                raise unknown_name(f"{self.setting}.{self.discriminator}", name, self.known())
            self.classes[name] = self._load(plugin)
        return self.classes[name]

    def _name_of(self, cls: type[B]) -> str:
        name = cls.model_fields[self.discriminator].default
        if not isinstance(name, str):
            written = f'{self.discriminator}: Literal["my-{self.setting}"] = "my-{self.setting}"'
            raise SettingsError(f"{cls.__name__} has no {self.discriminator}: write {written} in it.")
        return name

    def _plugins(self) -> Mapping[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

    def _load(self, plugin: EntryPoint) -> type[B]:
        who = f"The {self.setting} plug-in {plugin.name!r} ({plugin.value})"
        try:
            found = plugin.load()
        except Exception as error:
            raise SettingsError(f"{who} does not load: {error}") from error
        if not (isinstance(found, type) and issubclass(found, self.base)):
            raise SettingsError(f"{who} is not a subclass of {self.base.__name__}.")
        return found


def from_json(setting: str, value: Any) -> Any:
    """Settings that are written as a JSON object, parsed; anything else as it is.

    Raises:
        SettingsError: If a text that begins like an object is not JSON.
    """
    if not (isinstance(value, str) and value.startswith("{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{setting} is not JSON: {error}") from None


def assignments(setting: str, parts: Iterable[str]) -> dict[str, Any]:
    """The settings of texts such as `beta=0.1`, whose values are YAML.

    Args:
        setting: What they were given for, for errors.
        parts: The texts.

    Raises:
        SettingsError: If one is no assignment, or its value is not YAML.
    """
    import yaml

    fields: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise SettingsError(f"{setting}: {part!r} is not setting=value.")
        try:
            fields[key.strip()] = yaml.safe_load(value)
        except Exception:  # PyYAML raises errors of many types for a bad scalar
            raise SettingsError(f"{setting}: {short_repr(value)} is not a value.") from None
    return fields


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
