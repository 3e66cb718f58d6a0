"""A service with one or more replicas, and retries where they are safe."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any
from zlib import crc32

import httpx
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from cards_integrations.errors import CardsError, said
from cards_integrations.http_client.connections import exchange
from cards_integrations.http_client.replies import REPLY_BYTES, Reply, ReplyError, excerpt, shortened
from cards_integrations.http_client.settings import HIDDEN

BACK_OFF = wait_exponential(multiplier=0.25, max=8) + wait_random(0, 0.25)  # seconds between two tries
HEALTH_TIMEOUT = 2.0  # seconds


class TransientError(Exception):
    """A failure after which another try, or another replica, may succeed."""


class Replica:
    """One of several servers of the same service; after a failure it gets no requests for a while."""

    def __init__(self, url: str) -> None:
        self.url = httpx.URL(url)
        self.failures = 0  # in a row
        self.retry_at = 0.0  # monotonic seconds

    def url_for(self, path: str) -> httpx.URL:
        """Return the URL of a path of the service, which may itself be below some path."""
        return self.url.copy_with(path=self.url.path.rstrip("/") + path) if path else self.url

    @property
    def available(self) -> bool:
        """True unless it failed a short while ago."""
        return time.monotonic() >= self.retry_at

    def mark_failed(self) -> None:
        """Give it no requests for 0.5 seconds, twice as long after each further failure, 30 seconds at most."""
        self.failures += 1
        self.retry_at = time.monotonic() + min(30.0, 0.25 * 2 ** min(self.failures, 7))

    def mark_healthy(self) -> None:
        """Forget its failures."""
        self.failures, self.retry_at = 0, 0.0


class ServiceClient:
    """A client of a service with one or more replicas.

    Failures that may pass (no connection, no answer in time, 429, 5xx) are tried again, at another replica
    if there is one, else after a while. So it is only for requests that may safely be sent twice.

    Args:
        service: What errors call the service; they begin with it.
        urls: Those of the replicas.
        key: Sent as a Bearer token, and masked in errors.
        timeout: Seconds for one try, from its first byte to the last of the reply.
        retries: Further tries after a failure that may pass.
        concurrency: Requests in flight at most.
        error: The type of the errors.
        hints: How to fix it, by HTTP status.
        setting: The setting that holds the URL, for errors.
        health: The path that tells a healthy replica; None if there is none.
    """

    def __init__(
        self,
        service: str,
        urls: Sequence[str],
        *,
        key: str | None = None,
        timeout: float = 30.0,
        retries: int = 3,
        concurrency: int = 8,
        error: type[CardsError] = CardsError,
        hints: Mapping[int, str] | None = None,
        setting: str = "url",
        health: str | None = None,
    ) -> None:
        self.service = service
        self.replicas = [Replica(url) for url in urls]
        self.key = key
        self.timeout = timeout
        self.retries = retries
        self.concurrency = concurrency
        self.error_type = error
        self.hints = hints or {}
        self.setting = setting
        self.health = health
        self.choices = 0  # so far
        self._turns: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None

    async def post(
        self,
        path: str,
        body: Any,
        *,
        limit: int = REPLY_BYTES,
        affinity: Hashable = None,
        on_try: Callable[[], None] | None = None,
    ) -> Reply:
        """Send a request, and return the successful reply.

        Args:
            path: Appended to the URL of the replica.
            body: Sent as JSON.
            limit: Bytes of the reply at most.
            affinity: Requests with the same value go to the same replica as long as it is available, and
                find its prefix cache. None spreads them.
            on_try: Called before each try, for counting.

        Raises:
            CardsError: Of the client's error type; no try succeeded, or the failure will not pass.
        """
        tries = 1 + self.retries
        retrying = AsyncRetrying(
            stop=stop_after_attempt(tries), wait=self._wait, retry=retry_if_exception_type(TransientError), reraise=True
        )
        try:
            reply: Reply = await retrying(self._post, path, body, limit, affinity, on_try)
            return reply
        except TransientError as error:
            raise self.error_type(f"{error} Tries: {tries}.") from error.__cause__

    def error(self, replica: Replica, path: str, problem: str, kind: type[Exception] | None = None) -> Exception:
        """Return an error that names the service and the URL."""
        return (kind or self.error_type)(self.without_key(f"{self.service} ({replica.url_for(path)}) {problem}"))

    def excerpt(self, reply: Reply) -> str:
        """Return the beginning of a reply's text, quoted."""
        return excerpt(reply.content, self.key)

    def without_key(self, text: str) -> str:
        """Return a text with the key masked; a server may repeat what it was sent."""
        return text.replace(self.key, HIDDEN) if self.key else text

    @property
    def _turn(self) -> asyncio.Semaphore:
        """So many requests at once, of the running loop."""
        loop = asyncio.get_running_loop()
        if self._turns is None or self._turns[0] is not loop:
            self._turns = loop, asyncio.Semaphore(self.concurrency)
        return self._turns[1]

    def _wait(self, state: RetryCallState) -> float:
        """Seconds before the next try; none as long as another replica is available."""
        several = len(self.replicas) > 1
        return 0.0 if several and any(replica.available for replica in self.replicas) else BACK_OFF(state)

    async def _choose(self, affinity: Hashable) -> Replica:
        """An available replica, checked for its health after a failure; if there is none, the next to be available."""
        self.choices += 1
        salt = self.choices if affinity is None else affinity
        available = [replica for replica in self.replicas if replica.available]
        # crc32 is the same in all processes of a job, which hash() is not
        for replica in sorted(available, key=lambda r: crc32(f"{salt} {r.url}".encode())):
            if not replica.failures or len(self.replicas) == 1 or await self._healthy(replica):
                return replica
        return min(self.replicas, key=lambda replica: replica.retry_at)

    async def _healthy(self, replica: Replica) -> bool:
        if self.health is None:
            return True
        url, timeout = replica.url_for(self.health), min(HEALTH_TIMEOUT, self.timeout)
        try:
            healthy = (await exchange("GET", url, timeout=timeout, limit=REPLY_BYTES, key=self.key)).is_success
        except (TimeoutError, httpx.HTTPError, ReplyError):
            healthy = False
        if healthy:
            replica.mark_healthy()
        else:
            replica.mark_failed()
        return healthy

    async def _post(
        self, path: str, body: Any, limit: int, affinity: Hashable, on_try: Callable[[], None] | None
    ) -> Reply:
        """One HTTP request."""
        async with self._turn:
            replica = await self._choose(affinity)
            try:
                if on_try is not None:
                    on_try()
                url = replica.url_for(path)
                reply = await exchange("POST", url, timeout=self.timeout, limit=limit, key=self.key, body=body)
            except TimeoutError as error:
                replica.mark_failed()
                problem = f"gave no answer within request_timeout={self.timeout} seconds. Use a larger request_timeout"
                raise self.error(replica, path, f"{problem}, or ask for less at once.", TransientError) from error
            except httpx.HTTPError as error:
                replica.mark_failed()
                transient = isinstance(error, (httpx.NetworkError, httpx.RemoteProtocolError))
                kind = TransientError if transient else None
                raise self.error(replica, path, self._unreachable(error), kind) from error
            except ReplyError as error:
                raise self.error(replica, path, f"{error} Check {self.setting}.") from None
        return self._successful(reply, replica, path)

    def _successful(self, reply: Reply, replica: Replica, path: str) -> Reply:
        """The reply, or an error that says what to do about its status."""
        if reply.is_success:
            replica.mark_healthy()
            return reply
        problem = f"answered HTTP {reply.status}: {self.excerpt(reply)}."
        if reply.status == 429 or reply.status >= 500:
            replica.mark_failed()
            problem = f"{problem} The server is overloaded or has failed: see its log."
            raise self.error(replica, path, problem, TransientError)
        hint = self.hints.get(reply.status, f"Check {self.setting} and the settings of the server.")
        raise self.error(replica, path, f"{problem} {hint}")

    def _unreachable(self, error: httpx.HTTPError) -> str:
        what = shortened(self.without_key(said(error)))  # it may quote what was received
        return f"cannot be reached: {what}. Is the server running, and {self.setting} right?"
