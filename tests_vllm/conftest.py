"""Real servers, which all tests here share: a language model with `EntropyStop`, one without, a reward model."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import httpx
import pytest
import tiny_served
import torch

from cards_integrations.engine import Engine, EngineSettings
from cards_integrations.models import LocalModel, VllmModel
from cards_integrations.rewards import RemoteReward

torch.set_num_threads(1)
PYTHON = os.environ.get("CARDS_VLLM_PYTHON", sys.executable)
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
PLUGIN = ("--logits-processors", "cards_integrations.vllm_plugin:EntropyStop")
SECRET = "sesame-4711"
Start = Callable[..., Engine]


class Server:
    """One vLLM, and what it tells of itself."""

    def __init__(self, name: str, model: str, log: Path, *options: str) -> None:
        self.name, self.model, self.log = name, model, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", name]
        command += ["--host", "127.0.0.1", "--port", self.url.rpartition(":")[2], "--dtype", "float32"]
        self.process = subprocess.Popen(
            [*command, "--block-size", "32", *options],
            env={**os.environ, **ENVIRONMENT},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self) -> None:
        """Until it answers; minutes on a small machine."""
        for _ in range(900):
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            try:
                if httpx.get(self.url + "/health", timeout=5).is_success:
                    return
            except httpx.HTTPError:
                pass
            threading.Event().wait(0.5)
        raise AssertionError(self.log.read_text()[-5000:])

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a counter, or of a gauge, over what the labels leave open."""
        found = re.findall(rf"^vllm:{name}\{{(.*)\}} (\S+)$", httpx.get(self.url + "/metrics").text, re.MULTILINE)
        assert found, name
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(float(value) for told, value in found if all(each in told for each in wanted))

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """The server and all of its processes."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, how)
            self.process.wait(60)


@pytest.fixture(scope="session", autouse=True)
def cache_of_these_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of earlier runs is known, nothing of this one is remembered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARDS_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """All of them start at the same time."""
    folder = tmp_path_factory.mktemp("served")
    lm, rm = tiny_served.language_model(folder / "lm"), tiny_served.reward_model(folder / "rm")
    plain = tiny_served.language_model(folder / "plain")
    tiny_served.with_settings(plain, repetition_penalty=1.7, min_p=0.3, top_p=0.4, top_k=3, temperature=0.3)
    details = "--enable-prompt-tokens-details"
    started = {
        "lm": Server("tiny", lm, folder / "lm.log", *PLUGIN, details, "--max-logprobs", "-1"),
        "plain": Server("tiny", plain, folder / "plain.log", details, "--api-key", SECRET),
        "rm": Server("judge", rm, folder / "rm.log", "--runner", "pooling", "--enable-prefix-caching"),
    }
    try:
        for server in started.values():
            server.wait()
        yield started
    finally:
        for server in started.values():
            server.kill()


@pytest.fixture(scope="session")
def lm(servers: dict[str, Server]) -> Server:
    return servers["lm"]


@pytest.fixture(scope="session")
def plain(servers: dict[str, Server]) -> Server:
    """Without `EntropyStop`, with a key, and with a generation config that nobody asked for."""
    return servers["plain"]


@pytest.fixture(scope="session")
def rm(servers: dict[str, Server]) -> Server:
    return servers["rm"]


@pytest.fixture(scope="session")
def judge(rm: Server) -> RemoteReward:
    return RemoteReward(url=rm.url, protocol="classify", model=rm.name, tokenizer=rm.model)


@pytest.fixture
def start() -> Iterator[Start]:
    """`start(server, ...)` is an engine of this test's own on a server, or on several; `start(folder)` a local one."""
    engines: list[Engine] = []

    def start(*where: Server | str, width: int | str = "auto", **model: Any) -> Engine:
        settings = EngineSettings.model_validate({"width": width, "dtype": "float32", "device": "cpu"})
        spec: LocalModel | VllmModel
        if isinstance(where[0], str):
            spec = LocalModel(model=where[0])
        else:
            urls = tuple(server.url + "/v1" for server in where if isinstance(server, Server))
            named = {"model": where[0].name, "tokenizer": where[0].model, "sentinel": tiny_served.SENTINEL}
            spec = VllmModel.model_validate({"base_url": urls, **named, **model})
        engines.append(Engine(spec, settings))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()
