"""Replicas behind HTTP: who is asked, what is tried again, and what an error says."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from vllm_server import TOKENIZE, VllmServer

from cards_integrations.errors import ModelError, SettingsError
from cards_integrations.http_client import (
    Replica,
    Reply,
    ServerUrl,
    ServiceClient,
    TransientError,
    gathered,
    service,
    usable_key,
)

pytestmark = [
    pytest.mark.filterwarnings("error::ResourceWarning"),
    pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"),
]
SECRET = "sesame-4711"
BODY = {"prompt": "w7 w8"}


@pytest.fixture(scope="module")
def three(models: Callable[..., str]) -> Iterator[list[VllmServer]]:
    found = [VllmServer(models("llama")).start() for _ in range(3)]
    yield found
    for server in found:
        server.die()


@pytest.fixture
def replicas(three: list[VllmServer], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[VllmServer]]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for server in three:
        server.reset()
    yield three
    for server in three:
        server.wait_until_idle()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tries after which one was to wait, the last one included; here nobody does."""
    found: list[int] = []

    def no_time(state: Any) -> float:
        found.append(state.attempt_number)
        return 0.0

    monkeypatch.setattr(service, "BACK_OFF", no_time)
    return found


def of(*replicas: VllmServer | str, **settings: Any) -> ServiceClient:
    urls = [each if isinstance(each, str) else each.url for each in replicas]
    given = {"error": ModelError, "setting": "model.base_url", "health": "/health", "hints": {404: "Mend it."}}
    return ServiceClient("model 'served'", urls, **{**given, **settings})


async def post(servers: ServiceClient, affinity: Any = None, **more: Any) -> list[int]:
    reply = await servers.post(TOKENIZE, BODY, affinity=affinity, **more)
    found: list[int] = json.loads(reply.content)["tokens"]
    return found


def counts(replicas: list[VllmServer]) -> list[int]:
    return [len(replica.of(TOKENIZE)) for replica in replicas]


async def first_at(servers: ServiceClient, replica: VllmServer) -> int:
    """An affinity that goes to this replica."""
    for affinity in range(1000):
        if str((await servers._choose(affinity)).url) == replica.url:
            return affinity
    raise AssertionError("nothing goes there")


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it never came true")


# --- who is asked ---


async def test_what_is_sent_and_what_comes_back(replicas: list[VllmServer]) -> None:
    assert await post(of(replicas[0], key=SECRET)) == [7, 8]
    [asked] = replicas[0].asked
    assert (asked.path, asked.body, asked.key) == (TOKENIZE, BODY, f"Bearer {SECRET}")


async def test_a_path_before_the_service_s_own() -> None:
    assert str(Replica("http://host:1/a/b/").url_for("/v1/completions")) == "http://host:1/a/b/v1/completions"
    assert str(Replica("http://host:1/a?b=c").url_for("")) == "http://host:1/a?b=c"


async def test_what_is_near_goes_to_one_replica(replicas: list[VllmServer]) -> None:
    servers, places = of(*replicas), []
    for affinity in range(60):
        before = counts(replicas)
        for _ in range(3):
            await post(servers, affinity)
        more = [now - then for now, then in zip(counts(replicas), before, strict=True)]
        assert sorted(more) == [0, 0, 3]
        places.append(more.index(3))
    assert set(places) == {0, 1, 2}
    again = of(*replicas[::-1])
    for affinity, place in enumerate(places):
        assert str((await again._choose(affinity)).url) == replicas[place].url


async def test_what_is_near_nothing_is_spread(replicas: list[VllmServer]) -> None:
    servers = of(*replicas)
    for _ in range(90):
        await post(servers)
    assert sum(counts(replicas)) == 90
    assert min(counts(replicas)) >= 5


CHOICE = """
import asyncio
from cards_integrations.http_client import ServiceClient

async def main():
    servers = ServiceClient("it", ["http://a", "http://b", "http://c"])
    print("".join([(await servers._choose(affinity)).url.host for affinity in range(40)]))

asyncio.run(main())
"""


def test_every_process_chooses_alike() -> None:
    """Workers of one job share the replicas, and so their prefix caches."""
    told = []
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", CHOICE], capture_output=True, text=True, env=environment)
        told.append(done.stdout.strip())
    assert set(told[0]) == set("abc")
    assert told[0] == told[1]


# --- what is tried again, and where ---


