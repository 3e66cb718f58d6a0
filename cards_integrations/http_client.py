"""Models behind HTTP: replicas, retries where they are safe, and keys that stay out of errors and settings."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Hashable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar
from zlib import crc32

import httpx
from pydantic import AfterValidator, BaseModel, ConfigDict, SecretStr, field_validator
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from cards_integrations.errors import CardsError, SettingsError

HIDDEN = "**********"  # what pydantic writes in place of a secret
EXCERPT = 200  # characters of a server's reply in an error
BACK_OFF = wait_exponential(multiplier=0.25, max=8) + wait_random(0, 0.25)  # seconds between two tries
HEALTH_TIMEOUT = 2.0  # seconds
CLOSING: set[asyncio.Task[None]] = set()  # loops hold tasks weakly


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


class Keyed(BaseModel):
    """Settings with an API key. It is not pickled: where they are unpickled, it comes from the environment.

    Subclasses name the setting (`key_setting`, for errors) and the environment variable (`key_variable`).
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    key_setting: ClassVar[str]
    key_variable: ClassVar[str]

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
T = TypeVar("T")


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
        timeout: Seconds for one try.
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
        self.closing: asyncio.Task[None] | None = None

    async def post(
        self, path: str, body: Any, *, affinity: Hashable = None, on_try: Callable[[], None] | None = None
    ) -> httpx.Response:
        """Send a request, and return the successful reply.

        Args:
            path: Appended to the URL of the replica.
            body: Sent as JSON.
            affinity: Requests with the same value go to the same replica as long as it is available, and
                find its prefix cache. None spreads them.
            on_try: Called before each try, for counting.

        Raises:
            CardsError: Of the client's error type; no try succeeded, or the failure will not pass.
        """
        self._connect()
        tries = 1 + self.retries
        retrying = AsyncRetrying(
            stop=stop_after_attempt(tries), wait=self._wait, retry=retry_if_exception_type(TransientError), reraise=True
        )
        try:
            reply: httpx.Response = await retrying(self._post, path, body, affinity, on_try)
            return reply
        except TransientError as error:
            raise self.error_type(f"{error} Tries: {tries}.") from error.__cause__

    def error(self, replica: Replica, path: str, problem: str, kind: type[Exception] | None = None) -> Exception:
        """Return an error that names the service and the URL."""
        return (kind or self.error_type)(self.without_key(f"{self.service} ({replica.url_for(path)}) {problem}"))

    def excerpt(self, reply: httpx.Response) -> str:
        """Return the beginning of a reply's text, quoted."""
        text = self.without_key(" ".join(reply.text.split()))
        return repr(text if len(text) <= EXCERPT else text[:EXCERPT] + " ...")

    def without_key(self, text: str) -> str:
        """Return a text with the key masked; a server may repeat what it was sent."""
        return text.replace(self.key, HIDDEN) if self.key else text

    def _connect(self) -> None:
        """Open a client for the running loop, closed when the loop cancels its tasks (an engine's, or asyncio.run)."""
        if self.closing is None or self.closing.done():
            width = self.concurrency
            self.semaphore = asyncio.Semaphore(width)
            self.client = httpx.AsyncClient(
                headers={"Authorization": f"Bearer {self.key}"} if self.key else None,
                limits=httpx.Limits(max_connections=width, max_keepalive_connections=width),
                timeout=None,
            )
            self.closing = asyncio.create_task(_close_at_the_end(self.client))
            CLOSING.add(self.closing)
            self.closing.add_done_callback(CLOSING.discard)

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
        try:
            reply = await self.client.get(replica.url_for(self.health), timeout=HEALTH_TIMEOUT)
        except httpx.HTTPError:
            replica.mark_failed()
            return False
        if reply.is_success:
            replica.mark_healthy()
        else:
            replica.mark_failed()
        return reply.is_success

    async def _post(
        self, path: str, body: Any, affinity: Hashable, on_try: Callable[[], None] | None
    ) -> httpx.Response:
        """One HTTP request."""
        async with self.semaphore:
            replica = await self._choose(affinity)
            try:
                async with asyncio.timeout(self.timeout):
                    if on_try is not None:
                        on_try()
                    reply = await self.client.post(replica.url_for(path), json=body)
            except TimeoutError as error:
                replica.mark_failed()
                problem = f"gave no answer within request_timeout={self.timeout} seconds. Use a larger request_timeout"
                raise self.error(replica, path, f"{problem}, or ask for less at once.", TransientError) from error
            except httpx.HTTPError as error:
                replica.mark_failed()
                transient = isinstance(error, (httpx.NetworkError, httpx.RemoteProtocolError))
                kind = TransientError if transient else None
                raise self.error(replica, path, self._unreachable(error), kind) from error
        return self._successful(reply, replica, path)

    def _successful(self, reply: httpx.Response, replica: Replica, path: str) -> httpx.Response:
        """The reply, or an error that says what to do about its status."""
        if reply.is_success:
            replica.mark_healthy()
            return reply
        problem = f"answered HTTP {reply.status_code}: {self.excerpt(reply)}."
        if reply.status_code == 429 or reply.is_server_error:
            replica.mark_failed()
            problem = f"{problem} The server is overloaded or has failed: see its log."
            raise self.error(replica, path, problem, TransientError)
        hint = self.hints.get(reply.status_code, f"Check {self.setting} and the settings of the server.")
        raise self.error(replica, path, f"{problem} {hint}")

    def _unreachable(self, error: httpx.HTTPError) -> str:
        return f"cannot be reached: {type(error).__name__}: {error}. Is the server running, and {self.setting} right?"


async def gathered(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines together, and return their results; the first error cancels the others, and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except ExceptionGroup as errors:
        first = errors.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in tasks]


async def _close_at_the_end(client: httpx.AsyncClient) -> None:
    try:
        await asyncio.get_running_loop().create_future()  # forever
    finally:
        await asyncio.sleep(0.01)  # requests that are cancelled at the same moment close their connections first
        await client.aclose()
