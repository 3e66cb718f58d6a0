"""The server's work: calls to requests of the engine, and what comes out of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
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

LONG = 100_000  # characters, which take a tokenizer some tens of milliseconds
Item = tuple[int, Chunk | Alignment]
"""The number of an answer, and a kept segment of it or, at its end, all of it."""


class Service:
    """One model and its limits.

    Args:
        options: The model, the method and what else answers have in common.
        settings: What is about the server.
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
        """The engine; a new one if it was closed."""
        return self.options.engine_for({}, self)

    def load(self) -> None:
        """Load the models now instead of at the first request."""
        self.engine.loaded()
        if self.options.reward is not None and self.options.decoding.needs_reward:
            self.engine.score(self.options.reward, "Hello", ["Hello"])

    def inspect(self) -> EngineState:
        """What lives in the engine."""
        return self.engine.inspect()

    def close(self) -> None:
        """End what runs, and free the models."""
        Engine.release(self)

    def requests(self, call: Call) -> list[Request]:
        """The engine's requests for a call: `n` for each prompt, each with a seed of its own.

        Raises:
            CardsError: An option cannot be used as given, or a prompt is too long.
        """
        for prompt in call.prompts:
            self._check_length(prompt)
        found = [request for prompt in call.prompts for request in self.options.requests(prompt, call.options)]
        return [replace(request, timeout=self._time(request)) for request in found]

    async def answers(self, endpoint: Endpoint, requests: Sequence[Request]) -> AsyncGenerator[Item, None]:
        """Write all answers in the engine's batch; closing the generator stops the drafting.

        Yields:
            Their kept segments, and each answer when it is whole.
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
        """Hand requests to the engine; what comes of them is put into the inbox, with their numbers."""
        loop, engine = asyncio.get_running_loop(), self.engine

        def put(index: int, item: Chunk | Future[Alignment]) -> None:
            with suppress(RuntimeError):  # the server's loop is gone
                loop.call_soon_threadsafe(inbox.put_nowait, (index, item))

        found = [engine.submit(request, partial(put, index)) for index, request in enumerate(requests)]
        for index, future in enumerate(found):
            future.add_done_callback(partial(put, index))
        return found

    def _check_length(self, prompt: str | list[Message]) -> None:
        """Refuse here what is far too long: the engine reads prompts in the thread that all requests share."""
        texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        if sum(map(len, texts)) > LONG:
            model = self.engine.loaded()
            check_length(sum(len(model.chat.encode(text)) for text in texts), 1, model.context_window)

    def _time(self, request: Request) -> float:
        """Seconds that an answer may take."""
        limit = self.settings.timeout
        return min(request.timeout or limit, limit)


def _public_name(name: str) -> str:
    """The last part of a path: where a model lies is nobody's business."""
    return Path(name).name if is_directory(name) or name.endswith(".gguf") else name
