"""What servers may cost: bytes, memory, time, connections and tasks, however they misbehave and many they are."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import Start
from raw_server import Answer, RawServer, head, whole

from cards_integrations.engine import Engine
from cards_integrations.errors import ModelError, RewardError
from cards_integrations.http_client import connections, service
from cards_integrations.models import VllmModel
from cards_integrations.models.vllm import replies
from cards_integrations.models.vllm.replies import ServerHandshake
from cards_integrations.rewards import RemoteReward
from cards_integrations.rewards.base import Conversation, Response, RewardModel, scores
from cards_integrations.trace import Usage

pytestmark = [
    pytest.mark.filterwarnings("error::ResourceWarning"),
    pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"),
]
MIB = 2**20
LIMIT = MIB + 2**16  # of the reply about one text
SECRET = "sesame-4711"
Serve = Callable[[Answer], RawServer]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """`serve(answer)` is a server of this test's own."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers: list[RawServer] = []

    def start(answer: Answer) -> RawServer:
        servers.append(RawServer(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def remote(*servers: RawServer, **settings: Any) -> RemoteReward:
    urls = tuple(server.url for server in servers)
    return RemoteReward(**{"url": urls if len(urls) > 1 else urls[0], "protocol": "json", "retries": 0, **settings})


async def score(reward: RemoteReward, *texts: str) -> list[float]:
    model: RewardModel = reward.build(None)  # type: ignore[arg-type]  # it loads nothing
    conversation = Conversation("How many?", Usage())
    return await scores(model, [Response(conversation, text) for text in texts or ["4"]])


async def scored(server: RawServer, out: asyncio.StreamWriter, asked: str, body: bytes) -> None:
    """A server that works."""
    found = [0.5] * len(json.loads(body)["responses"])
    await server.write(out, whole(json.dumps({"scores": found}).encode()))


def saying(reply: bytes) -> Answer:
    async def answer(server: RawServer, out: asyncio.StreamWriter, asked: str, body: bytes) -> None:
        await server.write(out, reply)

    return answer


def endless(start: bytes, piece: bytes, pieces: int = 200, pause: float = 0.0) -> Answer:
    """`start`, and then so many pieces."""

    async def answer(server: RawServer, out: asyncio.StreamWriter, asked: str, body: bytes) -> None:
        await server.write(out, start)
        for _ in range(pieces):
            await server.write(out, piece)
            await asyncio.sleep(pause)

    return answer


async def peak_of(work: Any) -> tuple[str, float]:
    """What the error says, and the most memory that Python took meanwhile, in MiB."""
    tracemalloc.start()
    try:
        with pytest.raises(RewardError) as caught:
            await work
        return str(caught.value), tracemalloc.get_traced_memory()[1] / MIB
    finally:
        tracemalloc.stop()


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2500):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it never came true")


# --- bytes ---


async def test_a_reply_that_says_it_is_too_long_is_not_read(serve: Serve) -> None:
    server = serve(endless(head(Content_Length=200 * MIB), b" " * MIB))
    with pytest.raises(
        RewardError, match=rf"^reward 'remote .*' \({server.url}\) .*{LIMIT:,} bytes.*Check reward\.url"
    ):
        await score(remote(server, retries=3))
    await until(lambda: server.open == 0)
    assert server.sent < 8 * MIB  # what lies in the buffers of the sockets
    assert len(server.heads) == 1  # it would say the same again


async def test_a_reply_that_goes_on_is_read_to_the_limit(serve: Serve) -> None:
    piece = b"10000\r\n" + b" " * 2**16 + b"\r\n"
    server = serve(endless(head(Transfer_Encoding="chunked"), piece, 3200))
    told, peak = await peak_of(score(remote(server)))
    assert f"{LIMIT:,} bytes" in told
    assert peak < 6
    await until(lambda: server.open == 0)
    assert server.sent < 8 * MIB


async def test_the_limit_follows_from_what_is_asked(serve: Serve) -> None:
    """A blank more than it is too long."""

    async def padded(server: RawServer, out: asyncio.StreamWriter, asked: str, body: bytes) -> None:
        count = len(json.loads(body)["responses"])
        text = json.dumps({"scores": [0.5] * count}).encode()
        await server.write(out, whole(text.ljust(MIB + count * 2**16 + (count == 3))))

    server = serve(padded)
    assert await score(remote(server), "a", "b") == [0.5, 0.5]
    with pytest.raises(RewardError, match=f"{MIB + 3 * 2**16:,} bytes"):
        await score(remote(server), "a", "b", "c")


@pytest.mark.parametrize("bits", [zlib.MAX_WBITS, zlib.MAX_WBITS | 16], ids=["deflate", "gzip"])
async def test_a_bomb_is_not_blown_up(serve: Serve, bits: int) -> None:
    packer = zlib.compressobj(1, wbits=bits)
    bomb = b"".join([*(packer.compress(bytes(MIB)) for _ in range(128)), packer.flush()])
    assert len(bomb) < LIMIT
    told, peak = await peak_of(score(remote(serve(saying(whole(bomb, Content_Encoding="gzip"))))))
    assert f"{LIMIT:,} bytes" in told
    assert peak < 6


async def test_what_is_compressed_unasked_is_understood(serve: Serve) -> None:
    packed = gzip.compress(b'{"scores": [0.25]}')
    server = serve(saying(whole(packed, Content_Encoding="gzip")))
    assert await score(remote(server)) == [0.25]
    assert "Accept-Encoding: identity" in server.heads[0]


@pytest.mark.parametrize(
    ("encoding", "told"), [("zstd", "Content-Encoding 'zstd'"), ("gzip", "cannot be decompressed")]
)
async def test_what_cannot_be_decompressed(serve: Serve, encoding: str, told: str) -> None:
    server = serve(saying(whole(b'{"scores": [0.25]}', Content_Encoding=encoding)))
    with pytest.raises(RewardError, match=rf"\({server.url}\) answered .*{told}.*Check reward\.url"):
        await score(remote(server))


async def test_the_status_of_an_error_page_that_cannot_be_read(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may pass, and so it is tried again."""
    monkeypatch.setattr(service, "BACK_OFF", lambda state: 0.0)
    server = serve(saying(whole(b"?", "503 Busy", Content_Encoding="br")))
    with pytest.raises(RewardError, match=r"HTTP 503: ''.*Tries: 3"):
        await score(remote(server, retries=2))
    assert len(server.heads) == 3


async def test_an_error_page_is_read_as_far_as_it_is_quoted(serve: Serve) -> None:
    page = endless(head("500 Oops", Content_Length=50 * MIB), b"<b> its own words " * 2**14)
    server = serve(page)
    told, peak = await peak_of(score(remote(server)))
    assert "HTTP 500: '<b> its own words <b>" in told
    assert len(told) < 500
    assert peak < 2
    await until(lambda: server.open == 0)
    assert server.sent < 8 * MIB


@pytest.mark.parametrize(
    "reply",
    [
        b"<a> " * (MIB // 4),
        b'{"scores": [' + b'"a",' * (MIB // 4) + b"1]}",
        b'{"scores": [' + b"0," * (MIB // 2) + b"0]}",
        b"[" * MIB,
    ],
    ids=["page", "texts", "numbers", "brackets"],
)
async def test_what_is_no_score_takes_no_memory(serve: Serve, reply: bytes) -> None:
    """A mebibyte of it; an error quotes its beginning, and the first that is wrong."""
    told, peak = await peak_of(score(remote(serve(saying(whole(reply))))))
    assert len(told) < 500
    assert peak < 20  # a number is two bytes here, 24 in Python, and 8 more in a list


@pytest.mark.parametrize("cut", range(1, len(SECRET) + 1))
async def test_half_a_key_is_not_shown(serve: Serve, cut: int) -> None:
    """Where what was read of a page ends within the key; blanks before it are not quoted."""
    page = (b"no such key:".ljust(4096 - cut) + SECRET.encode()).ljust(10_000)
    server = serve(saying(whole(page, "401 No")))
    with pytest.raises(RewardError, match="no such key:") as caught:
        await score(remote(server, api_key=SECRET))
    assert SECRET[:3] not in str(caught.value)


async def test_a_line_that_is_no_http_is_not_quoted_in_full(serve: Serve) -> None:
    with pytest.raises(RewardError, match=r"RemoteProtocolError.*Is the server running") as caught:
        await score(remote(serve(saying(b"no http " * 5000 + b"\r\n\r\n"))))
    assert len(str(caught.value)) < 500


# --- time ---

SLOWLY = {
    "head": endless(b"HTTP/1.1 200 OK\r\nX: ", b"x", pause=0.02),
    "body": endless(head(Content_Length=1000), b"x", pause=0.02),
    "chunks": endless(head(Transfer_Encoding="chunked"), b"1\r\nx\r\n", pause=0.02),
    "error page": endless(head("500 Oops", Content_Length=1000), b"x", pause=0.02),
}


@pytest.mark.parametrize("what", SLOWLY)
async def test_a_reply_that_trickles_is_given_up(serve: Serve, what: str) -> None:
    server = serve(SLOWLY[what])
    with pytest.raises(RewardError, match=r"no answer within request_timeout=0\.2 seconds"):
        await score(remote(server, request_timeout=0.2))
    await until(lambda: server.open == 0)


@pytest.mark.parametrize("what", SLOWLY)
async def test_a_health_that_trickles_is_none(serve: Serve, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def busy(server: RawServer, out: asyncio.StreamWriter, asked: str, body: bytes) -> None:
        if asked.startswith("GET"):
            await SLOWLY[what](server, out, asked, body)
        else:
            await server.write(out, whole(b"busy", "503 Busy"))

    servers = serve(busy), serve(busy)
    reward = remote(*servers, protocol="classify", request_timeout=0.2, retries=2)
    model: RewardModel = reward.build(None)  # type: ignore[arg-type]
    services: Any = model
    monkeypatch.setattr(service, "BACK_OFF", lambda state: 0.0)
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.1)
    with pytest.raises(RewardError, match=r"HTTP 503.*Tries: 3"):
        await scores(model, [Response(Conversation("Q", Usage()), "4")])
    for replica in services.servers.replicas:
        replica.retry_at = 0.0
    with pytest.raises(RewardError, match=r"HTTP 503.*Tries: 3"):
        await scores(model, [Response(Conversation("Q", Usage()), "4")])
    assert sum("GET /health" in asked for server in servers for asked in server.heads) >= 2
    await until(lambda: not any(server.open for server in servers))


@pytest.mark.parametrize("what", SLOWLY)
async def test_a_handshake_that_trickles_is_given_up(serve: Serve, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from within a loop, and all replicas at once."""
    monkeypatch.setattr(replies, "HANDSHAKE_TIMEOUT", 1.0)  # in which a busy machine asks all of them
    servers = [serve(SLOWLY[what]) for _ in range(5)]
    spec = VllmModel(base_url=tuple(server.url for server in servers), model="served")
    with pytest.raises(
        ModelError, match=rf"^model 'served': .*{servers[0].url} gave no answer at /v1/models within 1\.0"
    ):
        ServerHandshake(spec)
    assert [len(server.heads) for server in servers] == [1] * 5


def test_a_handshake_s_reply_has_a_limit(serve: Serve) -> None:
    server = serve(endless(head(Content_Length=200 * MIB), b" " * MIB))
    with pytest.raises(ModelError, match=rf"the server at {server.url} .*{4 * MIB:,} bytes.*Check model\.base_url"):
        ServerHandshake(VllmModel(base_url=server.url, model="served"))
    assert server.sent < 8 * MIB


# --- connections and tasks ---

TENANTS = 60


def tenants(server: RawServer) -> list[RemoteReward]:
    return [remote(server, model=f"tenant-{i}", api_key=f"key-{i}") for i in range(TENANTS)]


def score_each(engine: Engine, rewards: list[RemoteReward]) -> None:
    for reward in rewards:
        assert engine.score(reward, "Q", ["4"]) == [0.5]


def wait_for(condition: Callable[[], bool]) -> None:
    asyncio.run(until(condition))


def test_many_rewards_share_a_connection_and_a_task(serve: Serve, models: Callable[..., str], start: Start) -> None:
    """Of each engine; and each request has its own key."""
    server, engines = serve(scored), [start(models("llama")) for _ in range(2)]
    for number, engine in enumerate(engines, 1):
        engine.loaded()
        before = engine.inspect().tasks
        score_each(engine, tenants(server))
        assert engine.inspect().tasks == before + 1
        assert server.open == number
    keys = [line.split()[-1] for asked in server.heads for line in asked.split("\r\n") if "Authorization" in line]
    assert keys == [f"key-{i}" for i in range(TENANTS)] * 2
    engines[0].close()
    wait_for(lambda: server.open == 1)
    score_each(engines[1], tenants(server)[:2])
    engines[1].close()
    wait_for(lambda: server.open == 0)


def test_many_servers_leave_no_connections(
    serve: Serve, models: Callable[..., str], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that nobody uses are closed, and so is the client; the next reward opens another."""
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.05)
    servers, engine = [serve(scored) for _ in range(8)], start(models("llama"))
    engine.loaded()
    before = engine.inspect().tasks
    for _ in range(2):
        for server in servers:
            score_each(engine, [remote(server)])
        wait_for(lambda: engine.inspect().tasks == before and not any(server.open for server in servers))


async def test_so_many_connections_are_kept_at_most(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that are needed are open; what is left afterwards is bounded."""
    monkeypatch.setattr(connections, "MAX_IDLE_CONNECTIONS", 3)
    most = 0

    async def slow(server: RawServer, out: asyncio.StreamWriter, asked: str, body: bytes) -> None:
        nonlocal most
        most = max(most, server.open)
        await asyncio.sleep(0.05)
        await scored(server, out, asked, body)

    server = serve(slow)
    assert await asyncio.gather(*(score(reward) for reward in tenants(server)[:10])) == [[0.5]] * 10
    assert most == 10
    await until(lambda: server.open == 3)


def test_a_loop_that_ends_without_a_word(serve: Serve) -> None:
    """Its tasks are not cancelled, so nobody closes its client; the next loop of the thread has its own."""
    server = serve(scored)
    reward = remote(server)
    for _ in range(3):
        loop = asyncio.new_event_loop()
        assert loop.run_until_complete(score(reward)) == [0.5]
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.05))
        loop.close()
    assert len(server.heads) == 3


async def test_cookies_are_kept_for_nobody(serve: Serve) -> None:
    body = b'{"scores": [0.5]}'
    server = serve(saying(whole(body, Set_Cookie="session=one; Path=/")))
    for reward in tenants(server)[:2]:
        assert await score(reward) == [0.5]
    assert not any("cookie" in asked.lower() for asked in server.heads)


async def test_a_key_goes_nowhere_else(serve: Serve) -> None:
    other = serve(scored)
    server = serve(saying(whole(b"over there", "307 Moved", Location=other.url)))
    with pytest.raises(RewardError, match=r"HTTP 307: 'over there'"):
        await score(remote(server, api_key=SECRET))
    assert (len(server.heads), other.heads) == (1, [])


async def test_a_request_in_flight_keeps_the_client(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes; and those that begin while it closes have another."""
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.02)

    async def slow(server: RawServer, out: asyncio.StreamWriter, asked: str, body: bytes) -> None:
        await asyncio.sleep(0.2)
        await scored(server, out, asked, body)

    server = serve(slow)
    began = time.monotonic()
    assert await score(remote(server)) == [0.5]
    assert time.monotonic() - began >= 0.2
    for rest in (0.02, 0.025, 0.03, 0.04):
        await asyncio.sleep(rest)
        assert await score(remote(server)) == [0.5]
    assert len(server.heads) == 5
