"""One HTTP client for each event loop: all services of an engine share it, however many there are.

What differs between services (keys, limits, who waits for whom) is no matter of a connection. So a reward for each of
a thousand tenants takes one client, one task and as many connections as are in use.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import Context
from functools import lru_cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx

from cards_integrations.http_client.replies import ACCEPTED, Reply, read_reply
from cards_integrations.threads import in_thread

MAX_IDLE_CONNECTIONS = 256  # of a loop
IDLE_SECONDS = 5.0  # after which a connection is closed, and so is a client that nobody has used


async def exchange(
    method: str, url: httpx.URL, *, timeout: float, limit: int, key: str | None = None, body: Any = None
) -> Reply:
    """Send one request, and read the reply.

    Args:
        method: GET or POST.
        url: Where it goes; redirects are not followed.
        timeout: Seconds for all of it: to connect, to send, and to read to the end, however slowly that comes.
        limit: Bytes of the reply at most.
        key: Sent as a Bearer token.
        body: Sent as JSON; None for no body.

    Raises:
        TimeoutError: It took longer.
        httpx.HTTPError: There was no reply.
        ReplyError: It is too long, or cannot be decompressed.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else None
    async with (
        _client() as client,
        asyncio.timeout(timeout),
        client.stream(method, url, json=body, headers=headers) as response,
    ):
        return await read_reply(response, limit)


class LoopClient:
    """The client of the running loop. It closes when nobody has used it for a while, and with the loop.

    An engine that ends, and asyncio.run, cancel all tasks of their loop, and so the one that closes it.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self.loop = asyncio.get_running_loop()
        self.http = httpx.AsyncClient(
            headers=ACCEPTED,
            verify=context,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # one tenant's are none of another's
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=MAX_IDLE_CONNECTIONS, keepalive_expiry=IDLE_SECONDS
            ),
            timeout=None,
        )
        self.in_flight = 0
        self.used_at = self.loop.time()
        self.closing = False
        self.closer = self.loop.create_task(self._close_when_idle(), context=Context())  # not that of a request

    @property
    def usable(self) -> bool:
        """True if it belongs to the running loop, and is open."""
        return self.loop is asyncio.get_running_loop() and not self.closing and not self.closer.done()

    async def _close_when_idle(self) -> None:
        try:
            while (rest := self._rest()) > 0:  # noqa: ASYNC110 (an event at each request costs more)
                await asyncio.sleep(rest)
        finally:
            self.closing = True
            await asyncio.sleep(0.01)  # requests that are cancelled at the same moment close their connections first
            await self.http.aclose()

    def _rest(self) -> float:
        """Seconds for which it has to stay open at least."""
        return IDLE_SECONDS if self.in_flight else self.used_at + IDLE_SECONDS - self.loop.time()


_here = threading.local()  # a loop is a thread's; what is here goes with the thread


@asynccontextmanager
async def _client() -> AsyncIterator[httpx.AsyncClient]:
    """The client of the running loop, kept open for one request."""
    if not _is_open():
        context = await in_thread(_tls_context)
        if not _is_open():  # still not
            _here.client = LoopClient(context)
    client: LoopClient = _here.client
    client.in_flight += 1
    try:
        yield client.http
    finally:
        client.in_flight -= 1
        client.used_at = client.loop.time()


def _is_open() -> bool:
    client: LoopClient | None = getattr(_here, "client", None)
    return client is not None and client.usable


@lru_cache(maxsize=1)
def _tls_context() -> ssl.SSLContext:
    """Read once: the certificates take a tenth of a second."""
    return httpx.create_ssl_context()
