"""LlamaIndex's streams: closing one stops the drafting, and each kept segment is an event."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Iterable
from contextlib import aclosing, closing
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, TypeVar

from llama_index.core.base.llms.types import ChatResponse, CompletionResponse
from llama_index.core.instrumentation.events import BaseEvent
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.span import active_span_id
from pydantic import BaseModel

from cards_integrations.engine.engine import Engine
from cards_integrations.engine.request import Chunk, Request
from cards_integrations.llama_index.growing import GrowingObject
from cards_integrations.trace import Alignment, InvalidToolCall, ToolCall

dispatcher = get_dispatcher(__name__)
Response = TypeVar("Response", ChatResponse, CompletionResponse)
Method = TypeVar("Method", bound=Callable[..., Any])


class CardsSegmentEvent(BaseEvent):
    """An event of LlamaIndex's instrumentation: a segment was kept."""

    segment: int
    """Index of the segment in the answer, from 0."""

    text: str
    """Text of the segment."""

    reward: float | None
    """Reward of the answer up to the end of the segment; None if nothing was scored."""

    threshold: float | None
    """Reward that the segment was compared with; None if the method has no threshold."""

    drafts: list[dict[str, Any]]
    """All candidates in order, each with its "text", "reward", "threshold" and "verdict"."""

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex serializes it."""
        return "CardsSegmentEvent"


def send_segment(chunk: Chunk, span_id: str | None = None) -> None:
    """Send the event of a kept segment, within the given span instead of the active one."""
    span = {} if span_id is None else {"span_id": span_id}
    dispatcher.event(CardsSegmentEvent(segment=chunk.number, **chunk.segment.summary(), **span))


async def asend_segment(chunk: Chunk) -> None:
    """Async version of `send_segment`."""
    send_segment(chunk)


def closing_callback(callback: Callable[[], Any]) -> Callable[[Method], Method]:
    """Decorate a method that streams with one of LlamaIndex's callbacks; closing its stream stops the drafting.

    The callbacks wrap the stream that a method returns in another one. Closing only the outer one would leave the
    method's own stream open as long as an event handler holds the exception.
    """

    def decorate(method: Method) -> Any:
        def stream(self: Any, *args: Any, **kwargs: Any) -> Any:
            inner: list[Any] = []

            def capture(*args: Any, **kwargs: Any) -> Any:
                inner.append(method(*args, **kwargs))
                return inner[0]

            return _close_both(callback()(capture)(self, *args, **kwargs), inner[0])

        async def astream(self: Any, *args: Any, **kwargs: Any) -> Any:
            inner: list[Any] = []

            async def capture(*args: Any, **kwargs: Any) -> Any:
                inner.append(await method(*args, **kwargs))
                return inner[0]

            return _aclose_both(await callback()(capture)(self, *args, **kwargs), inner[0])

        return wraps(method)(astream if iscoroutinefunction(method) else stream)

    return decorate


def stream_responses(
    engine: Engine, request: Request, respond: Callable[..., Response]
) -> Generator[Response, None, None]:
    """Yield the growing responses of one answer, made by `respond`: a function of `convert`."""
    return _responses(engine.stream(request), GrowingResponse(respond, active_span_id.get()))


def astream_responses(
    engine: Engine, request: Request, respond: Callable[..., Response]
) -> AsyncGenerator[Response, None]:
    """Async version of `stream_responses`."""
    return _aresponses(engine.astream(request), GrowingResponse(respond, active_span_id.get()))


def stream_objects(responses: Iterable[ChatResponse], output_cls: type[BaseModel]) -> Generator[Any, None, None]:
    """Yield growing objects of a pydantic class, in which missing fields are None.

    Raises:
        AnswerCut: `max_tokens` cut the answer.
    """
    growing = GrowingObject(output_cls)
    for response in responses:
        yield growing.add(response)


async def astream_objects(
    responses: AsyncIterable[ChatResponse], output_cls: type[BaseModel]
) -> AsyncGenerator[Any, None]:
    """Async version of `stream_objects`."""
    growing = GrowingObject(output_cls)
    async for response in responses:
        yield growing.add(response)


class GrowingResponse:
    """The text and calls of a stream so far; each response has all of them, and what is new."""

    def __init__(self, respond: Callable[..., Any], span_id: str | None) -> None:
        self.respond = respond
        self.span_id = span_id  # of the call: the stream is read outside of it
        self.text = self.thoughts = ""
        self.calls: list[ToolCall | InvalidToolCall] = []

    def add(self, item: Chunk | Alignment) -> Any:
        """Return the response after this item; None while all of a segment is held back."""
        if isinstance(item, Alignment):
            return self.respond(item, delta="")
        if item.thought is None:
            send_segment(item, self.span_id)
        self.thoughts += item.thought or ""
        self.text += item.text
        self.calls += item.calls
        if not (item.text or item.calls or item.thought):
            return None
        return self.respond(item, self.text, item.text, self.calls, self.thoughts)


def _responses(items: Generator[Chunk | Alignment, None, None], growing: GrowingResponse) -> Generator[Any, None, None]:
    with closing(items):
        for item in items:
            if (response := growing.add(item)) is not None:
                yield response


async def _aresponses(
    items: AsyncGenerator[Chunk | Alignment, None], growing: GrowingResponse
) -> AsyncGenerator[Any, None]:
    async with aclosing(items):
        async for item in items:
            if (response := growing.add(item)) is not None:
                yield response


def _close_both(outer: Generator[Response, None, None], inner: Any) -> Generator[Response, None, None]:
    with closing(inner):
        yield from outer


async def _aclose_both(outer: AsyncGenerator[Response, None], inner: Any) -> AsyncGenerator[Response, None]:
    async with aclosing(inner), aclosing(outer):
        async for response in outer:
            yield response
