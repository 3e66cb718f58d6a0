"""Settings of the server itself, in contrast to those of its answers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, SecretStr

from cards_integrations.decoding import METHODS
from cards_integrations.errors import SettingsError
from cards_integrations.http_client import usable_key
from cards_integrations.rewards import NAMED, AnyReward
from cards_integrations.settings_model import SettingsModel

KEY_VARIABLE = "CARDS_SERVER_API_KEY"
InlineKind = Literal["length", "weighted", "min", "gate"]


class ServerSettings(SettingsModel):
    """Where the server listens, who may ask, and what a single request may ask for."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)

    quotes_values: ClassVar[bool] = False

    host: str = "127.0.0.1"
    """The address to listen on; "0.0.0.0" for all of this machine's."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """The port to listen on; 0 for any that is free."""

    api_keys: tuple[SecretStr, ...] = ()
    """The keys, one of which a client has to send as a Bearer token; empty for no check. `cards serve` reads them from
    the environment variable CARDS_SERVER_API_KEY, or from a file with a key on each line."""

    served_name: str | None = None
    """The name by which clients call the model; None for its own name."""

    rewards: dict[str, AnyReward] = dict(NAMED)  # noqa: RUF012 - pydantic copies it
    """The rewards that a request may name."""

    inline_rewards: tuple[InlineKind, ...] = ("length", "weighted", "min", "gate")
    """The kinds of rewards that a request may bring settings for. Others would load models, call servers, or run
    regular expressions that a client has written."""

    methods: tuple[str, ...] = tuple(sorted(METHODS))
    """The decoding methods that a request may choose."""

    max_candidates: Annotated[int, Field(ge=1)] = 128
    """The largest number that a request may set in a decoding method, such as `n` or `max_rejections`."""

    max_choices: Annotated[int, Field(ge=1)] = 16
    """Most answers of one request: `n`, times the number of prompts."""

    max_answers: Annotated[int, Field(ge=1)] = 256
    """Most answers that are being written or wait for a row at once; further requests get HTTP 429."""

    max_body_bytes: Annotated[int, Field(ge=1)] = 4 * 2**20
    """Most bytes of a request; larger ones get HTTP 413."""

    timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that an answer may take, waiting included; then the request gets HTTP 504. A request may set less."""

    grace: Annotated[int, Field(ge=0)] = 30
    """Seconds that answers may still take after the server was told to stop."""


def read_keys(file: Path | None) -> tuple[SecretStr, ...]:
    """Return the API keys of a file, or that of the environment.

    Args:
        file: A file with a key on each line; None for the environment variable CARDS_SERVER_API_KEY.

    Raises:
        SettingsError: The file cannot be read or holds no key, or a key is not printable ASCII.
    """
    if file is None:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        return (SecretStr(usable_key(key, KEY_VARIABLE, KEY_VARIABLE)),) if key else ()
    try:
        lines = file.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise SettingsError(f"--api-key-file {str(file)!r} cannot be read: {type(error).__name__}.") from None
    if not lines:
        raise SettingsError(f"--api-key-file {str(file)!r} holds no key: write one on each line.")
    return tuple(SecretStr(usable_key(line, "--api-key-file", KEY_VARIABLE)) for line in lines)
