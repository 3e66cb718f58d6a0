"""Errors as OpenAI's API writes them."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from cards_integrations.errors import CardsError, CardsTimeout, EngineClosed, OutOfMemory, PromptError, SettingsError

log = logging.getLogger("cards_integrations.server")
INVALID = "invalid_request_error"
STATUS: list[tuple[type[CardsError], int, str]] = [
    (SettingsError, 400, INVALID),
    (PromptError, 400, INVALID),
    (CardsTimeout, 504, "timeout_error"),
    (OutOfMemory, 503, "server_error"),
    (EngineClosed, 503, "server_error"),
    (CardsError, 500, "server_error"),
]


class ApiError(Exception):
    """An error that is sent to the client in place of an answer.

    Args:
        status: The HTTP status.
        message: What is wrong, and how to fix it.
        kind: The `type` of the error in OpenAI's form.
        param: The field of the request that is wrong.
        code: The name of the error, for programs.
        headers: Headers of the reply.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The body of the reply."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None) -> ApiError:
    """Return the error (HTTP 400) for a request that cannot be answered as it is."""
    return ApiError(400, message, param=param)


def as_api_error(error: Exception) -> ApiError:
    """Return the error to send to a client; that of an unexpected exception has no details, which are logged."""
    if isinstance(error, ApiError):
        return error
    for kind, status, name in STATUS:
        if isinstance(error, kind):
            if status == 500:
                log.warning("a request failed: %s: %s", type(error).__name__, error)
            headers = {"Retry-After": "1"} if status == 503 else None
            return ApiError(status, str(error), name, param=_param(error), code=_code(error), headers=headers)
    log.error("a request failed", exc_info=error)
    return ApiError(500, "The server failed; its log says why.", "server_error", code="internal_error")


def _param(error: Exception) -> str | None:
    """Return the field with which the message of a settings error begins; None if there is none."""
    found = re.match(r"([a-z_]+(?:\.\w+)*)[=:] ?\S", str(error)) if isinstance(error, SettingsError) else None
    return found[1] if found else None


def _code(error: Exception) -> str | None:
    """Return the code that clients of OpenAI's API look for; None if they look for none."""
    return "context_length_exceeded" if "model's context is" in str(error) else None
