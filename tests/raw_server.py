"""A server that writes bytes of the test's choice, and counts what it was asked, what it sent and who is connected."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

Answer = Callable[["RawServer", asyncio.StreamWriter, str, bytes], Awaitable[None]]


class RawServer:
    """HTTP/1.1 on 127.0.0.1, in a thread of its own.

    Args:
        answer: Called with the server, the writer, the head of the request and its body; it writes the reply.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.open = self.sent = 0
        self.heads: list[str] = []
        ready = threading.Event()
        self.thread = threading.Thread(target=asyncio.run, args=(self._serve(ready),), daemon=True)
        self.thread.start()
        ready.wait()

    def stop(self) -> None:
        """Close the port and all connections."""
        self.loop.call_soon_threadsafe(self.stopping.set)
        self.thread.join()

    async def write(self, out: asyncio.StreamWriter, data: bytes) -> None:
        """Send, as fast as the client reads."""
        out.write(data)
        await out.drain()
        self.sent += len(data)

    async def _serve(self, ready: threading.Event) -> None:
        self.loop, self.stopping = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        await self.stopping.wait()
        server.close()

    async def _connected(self, read: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            while True:
                head = (await read.readuntil(b"\r\n\r\n")).decode()
                sizes = [line.split(":")[1] for line in head.split("\r\n") if line.lower().startswith("content-length")]
                body = await read.readexactly(int(sizes[0])) if sizes else b""
                self.heads.append(head)
                await self.answer(self, out, head, body)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self.open -= 1
            out.close()


def head(status: str = "200 OK", **headers: Any) -> bytes:
    """The head of a reply; underscores of the names are hyphens."""
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def whole(body: bytes, status: str = "200 OK", **headers: Any) -> bytes:
    """A reply."""
    return head(status, Content_Length=len(body), **headers) + body
