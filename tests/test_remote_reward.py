"""Rewards over HTTP, from a server process that counts the letter 4 and misbehaves on demand."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import statistics
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tenacity
import yaml
from conftest import Start

from cards_integrations.decoding import Cards, FixedLength, Sampling
from cards_integrations.engine import Request
from cards_integrations.errors import RewardError, SettingsError
from cards_integrations.http_client import service
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import FunctionReward, RemoteReward, as_reward, remote
from cards_integrations.rewards.base import Conversation, Response, scores
from cards_integrations.settings import CardsSettings
from cards_integrations.trace import Usage

pytestmark = [
    pytest.mark.filterwarnings("error::ResourceWarning"),
    pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"),
]

PROTOCOLS = ["classify", "score", "predict", "json"]
SECRET = "sesame-4711"
SERVER = r"""
import json, threading, time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

lock, seen = threading.Lock(), defaultdict(lambda: {"asked": [], "at": [], "now": 0, "peak": 0, "open": 0})


def score(text):
    return float(text.count("4"))


def answer(path, asked, mode):
    if path == "classify":
        probs = [[score(t)] if mode != "labels" else [9.0, score(t), -9.0] for t in asked["input"]]
        found = [{"index": i, "label": "x", "probs": p, "num_classes": len(p)} for i, p in enumerate(probs)]
    elif path == "score":
        found = [{"index": i, "object": "score", "score": score(t)} for i, t in enumerate(asked["text_2"])]
    elif path == "predict":
        found = []
        for [text] in asked["inputs"]:
            labels = [{"label": "LABEL_1", "score": score(text)}] * (2 if mode == "namesakes" else 1)
            if mode == "labels":
                labels += [{"label": "LABEL_0", "score": 9.0}, {"label": "LABEL_2", "score": -9.0}]
            found.append(sorted(labels, key=lambda label: -label["score"]))  # as TEI does
    else:
        found = [score(t) for t in asked["responses"]]
    if mode == "short":
        found = found[:-1]
    if mode == "shuffled":
        found = found[::-1]
    if mode == "twice":
        found[-1] = found[0]
    whole = found if path == "predict" else {"scores": found} if path == "json" else {"data": found}
    if mode == "missing":
        whole = {"result": 1.0}
    text = json.dumps(whole)
    for name in "NaN", "Infinity", "1e999", "null", '"0.5"':
        if mode == name.strip('"'):
            text = json.dumps(json.loads(text, parse_float=lambda value: "@")).replace('"@"', name)
    return text[: len(text) // 2] if mode == "malformed" else text


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    mine = None

    def log_message(self, *args): ...

    def do_GET(self):
        with lock:
            self.send(200, json.dumps(seen[self.path.strip("/")]))

    def do_POST(self):
        name, *options, path = unquote(self.path).strip("/").split("/")
        options = dict(option.split("=") for option in options)
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        key = self.headers["Authorization"]
        with lock:
            self.stats = seen[name]
            if self.mine is None:
                self.mine = self.stats
                self.mine["open"] += 1
            self.stats["at"].append(time.time())
            self.stats["asked"].append({"path": path, "key": key, "body": json.loads(body)})
            nth = len(self.stats["at"])
            self.stats["now"] += 1
            self.stats["peak"] = max(self.stats["peak"], self.stats["now"])
        time.sleep(float(options.get("delay", 0)) * (nth <= int(options.get("slow", nth))))
        with lock:
            self.stats["now"] -= 1
        if "key" in options and key != "Bearer " + options["key"]:
            return self.send(401, json.dumps({"error": "no such key: " + "x" * int(options.get("pad", 0)) + str(key)}))
        if nth <= int(options.get("fail", 0)) or options.get("fail_at", "no such text") in body:
            if options.get("status") == "hang-up":
                self.close_connection = True
                return
            return self.send(int(options.get("status", 500)), "the server's   own words")
        self.send(200, answer(path, json.loads(body), options.get("mode")))

    def send(self, status, text):
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def finish(self):
        if self.mine is not None:
            with lock:
                self.mine["open"] -= 1
        try:
            super().finish()
        except OSError:
            pass


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 64

    def handle_error(self, *args): ...


server = Server(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


class Site:
    """One test's part of the server."""

    names = itertools.count()

    def __init__(self, server: str) -> None:
        self.server, self.name = server, f"test{next(self.names)}"

    def reward(self, protocol: str = "json", options: str = "", **settings: Any) -> RemoteReward:
        """`options` like "fail=2/status=429"."""
        url = "/".join(part for part in (self.server, self.name, options) if part)
        url += "/json" if protocol == "json" else ""
        return RemoteReward(url=url, protocol=protocol, **settings)

    @property
    def seen(self) -> dict[str, Any]:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{self.server}/{self.name}") as reply:
            found: dict[str, Any] = json.load(reply)
        return found

    @property
    def count(self) -> int:
        return len(self.seen["at"])


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def site(server: str, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(remote.KEY, raising=False)
    return Site(server)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "BACK_OFF", tenacity.wait_none())


def conversation(prompt: Any = "How many?", context: tuple[str, ...] = ()) -> Conversation:
    return Conversation(prompt, Usage(), context)


async def asked(reward: RemoteReward, *texts: str, of: Conversation | None = None) -> list[float]:
    model = reward.build(None)  # type: ignore[arg-type]  # it loads nothing
    model.timeout = reward.timeout
    of = of or conversation()
    return await scores(model, [Response(of, text) for text in texts])


# --- protocols ---


@pytest.mark.parametrize(
    ("protocol", "settings", "body"),
    [
        ("classify", {"model": "rm"}, {"model": "rm", "input": ["Q44", "Q", "Qa4"], "use_activation": False}),
        ("classify", {}, {"input": ["Q44", "Q", "Qa4"], "use_activation": False}),
        (
            "score",
            {"model": "rm"},
            {"model": "rm", "text_1": "Q", "text_2": ["44", "", "a4"], "use_activation": False},
        ),
        ("predict", {}, {"inputs": [["Q44"], ["Q"], ["Qa4"]], "raw_scores": True, "truncate": True}),
        ("json", {}, {"prompt": "Q", "context": ["one", "two"], "responses": ["44", "", "a4"]}),
    ],
)
async def test_what_is_sent_and_what_comes_back(
    site: Site, protocol: str, settings: dict[str, Any], body: dict[str, Any]
) -> None:
    question = conversation("Q", ("one", "two"))
    assert await asked(site.reward(protocol, **settings), "44", "", "a4", of=question) == [2, 0, 1]
    assert site.seen["asked"] == [{"path": protocol, "key": None, "body": body}]
    assert question.usage.rm_forwards == 1


async def test_an_empty_answer_is_asked_like_any_other(site: Site) -> None:
    for protocol in PROTOCOLS:
        assert await asked(site.reward(protocol), "") == [0]
    assert site.count == 4


async def test_prompts_in_their_format(site: Site) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    reward = site.reward("classify", prompt_format="<{prompt}|{response}|{prompt}>")
    await asked(reward, "{prompt}", of=conversation("{response}"))
    await asked(reward, "d", of=conversation(chat))
    first, second = (one["body"]["input"] for one in site.seen["asked"])
    assert first == ["<{response}|{prompt}|{response}>"]  # a text is a text, braces or not
    assert second[0].startswith("<User: a\nAssistant: b\nUser: c\nAssistant:|d|User:")


@pytest.mark.parametrize(("protocol", "label"), [("classify", 1), ("predict", "LABEL_1")])
async def test_the_label(site: Site, protocol: str, label: int | str) -> None:
    """Whatever its place: one server sorts by score."""
    assert await asked(site.reward(protocol, "mode=labels", label=label), "4" * 12, "4") == [12, 1]
    with pytest.raises(RewardError, match=r"remote http.*label=None: choose one of \[(0, 1, 2|'LABEL_0', .*)\]"):
        await asked(site.reward(protocol, "mode=labels"), "4")
    other: Any = 3 if protocol == "classify" else "LABEL_3"
    with pytest.raises(RewardError, match=r"label=.*3'?: choose one of"):
        await asked(site.reward(protocol, "mode=labels", label=other), "4")


async def test_labels_of_one_name(site: Site) -> None:
    """Which of them is meant cannot be told."""
    with pytest.raises(RewardError, match=r"label='LABEL_1': choose one of \['LABEL_1', 'LABEL_1'\]"):
        await asked(site.reward("predict", "mode=namesakes", label="LABEL_1"), "4")


@pytest.mark.parametrize("protocol", ["classify", "score"])
async def test_answers_out_of_order(site: Site, protocol: str) -> None:
    assert await asked(site.reward(protocol, "mode=shuffled"), "4", "44", "444", "") == [1, 2, 3, 0]
    with pytest.raises(RewardError, match="indices"):
        await asked(site.reward(protocol, "mode=twice"), "4", "44")


async def test_batches(site: Site) -> None:
    """Texts of several requests share an HTTP request, and each request pays for what carried it."""
    model = site.reward("classify", batch_size=3, prompt_format="{response}").build(None)  # type: ignore[arg-type]
    one, two = conversation("one"), conversation("two")
    found = await scores(model, [Response(one, "4" * i) for i in range(4)] + [Response(two, "4" * i) for i in range(3)])
    assert found == [0, 1, 2, 3, 0, 1, 2]
    assert sorted(len(one["body"]["input"]) for one in site.seen["asked"]) == [1, 3, 3]
    assert (one.usage.rm_forwards, two.usage.rm_forwards) == (2, 2)


def test_who_is_asked_together(site: Site) -> None:
    together = {p: site.reward(p).build(None).across_requests for p in PROTOCOLS}  # type: ignore[arg-type]
    assert together == {"classify": True, "predict": True, "score": False, "json": False}


# --- answers that are none ---


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("mode", ["malformed", "missing", "short", "NaN", "Infinity", "1e999", "null", "0.5"])
async def test_an_answer_that_is_none(site: Site, protocol: str, mode: str) -> None:
    reward = site.reward(protocol, f"mode={mode}")
    with pytest.raises(RewardError, match=r"Check reward\.") as caught:
        await asked(reward, "4", "44")
    assert repr(reward.name) in str(caught.value)
    assert {"malformed": "Invalid JSON", "short": "1 scores for 2 texts"}.get(mode, "") in str(caught.value)
    assert site.count == 1


# --- failures ---


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("status", ["500", "503", "429", "hang-up"])
async def test_what_may_pass_is_tried_again(site: Site, status: str) -> None:
    question = conversation()
    assert await asked(site.reward(options=f"fail=2/status={status}", retries=2), "4", of=question) == [1]
    assert site.count == question.usage.rm_forwards == 3


@pytest.mark.usefixtures("at_once")
async def test_it_does_not_try_for_ever(site: Site) -> None:
    with pytest.raises(RewardError, match=r"HTTP 503: .the server's own words.* Tries: 3\.") as caught:
        await asked(site.reward(options="fail=99/status=503", retries=2), "4")
    assert type(caught.value) is RewardError
    assert site.count == 3


async def test_it_waits_longer_each_time(site: Site) -> None:
    await asked(site.reward(options="fail=2"), "4")
    first, second = (after - before for before, after in itertools.pairwise(site.seen["at"]))
    assert 0.25 <= first <= second <= 1.5


@pytest.mark.parametrize(
    ("status", "mend"),
    [(400, "protocol"), (401, "CARDS_REWARD_API_KEY"), (404, "url"), (413, "batch_size"), (307, "url")],
)
async def test_what_will_not_pass_is_not_tried_again(site: Site, status: int, mend: str) -> None:
    with pytest.raises(RewardError, match=rf"remote {site.server}.*HTTP {status}: .the server's own words.*{mend}"):
        await asked(site.reward(options=f"fail=9/status={status}"), "4")
    assert site.count == 1


@pytest.mark.usefixtures("at_once")
async def test_a_server_that_is_slow(site: Site) -> None:
    assert await asked(site.reward(options="slow=1/delay=0.5", request_timeout=0.1), "4") == [1]
    assert site.count == 2
    with pytest.raises(RewardError, match=r"request_timeout=0\.05 seconds.*larger request_timeout.*Tries: 2"):
        await asked(site.reward(options="delay=0.3", request_timeout=0.05, retries=1), "4")


@pytest.mark.usefixtures("at_once")
async def test_the_whole_call_has_a_timeout(site: Site) -> None:
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"within timeout=0\.2 seconds"):
        await asked(site.reward(options="delay=0.5", request_timeout=0.15, retries=50, timeout=0.2), "4")
    assert time.monotonic() - began < 0.4


@pytest.mark.usefixtures("at_once")
async def test_a_server_that_is_not_there() -> None:
    with pytest.raises(RewardError, match=r"http://127\.0\.0\.1:1/score.*cannot be reached.*Tries: 2"):
        await asked(RemoteReward(url="http://127.0.0.1:1/", protocol="score", retries=1), "4")


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_so_many_requests_are_in_flight(site: Site, concurrency: int) -> None:
    """And those that wait for their turn are not late."""
    reward = site.reward(options="delay=0.05", batch_size=1, concurrency=concurrency, request_timeout=0.25, retries=0)
    model = reward.build(None)  # type: ignore[arg-type]
    one, two = conversation(), conversation()
    calls = [scores(model, [Response(each, "4" * i) for i in range(6)]) for each in (one, two)]
    assert await asyncio.gather(*calls) == [[0, 1, 2, 3, 4, 5]] * 2
    assert site.seen["peak"] == concurrency
    assert site.count == 12


# --- the key ---


@pytest.mark.parametrize("given", ["settings", "environment"])
async def test_the_key_is_sent(site: Site, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(remote.KEY, f"{SECRET}\n" if given == "environment" else "another")
    reward = site.reward(options=f"key={SECRET}", api_key=SECRET if given == "settings" else None)
    assert await asked(reward, "4") == [1]
    assert site.seen["asked"][0]["key"] == f"Bearer {SECRET}"


def short_repr(reward: RemoteReward) -> str:
    options, model = CardsSettings(reward=reward), reward.build(None)  # type: ignore[arg-type]
    written = reward.model_dump_json() + str(reward.model_dump()) + options.to_yaml()
    return f"{reward!r} {reward} {reward.name} {written} {options!r} {model!r}"


@pytest.mark.parametrize("pad", [0, 164])
async def test_the_key_is_not_shown(site: Site, pad: int) -> None:
    """Not even by a server that repeats it, nor half of it where an excerpt ends."""
    reward = site.reward(options=f"key=other/pad={pad}", api_key=SECRET)
    assert SECRET not in short_repr(reward)
    with pytest.raises(RewardError, match=r"HTTP 401.*no such key.*CARDS_REWARD_API_KEY") as caught:
        await asked(reward, "4")
    assert SECRET[:4] not in str(caught.value)


@pytest.mark.parametrize("key", ["", "two words", "ch\u00e4ndler", "line\n"])
def test_a_key_that_is_none(site: Site, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"api_key must be printable") as caught:
        site.reward(api_key=key)
    assert not key or key not in str(caught.value)
    monkeypatch.setenv(remote.KEY, "two words")
    with pytest.raises(SettingsError, match="CARDS_REWARD_API_KEY must be printable"):
        site.reward().build(None)  # type: ignore[arg-type]


def test_no_error_of_the_settings_shows_the_key(site: Site) -> None:
    for wrong in ({"label": 3}, {"url": "nowhere"}, {"retries": -1}, {"rate": 3}):
        with pytest.raises(SettingsError) as caught:
            RemoteReward(**{"url": site.server, "protocol": "json", "api_key": SECRET, **wrong})
        assert SECRET not in str(caught.value)


def test_settings_that_are_written_and_read(site: Site) -> None:
    reward = site.reward("classify", model="rm", label=1, retries=0, scale=(1.0, 2.0), timeout=9)
    assert as_reward(json.loads(reward.model_dump_json())) == reward
    assert as_reward(yaml.safe_load(yaml.safe_dump(reward.model_dump(mode="json")))) == reward
    assert reward.is_reproducible
    assert not site.reward("json").is_reproducible
    written = CardsSettings(reward=site.reward(api_key=SECRET)).model_dump(mode="json")["reward"]
    with pytest.raises(ValueError, match=r"api_key=.\*+.*give the key again.*CARDS_REWARD_API_KEY"):
        as_reward(written)
    assert as_reward({**written, "api_key": SECRET}) == site.reward(api_key=SECRET)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:8000"}, "http://localhost"),
        ({"url": "ftp://host"}, "http://localhost"),
        ({"url": "http://"}, "http://localhost"),
        ({"url": "http://me:sesame@host"}, "api_key"),
        ({"prompt_format": "{prompt}"}, r"\{response\}"),
        ({"label": 0}, "leave it out"),
        ({"protocol": "predict", "label": 0}, "LABEL_1"),
        ({"protocol": "classify", "label": "good"}, "index"),
        ({"request_timeout": 0}, "request_timeout"),
        ({"concurrency": 0}, "concurrency"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        RemoteReward(**{"url": "http://host", "protocol": "json", **settings})
    assert "sesame" not in str(caught.value)


# --- in the engine ---

PROMPT = "w9 w20 w31 w5"
SAMPLER = Sampler(temperature=1.0)
GUIDED = Cards(target_reward=10.0, beta=0.5, boundary=FixedLength(length=4), max_rejections=8)


def fours(prompt: str, texts: list[str]) -> list[float]:
    return [float(text.count("4")) for text in texts]


def test_guided_answers_are_better(site: Site, models: Callable[..., str], start: Start) -> None:
    """And they are those of the same reward without HTTP."""
    engine = start(models("llama"))
    local = [Request(PROMPT, GUIDED, FunctionReward(function=fours), SAMPLER, 24, seed=seed) for seed in range(4)]
    expected = engine.run_many(local)
    for protocol in PROTOCOLS:
        reward = site.reward(protocol, prompt_format="{response}")
        found = engine.run_many([Request(PROMPT, GUIDED, reward, SAMPLER, 24, seed=seed) for seed in range(4)])
        assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
        assert [answer.reward for answer in found] == [answer.text.count("4") for answer in found]
        assert all(answer.usage.rm_forwards > 0 for answer in found)
    assert any(len(one["body"].get("input", ())) > 4 for one in site.seen["asked"])  # requests share a batch
    plain = engine.run_many([Request(PROMPT, Sampling(), None, SAMPLER, 24, seed=seed) for seed in range(4)])
    means = [statistics.fmean(answer.text.count("4") for answer in answers) for answers in (expected, plain)]
    assert means[0] > means[1] + 2


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_failing_request_harms_no_other(
    site: Site, models: Callable[..., str], start: Start, protocol: str
) -> None:
    engine = start(models("llama"))
    reward = site.reward(protocol, "fail_at=w47 w47", retries=1)
    good = [Request(PROMPT, GUIDED, reward, SAMPLER, 12, seed=seed) for seed in range(3)]
    expected = [answer.token_ids for answer in engine.run_many(good)]
    bad = Request("w47 w47", GUIDED, reward, SAMPLER, 12, seed=0)
    first, failed, *rest = await asyncio.gather(*map(engine.arun, [good[0], bad, *good[1:]]), return_exceptions=True)
    with pytest.raises(RewardError, match="HTTP 500"):
        raise failed  # type: ignore[misc]
    assert [answer.token_ids for answer in (first, *rest)] == expected  # type: ignore[union-attr]


@pytest.mark.parametrize("busy", [False, True])
def test_connections_end_with_the_engine(site: Site, models: Callable[..., str], start: Start, busy: bool) -> None:
    engine = start(models("llama"))
    if busy:
        future = engine.submit(Request(PROMPT, GUIDED, site.reward(options="delay=0.4"), SAMPLER, 12))
        while not site.count:
            time.sleep(0.01)
        assert not future.done()
    else:
        engine.run(Request(PROMPT, GUIDED, site.reward(), SAMPLER, 12))
    assert site.seen["open"] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.close()
        gc.collect()
    deadline = time.monotonic() + 2
    while site.seen["open"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
