"""Models behind HTTP: replicas, retries where they are safe, keys that stay out of errors and settings."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Hashable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar
from zlib import crc32

import httpx
from pydantic import AfterValidator, BaseModel, SecretStr, field_validator
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
EXCERPT = 200  # characters of a server's words in an error
BACK_OFF = wait_exponential(multiplier=0.25, max=8) + wait_random(0, 0.25)  # seconds between two tries
HEALTH_TIMEOUT = 2.0  # seconds
CLOSING: set[asyncio.Task[None]] = set()  # loops hold tasks weakly


def usable_key(key: str, name: str, variable: str) -> str:
    """A key that can stand in a header; otherwise httpx would quote it in its error."""
    if key == HIDDEN:
        raise SettingsError(
            f"{name}='{HIDDEN}' stands for a key that was left out when the settings were written: "
            f"give the key again, or leave api_key out and set the environment variable {variable}."
        )
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise SettingsError(f"{name} must be printable ASCII without spaces.")
    return key


def _of_a_server(value: str) -> str:
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
    """Settings with a key, which is not pickled: where they are loaded, it comes from the environment.

    `key_setting` and `key_variable` are what errors call it, and the variable.
    """

    key_setting: ClassVar[str]
    key_variable: ClassVar[str]
    api_key: SecretStr | None = None

    @field_validator("api_key")
    @classmethod
    def _is_a_key(cls, value: SecretStr | None) -> SecretStr | None:
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


ServerUrl = Annotated[str, AfterValidator(_of_a_server)]
T = TypeVar("T")


class MayPass(Exception):
    """Another try, or another replica, may succeed."""


class Replica:
    """One of several servers that serve the same; after a failure it is left alone for a while."""

    def __init__(self, url: str) -> None:
        self.url = httpx.URL(url)
        self.failures = 0
        self.back_at = 0.0  # monotonic seconds

    def at(self, path: str) -> httpx.URL:
        return self.url.copy_with(path=self.url.path.rstrip("/") + path) if path else self.url

    @property
    def up(self) -> bool:
        return time.monotonic() >= self.back_at

    def failed(self) -> None:
        self.failures += 1
        self.back_at = time.monotonic() + min(30.0, 0.25 * 2 ** min(self.failures, 7))

    def answered(self) -> None:
        self.failures, self.back_at = 0, 0.0


class Servers:
    """Replicas of one service. What may pass (no connection, no answer in time, 429, 5xx) is tried again,
    at another replica if there is one, else after a while; so only what is safe to ask twice may be asked.

    `who` begins every error, of the type `error`; `hints` says for a status what to do about it.
    """

    def __init__(
        self,
        who: str,
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
        self.who = who
        self.replicas = [Replica(url) for url in urls]
        self.key = key
        self.timeout = timeout
        self.retries = retries
        self.concurrency = concurrency
        self.error_type = error
        self.hints = hints or {}
        self.setting = setting
        self.health = health
        self.asked = 0
        self.closing: asyncio.Task[None] | None = None

    async def post(
        self, path: str, body: Any, *, near: Hashable = None, before: Callable[[], None] | None = None
    ) -> httpx.Response:
        """The reply, after as many tries as it takes; `before` each of them something may be counted.

        What is `near` the same goes to the same replica as long as that one is up, and finds its prefix cache.
        """
        self._connect()
        tries = 1 + self.retries
        again = AsyncRetrying(
            stop=stop_after_attempt(tries), wait=self._wait, retry=retry_if_exception_type(MayPass), reraise=True
        )
        try:
            reply: httpx.Response = await again(self._post, path, body, near, before)
            return reply
        except MayPass as error:
            raise self.error_type(f"{error} Tries: {tries}.") from error.__cause__

    def error(self, replica: Replica, path: str, told: str, kind: type[Exception] | None = None) -> Exception:
        """An error that says who was asked, and where."""
        return (kind or self.error_type)(self.without_key(f"{self.who} ({replica.at(path)}) {told}"))

    def excerpt(self, reply: httpx.Response) -> str:
        """What a server said, in short."""
        text = self.without_key(" ".join(reply.text.split()))
        return repr(text if len(text) <= EXCERPT else text[:EXCERPT] + " ...")

    def without_key(self, text: str) -> str:
        """A server may repeat what it was sent."""
        return text.replace(self.key, HIDDEN) if self.key else text

    def _connect(self) -> None:
        """A client for the running loop, closed when the loop ends its tasks (as an engine does, and asyncio.run)."""
        if self.closing is None or self.closing.done():
            width = self.concurrency
            self.slots = asyncio.Semaphore(width)
            self.client = httpx.AsyncClient(
                headers={"Authorization": f"Bearer {self.key}"} if self.key else None,
                limits=httpx.Limits(max_connections=width, max_keepalive_connections=width),
                timeout=None,
            )
            self.closing = asyncio.create_task(_close_at_the_end(self.client))
            CLOSING.add(self.closing)
            self.closing.add_done_callback(CLOSING.discard)

    def _wait(self, state: RetryCallState) -> float:
        """None as long as another replica may answer."""
        return 0.0 if any(replica.up for replica in self.replicas) and len(self.replicas) > 1 else BACK_OFF(state)

    async def _choose(self, near: Hashable) -> Replica:
        """A replica that is up; one that was down has to be healthy first. The last resort is asked in any case."""
        self.asked += 1
        salt = self.asked if near is None else near
        # the same in all processes of a job, which hash() is not
        up = sorted(
            (replica for replica in self.replicas if replica.up), key=lambda r: crc32(f"{salt} {r.url}".encode())
        )
        for replica in up:
            if not replica.failures or len(self.replicas) == 1 or await self._healthy(replica):
                return replica
        return min(self.replicas, key=lambda replica: replica.back_at)

    async def _healthy(self, replica: Replica) -> bool:
        if self.health is None:
            return True
        try:
            reply = await self.client.get(replica.at(self.health), timeout=HEALTH_TIMEOUT)
        except httpx.HTTPError:
            replica.failed()
            return False
        if reply.is_success:
            replica.answered()
        else:
            replica.failed()
        return reply.is_success

    async def _post(self, path: str, body: Any, near: Hashable, before: Callable[[], None] | None) -> httpx.Response:
        """One HTTP request."""
        async with self.slots:
            replica = await self._choose(near)
            try:
                async with asyncio.timeout(self.timeout):
                    if before is not None:
                        before()
                    reply = await self.client.post(replica.at(path), json=body)
            except TimeoutError as error:
                replica.failed()
                told = f"gave no answer within request_timeout={self.timeout} seconds. Use a larger request_timeout"
                raise self.error(replica, path, f"{told}, or ask for less at once.", MayPass) from error
            except httpx.HTTPError as error:
                replica.failed()
                passing = isinstance(error, (httpx.NetworkError, httpx.RemoteProtocolError))
                raise self.error(replica, path, self._unreachable(error), MayPass if passing else None) from error
        if reply.is_success:
            replica.answered()
            return reply
        told = f"answered HTTP {reply.status_code}: {self.excerpt(reply)}."
        if reply.status_code == 429 or reply.is_server_error:
            replica.failed()  # or, with 429, busy: both rest
            told = f"{told} The server is overloaded or has failed: see its log."
            raise self.error(replica, path, told, MayPass)
        mend = self.hints.get(reply.status_code, f"Check {self.setting} and the settings of the server.")
        raise self.error(replica, path, f"{told} {mend}")

    def _unreachable(self, error: httpx.HTTPError) -> str:
        return f"cannot be reached: {type(error).__name__}: {error}. Is the server running, and {self.setting} right?"


async def gathered(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of them return; the first error cancels the others, and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except ExceptionGroup as errors:
        first = errors.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in tasks]


async def _close_at_the_end(client: httpx.AsyncClient) -> None:
    try:
        await asyncio.get_running_loop().create_future()  # for ever
    finally:
        await asyncio.sleep(0.01)  # requests that are cancelled at the same moment close their connections first
        await client.aclose()
