"""The server in a thread of its own, on a free port of this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from cards_integrations import CardsSettings
from cards_integrations.server import ServerSettings
from cards_integrations.server.app import create_app
from cards_integrations.server.service import Service

NAME = "tiny"


class Served:
    """A server that runs.

    Args:
        options: Of the answers.
        settings: Of the server.
    """

    def __init__(self, options: dict[str, Any], settings: dict[str, Any]) -> None:
        app = create_app(CardsSettings(**options), ServerSettings(**{"served_name": NAME, **settings}))
        self.service: Service = app.state.service
        config = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        until(lambda: self._server.started)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"
        self.http = httpx.Client(base_url=self.root, timeout=60)

    def chat(self, content: str = "Hello", **fields: Any) -> httpx.Response:
        """Ask without a client library."""
        body = {"model": NAME, "messages": [{"role": "user", "content": content}], **fields}
        return self.http.post("/v1/chat/completions", json=body)

    def metric(self, name: str) -> float:
        """A number of /metrics; 0 if it is not there yet."""
        lines = self.http.get("/metrics").text.splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), 0.0)

    def stop(self) -> None:
        """Tell the server to end, and wait."""
        self.http.close()
        self._server.should_exit = True
        self._thread.join()


@contextmanager
def served(options: dict[str, Any], **settings: Any) -> Iterator[Served]:
    """A server with these options of answers, and settings of its own."""
    found = Served(options, settings)
    try:
        yield found
    finally:
        found.stop()


def until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for something that happens soon."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
