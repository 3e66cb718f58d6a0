"""What settings of a served model have in common: addresses, and a key that is shown nowhere."""

from __future__ import annotations

import os
from typing import Annotated, Any, ClassVar

import httpx
from pydantic import AfterValidator, ConfigDict, SecretStr, field_validator

from cards_integrations.errors import SettingsError
from cards_integrations.settings_model import SettingsModel

HIDDEN = "**********"  # what pydantic writes in place of a secret


def usable_key(key: str, name: str, variable: str) -> str:
    """Return a key that can be sent in a header; httpx would quote any other in its error.

    Args:
        key: The key.
        name: What errors call it.
        variable: The environment variable that could hold it instead.

    Raises:
        SettingsError: The key is the placeholder for a secret, or not printable ASCII without spaces.
    """
    if key == HIDDEN:
        raise SettingsError(
            f"{name}='{HIDDEN}' stands for a key that was left out when the settings were written: "
            f"give the key again, or leave api_key out and set the environment variable {variable}."
        )
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise SettingsError(f"{name} must be printable ASCII without spaces.")
    return key


def _server_url(value: str) -> str:
    try:
        url = httpx.URL(value)
    except httpx.InvalidURL as error:
        raise ValueError(f"this is no URL: {error}") from None
    if url.userinfo:
        raise ValueError("url must not carry a password, which errors would show: use api_key")
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"url={value!r} must be like http://localhost:8000")
    return value


class Keyed(SettingsModel):
    """Settings with an API key. It is not pickled: where they are unpickled, it comes from the environment."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    quotes_values: ClassVar[bool] = False
    key_setting: ClassVar[str]
    """What errors call the key."""
    key_variable: ClassVar[str]
    """The environment variable that has the key."""

    api_key: SecretStr | None = None
    """Sent as a Bearer token; None for the environment variable, if that is set. Not written with the settings."""

    @field_validator("api_key")
    @classmethod
    def _is_usable(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            usable_key(value.get_secret_value(), cls.key_setting, cls.key_variable)
        return value

    @property
    def key(self) -> str | None:
        """The secret, from the settings or the environment."""
        if self.api_key is not None:
            return self.api_key.get_secret_value()
        key = os.environ.get(self.key_variable, "").strip()
        return usable_key(key, self.key_variable, self.key_variable) if key else None

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        return {**state, "__dict__": {**state["__dict__"], "api_key": None}}


ServerUrl = Annotated[str, AfterValidator(_server_url)]
