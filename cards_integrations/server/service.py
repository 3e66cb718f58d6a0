"""The work of the server: from the call of a client to requests of the engine, and to their answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cards_integrations.chat.message import Message
from cards_integrations.engine.admission import check_length
from cards_integrations.engine.engine import Engine
from cards_integrations.engine.inspection import EngineState
from cards_integrations.engine.request import Chunk, Request
from cards_integrations.models.sources import source_name
from cards_integrations.paths import is_directory
from cards_integrations.server.call import BodyReader, Call, Endpoint
from cards_integrations.server.choices import Choices
from cards_integrations.server.guard import Guard
from cards_integrations.server.metrics import Metrics
from cards_integrations.server.settings import ServerSettings
from cards_integrations.settings import Options
from cards_integrations.trace import Alignment

LONG = 100_000  # characters, for which a tokenizer needs some tens of milliseconds
Item = tuple[int, Chunk | Alignment]
"""The index of an answer, and a kept segment of it or, at its end, the whole answer."""


class Service:
    """Answers requests with one model, within the limits of the server.

    Args:
        options: The model, the method and further options of all answers.
        settings: The settings of the server.
    """

    def __init__(self, options: Options, settings: ServerSettings) -> None:
        self.options = options
        self.settings = settings
        self.guard = Guard(settings)
        self.metrics = Metrics()
        self.model = settings.served_name or _public_name(source_name(options.model))
        choices = Choices(settings, options.decoding)
        self.bodies = BodyReader({self.model}, choices, options.n, settings.max_choices)

    @property
    def engine(self) -> Engine:
        """The engine; a new one if the last one was closed."""
        return self.options.engine_for({}, self)

    def load(self) -> None:
        """Load the models now instead of at the first request."""
        self.engine.loaded()
        if self.options.reward is not None and self.options.decoding.needs_reward:
            self.engine.score(self.options.reward, "Hello", ["Hello"])

    def inspect(self) -> EngineState:
        """Return the state of the engine."""
        return self.engine.inspect()

    def close(self) -> None:
        """End running requests, and free the models."""
        Engine.release(self)

    def read(self, endpoint: Endpoint, content: bytes, headers: Mapping[str, str]) -> tuple[Call, list[Request]]:
        """Read a client's call, and make the requests of the engine for it.

        Args:
            endpoint: Whether it is a chat or a completion.
            content: The body.
            headers: The headers.

        Returns:
            The call, and `n` requests for each prompt, each with its own seed.

        Raises:
            ApiError, CardsError: A field cannot be used as given, or a prompt is too long.
        """
        call = self.bodies.read(endpoint, content, headers)
        for prompt in call.prompts:
            self._check_length(prompt)
        found = [request for prompt in call.prompts for request in self.options.requests(prompt, call.options)]
        return call, [replace(request, timeout=self._time(request)) for request in found]

    async def answers(self, endpoint: Endpoint, requests: Sequence[Request]) -> AsyncGenerator[Item, None]:
        """Write all answers in the engine's batch; closing the generator stops the drafting.

        Yields:
            Each kept segment, and each answer once it is whole.

        Raises:
            ApiError: Too many answers are being written (HTTP 429).
            CardsError: An answer failed.
        """
        with self.metrics.request(endpoint) as watch, self.guard.answering(len(requests)):
            inbox: asyncio.Queue[tuple[int, Chunk | Future[Alignment]]] = asyncio.Queue()
            writing = self._begin(requests, inbox)
            try:
                for _ in writing:
                    while not isinstance((found := await inbox.get())[1], Future):
                        self.metrics.segment(endpoint, watch, found[1])
                        yield found  # type: ignore[misc]
                    answer = found[1].result()
                    self.metrics.answer(answer)
                    yield found[0], answer
            finally:
                for future in writing:
                    future.cancel()

    def _begin(self, requests: Sequence[Request], inbox: asyncio.Queue[Any]) -> list[Future[Alignment]]:
        """Submit requests to the engine, which puts their segments and results into the inbox, with their indices."""
        loop, engine = asyncio.get_running_loop(), self.engine

        def put(index: int, item: Chunk | Future[Alignment]) -> None:
            with suppress(RuntimeError):  # the server's loop is gone
                loop.call_soon_threadsafe(inbox.put_nowait, (index, item))

        found = [engine.submit(request, partial(put, index)) for index, request in enumerate(requests)]
        for index, future in enumerate(found):
            future.add_done_callback(partial(put, index))
        return found

    def _check_length(self, prompt: str | list[Message]) -> None:
        """Refuse a prompt that is far too long here: the engine would encode it in the thread of all requests."""
        texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        if sum(map(len, texts)) > LONG:
            model = self.engine.loaded()
            check_length(sum(len(model.chat.encode(text)) for text in texts), 1, model.context_window)

    def _time(self, request: Request) -> float:
        """Return how many seconds an answer may take."""
        limit = self.settings.timeout
        return min(request.timeout or limit, limit)


def _public_name(name: str) -> str:
    """Return the name of a model without its directory, which clients should not see."""
    return Path(name).name if is_directory(name) or name.endswith(".gguf") else name
