"""Leaves the constructor of settings classes, which takes whatever their fields are, out of the reference."""

from __future__ import annotations

from typing import Any

from griffe import Class, Extension


class PlainSignatures(Extension):
    def on_class(self, *, cls: Class, **_: Any) -> None:
        if cls.path == "cards_integrations.settings_model.SettingsModel":
            del cls.members["__init__"]