@pytest.mark.parametrize("kind", [500, 502, 503, 429, "killed"])
async def test_what_may_pass_is_tried_again(replicas: list[VllmServer], waits: list[int], kind: int | str) -> None:
    servers, paid = of(replicas[0], retries=3), []
    replicas[0].fail(kind, times=2, path=TOKENIZE)
    assert await post(servers, on_try=lambda: paid.append(1)) == [7, 8]
    assert (len(replicas[0].asked), len(paid), waits) == (3, 3, [1, 2])
    assert servers.replicas[0].failures == 0


@pytest.mark.parametrize("retries", [0, 2])
async def test_it_does_not_try_for_ever(replicas: list[VllmServer], waits: list[int], retries: int) -> None:
    replicas[0].fail(503, path=TOKENIZE)
    message = rf"^model 'served' \({replicas[0].url}/tokenize\) answered HTTP 503: .*its own words.*"
    with pytest.raises(ModelError, match=rf"{message} Tries: {retries + 1}\.$") as caught:
        await post(of(replicas[0], retries=retries))
    assert type(caught.value) is ModelError
    assert (len(replicas[0].asked), waits) == (retries + 1, [*range(1, retries + 2)])


@pytest.mark.parametrize("kind", [500, 503, "killed", "hang"])
async def test_another_replica_is_asked_at_once(replicas: list[VllmServer], waits: list[int], kind: int | str) -> None:
    one, two, _ = replicas
    servers = of(one, two, timeout=0.2)
    affinity = await first_at(servers, one)
    one.fail(kind, path=TOKENIZE)
    for _ in range(5):
        assert await post(servers, affinity) == [7, 8]
    assert (counts([one, two]), waits) == ([1, 5], [])


async def test_a_replica_that_is_not_there(replicas: list[VllmServer], waits: list[int]) -> None:
    servers = of("http://127.0.0.1:1", replicas[0])
    for _ in range(20):
        assert await post(servers) == [7, 8]
    assert (counts(replicas), waits, servers.replicas[0].failures) == ([20, 0, 0], [], 1)


async def test_an_overloaded_replica_s_work_goes_to_another(replicas: list[VllmServer], waits: list[int]) -> None:
    one, two, _ = replicas
    servers = of(one, two)
    affinity = await first_at(servers, one)
    one.fail(429, path=TOKENIZE)
    assert await post(servers, affinity) == [7, 8]
    assert (counts([one, two]), waits) == ([1, 1], [])


async def test_where_all_are_overloaded_one_waits(replicas: list[VllmServer], waits: list[int]) -> None:
    one, two, _ = replicas
    for each in (one, two):
        each.fail(429, path=TOKENIZE)
    with pytest.raises(ModelError, match=r"HTTP 429.*overloaded.*Tries: 4"):
        await post(of(one, two, retries=3))
    assert sum(counts([one, two])) == 4
    assert waits


async def test_where_all_have_failed_one_waits(replicas: list[VllmServer], waits: list[int]) -> None:
    one, two, _ = replicas
    for each in (one, two):
        each.fail(500, times=1, path=TOKENIZE)
    assert await post(of(one, two, retries=3)) == [7, 8]
    assert (sum(counts([one, two])), waits) == (3, [2])


@pytest.mark.parametrize(
    ("status", "mend"), [(307, "Check model.base_url"), (400, "Check model.base_url"), (404, "Mend it.")]
)
async def test_what_will_not_pass_is_not_tried_again(
    replicas: list[VllmServer], waits: list[int], status: int, mend: str
) -> None:
    replicas[0].fail(status, path=TOKENIZE)
    with pytest.raises(ModelError, match=rf"HTTP {status}: .*its own words.* {mend}"):
        await post(of(replicas[0]))
    assert (len(replicas[0].asked), waits) == (1, [])


async def test_a_server_that_is_slow(replicas: list[VllmServer], waits: list[int]) -> None:
    replicas[0].fail("hang", path=TOKENIZE)
    with pytest.raises(ModelError, match=r"no answer within request_timeout=0\.05 seconds.*Tries: 2\."):
        await post(of(replicas[0], timeout=0.05, retries=1))
    await until(lambda: replicas[0].in_flight == 0)
    assert (len(replicas[0].asked), replicas[0].aborted, waits) == (2, 2, [1, 2])


async def test_a_server_that_is_not_there(waits: list[int]) -> None:
    with pytest.raises(ModelError, match=r"127\.0\.0\.1:1/tokenize\) cannot be reached: ConnectError.*Tries: 3\."):
        await post(of("http://127.0.0.1:1", retries=2))
    assert waits == [1, 2, 3]


