"""One rate limiter for both frameworks, which ask it by different names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from langchain_core.rate_limiters import BaseRateLimiter

from cards_integrations.errors import SettingsError, short_repr


@dataclass(frozen=True)
class SharedRateLimiter(BaseRateLimiter):
    """A rate limiter of LangChain or of LlamaIndex, as either asks it."""

    given: Any

    def acquire(self, num_tokens: int = 0, *, blocking: bool = True) -> bool:
        """Wait until a request may begin."""
        if isinstance(self.given, BaseRateLimiter):
            return self.given.acquire(blocking=blocking)
        self.given.acquire(num_tokens)
        return True

    async def aacquire(self, *, blocking: bool = True) -> bool:
        """Async version of `acquire`, as LangChain calls it."""
        if isinstance(self.given, BaseRateLimiter):
            return await self.given.aacquire(blocking=blocking)
        await self.given.async_acquire()
        return True

    async def async_acquire(self, num_tokens: int = 0) -> None:
        """Async version of `acquire`, as LlamaIndex calls it."""
        await self.aacquire()


def as_rate_limiter(value: Any) -> SharedRateLimiter | None:
    """Return the limiter for both frameworks; None for none."""
    if value is None or isinstance(value, SharedRateLimiter):
        return value
    if not isinstance(value, BaseRateLimiter) and not hasattr(value, "async_acquire"):
        raise SettingsError(f"rate_limiter={short_repr(value)}: pass a rate limiter of LangChain or of LlamaIndex.")
    return SharedRateLimiter(value)
