"""Checks before a request is read: its key, its size, and the load of the server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from secrets import compare_digest

from starlette.requests import Request as HttpRequest

from cards_integrations.server.errors import ApiError
from cards_integrations.server.settings import ServerSettings

READ_SECONDS = 60.0  # within which the body of a request has to arrive


class Guard:
    """Admits or refuses requests.

    Args:
        settings: The limits and the keys.

    Attributes:
        answers: The number of answers that are being written or wait for a row.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._keys = [_digest(key.get_secret_value()) for key in settings.api_keys]
        self._max_bytes = settings.max_body_bytes
        self._max_answers = settings.max_answers
        self.answers = 0

    def check_key(self, request: HttpRequest) -> None:
        """Raise an `ApiError` (HTTP 401) unless the request has one of the keys, compared in constant time."""
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        digest = _digest(given.strip() if scheme.lower() == "bearer" else "")
        if self._keys and not any(compare_digest(digest, key) for key in self._keys):
            raise ApiError(
                401,
                "The API key is missing or wrong: send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def check_load(self, more: int = 1) -> None:
        """Raise an `ApiError` (HTTP 429) if so many more answers cannot begin now."""
        if self.answers + more > self._max_answers:
            raise ApiError(
                429,
                f"The server writes {self.answers} answers, and at most {self._max_answers} at once: try again later.",
                "rate_limit_error",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )

    @contextmanager
    def answering(self, count: int) -> Iterator[None]:
        """Count answers while the block runs, or raise an `ApiError` (HTTP 429)."""
        self.check_load(count)
        self.answers += count
        try:
            yield
        finally:
            self.answers -= count

    async def body(self, request: HttpRequest) -> bytes:
        """Return the body of a request.

        Raises:
            ApiError: It is too large (HTTP 413), or does not arrive in time (HTTP 408).
        """
        declared = request.headers.get("Content-Length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            raise self._too_large()
        content = bytearray()
        try:
            async with asyncio.timeout(READ_SECONDS):
                async for piece in request.stream():
                    content += piece
                    if len(content) > self._max_bytes:
                        raise self._too_large()
        except TimeoutError:
            raise ApiError(408, f"The request did not come within {READ_SECONDS:.0f} seconds: send it again.") from None
        return bytes(content)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The request is larger than {self._max_bytes:,} bytes.", code="request_too_large")


def _digest(key: str) -> bytes:
    """Return a hash, so that all keys that are compared have the same length."""
    return sha256(key.encode(errors="surrogateescape")).digest()