async def test_where_nobody_is_up_the_one_that_has_rested_most_is_asked(replicas: list[VllmServer]) -> None:
    one, two, _ = replicas
    servers = of(one, two)
    for affinity in range(20):
        for replica, seconds in zip(servers.replicas, (1000.0, 500.0), strict=True):
            replica.failures, replica.retry_at = 3, time.monotonic() + seconds
        await post(servers, affinity)
    assert counts([one, two]) == [0, 20]


def test_a_replica_is_left_alone_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    replica, rests = Replica("http://host"), []
    assert replica.available
    for _ in range(8):
        replica.mark_failed()
        rests.append(replica.retry_at - 100.0)
    assert (rests, replica.available) == ([0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0], False)
    replica.failures = 10_000  # a long outage under load
    replica.mark_failed()
    assert replica.retry_at == 130.0
    replica.mark_healthy()
    assert (replica.available, replica.failures) == (True, 0)


# --- the way back ---


async def test_a_replica_is_healthy_before_it_gets_work(replicas: list[VllmServer]) -> None:
    one, two, _ = replicas
    servers = of(one, two)
    affinity = await first_at(servers, one)
    one.fail(500, times=1, path=TOKENIZE)
    one.healthy = False
    await post(servers, affinity)
    assert (counts([one, two]), one.healths) == ([1, 1], 0)
    await post(servers, affinity)
    assert (counts([one, two]), one.healths) == ([1, 2], 0)
    servers.replicas[0].retry_at = 0.0  # its time of rest is over
    await post(servers, affinity)
    assert (counts([one, two]), one.healths) == ([1, 3], 1)
    one.healthy, servers.replicas[0].retry_at = True, 0.0
    await post(servers, affinity)
    await post(servers, affinity)
    assert (counts([one, two]), one.healths) == ([3, 3], 2)


async def test_an_unhealthy_replica_is_not_asked_for_its_health_each_time(replicas: list[VllmServer]) -> None:
    one, two, _ = replicas
    servers = of(one, two)
    affinity = await first_at(servers, one)
    one.fail(500, times=1, path=TOKENIZE)
    one.healthy = False
    await post(servers, affinity)
    servers.replicas[0].retry_at = 0.0
    for _ in range(5):
        await post(servers, affinity)
    assert (counts([one, two]), one.healths) == ([1, 6], 1)


async def test_a_replica_that_died_comes_back(replicas: list[VllmServer]) -> None:
    one, two, _ = replicas
    servers = of(one, two)
    affinity = await first_at(servers, one)
    await post(servers, affinity)
    await asyncio.to_thread(one.die)
    await post(servers, affinity)
    servers.replicas[0].retry_at = 0.0
    await post(servers, affinity)  # its health cannot be asked
    assert (counts([one, two]), servers.replicas[0].failures) == ([1, 2], 2)
    await asyncio.to_thread(one.start)
    servers.replicas[0].retry_at = 0.0
    await post(servers, affinity)
    assert (counts([one, two]), one.healths, servers.replicas[0].failures) == ([2, 2], 1, 0)


async def test_without_a_health_path_one_tries(replicas: list[VllmServer]) -> None:
    one, two, _ = replicas
    servers = of(one, two, health=None)
    affinity = await first_at(servers, one)
    one.fail(500, times=1, path=TOKENIZE)
    await post(servers, affinity)
    servers.replicas[0].retry_at = 0.0
    await post(servers, affinity)
    assert (counts([one, two]), one.healths) == ([2, 1], 0)


# --- at once, and given up ---


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_so_many_are_in_flight(replicas: list[VllmServer], concurrency: int) -> None:
    one = replicas[0]
    one.pace = 0.01
    servers = of(one, concurrency=concurrency)
    body = {"prompt": [7], "max_tokens": 2}
    await asyncio.gather(*(servers.post("/v1/completions", body) for _ in range(9)))
    assert (len(one.asked), one.peak) == (9, concurrency)


async def test_who_waits_for_a_turn_is_not_late(replicas: list[VllmServer]) -> None:
    one = replicas[0]
    one.pace = 0.02
    servers = of(one, concurrency=1, timeout=0.4, retries=0)
    body = {"prompt": [7], "max_tokens": 5}
    await asyncio.gather(*(servers.post("/v1/completions", body) for _ in range(6)))
    assert (len(one.asked), one.aborted) == (6, 0)


async def test_giving_up_closes_the_connection_and_frees_the_turn(replicas: list[VllmServer]) -> None:
    one = replicas[0]
    one.fail("hang", times=2, path=TOKENIZE)
    servers = of(one, concurrency=2)
    tasks = [asyncio.create_task(post(servers)) for _ in range(2)]
    await until(lambda: one.in_flight == 2)
    for task in tasks:
        task.cancel()
    assert [type(e) for e in await asyncio.gather(*tasks, return_exceptions=True)] == [asyncio.CancelledError] * 2
    await until(lambda: one.in_flight == 0)
    assert one.aborted == 2
    assert await post(servers) == [7, 8]
    assert servers.replicas[0].failures == 0


# --- loops ---


def test_several_loops_one_after_another(replicas: list[VllmServer]) -> None:
    """Each has a client of its own, which goes with it."""
    servers, open_within = of(replicas[0]), []

    async def several() -> list[list[int]]:
        found = await asyncio.gather(*(post(servers) for _ in range(4)))
        open_within.append(replicas[0].connections)
        return found

    for _ in range(3):
        assert asyncio.run(several()) == [[7, 8]] * 4
        asyncio.run(until(lambda: replicas[0].connections == 0))
    assert open_within == [4, 4, 4]
    assert len(replicas[0].asked) == 12


def test_a_loop_that_ends_in_the_middle(replicas: list[VllmServer]) -> None:
    """What was in flight is ended in the server, and the next loop asks anew."""
    one = replicas[0]
    one.fail("hang", times=1, path=TOKENIZE)
    servers = of(one)

    async def left() -> None:
        task = asyncio.create_task(post(servers))
        await until(lambda: one.in_flight == 1)
        del task

    asyncio.run(left())
    asyncio.run(until(lambda: one.in_flight == 0))
    assert one.aborted == 1
    assert asyncio.run(post(servers)) == [7, 8]


def test_a_loop_in_another_thread_later(replicas: list[VllmServer]) -> None:
    servers, found = of(replicas[0]), []
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.append(asyncio.run(post(servers))))
        thread.start()
        thread.join()
    assert found == [[7, 8], [7, 8]]


# --- keys and addresses ---


async def test_the_key_is_not_shown(replicas: list[VllmServer]) -> None:
    one = replicas[0]
    one.key = "another"
    servers = of(one, key=SECRET)
    with pytest.raises(ModelError, match=r"HTTP 401.*no such key: Bearer \*+") as caught:
        await post(servers)
    assert SECRET not in f"{caught.value!r} {caught.value.__cause__!r} {servers!r}"
    assert servers.without_key(f"a {SECRET} b") == "a ********** b"


def test_what_a_server_says_is_cut() -> None:
    servers = of("http://host", key=SECRET)
    said = servers.excerpt(Reply(500, f"  many\n words {SECRET} {'x' * 500}".encode()))
    assert said.startswith("'many words ********** xxx")
    assert said.endswith("x ...'")
    assert len(said) == 200 + len(" ...") + 2


@pytest.mark.parametrize("key", ["", "two words", "ch\u00e4ndler", "line\n", "**********"])
def test_a_key_that_is_none(key: str) -> None:
    with pytest.raises(SettingsError, match=r"^model\.api_key") as caught:
        usable_key(key, "model.api_key", "SOME_VARIABLE")
    assert not key or key == "**********" or key not in str(caught.value)
    assert usable_key(SECRET, "model.api_key", "SOME_VARIABLE") == SECRET


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nowhere", "must be like http://localhost:8000"),
        ("ftp://host", "must be like http://localhost:8000"),
        ("http://", "must be like http://localhost:8000"),
        ("http://host:port", "no URL"),
    ],
)
def test_an_address_that_is_none(url: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(ServerUrl).validate_python(url)


def test_an_address_with_a_password() -> None:
    with pytest.raises(ValidationError, match="must not carry a password"):
        TypeAdapter(ServerUrl).validate_python("http://me:secret@host")


# --- several at once ---


async def test_what_all_return_in_their_order() -> None:
    async def after(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    assert await gathered(after(seconds) for seconds in (0.02, 0.0, 0.01)) == [0.02, 0.0, 0.01]
    assert await gathered([]) == []


async def test_the_first_error_cancels_the_others_and_is_raised_as_it_is() -> None:
    ended = []

    async def waits_for_ever() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def fails() -> None:
        await asyncio.sleep(0)
        raise TransientError("it") from ValueError("its cause")

    with pytest.raises(TransientError, match=r"^it$") as caught:
        await gathered([waits_for_ever(), fails(), waits_for_ever()])
    assert isinstance(caught.value.__cause__, ValueError)
    assert ended == ["cancelled"] * 2
