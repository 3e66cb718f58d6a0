"""The routes of the server, and how replies are sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import anyio
from prometheus_client import CONTENT_TYPE_LATEST
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cards_integrations.server.call import Call, Endpoint
from cards_integrations.server.errors import ApiError, as_api_error
from cards_integrations.server.replies import ChatReply, Reply, TextReply, as_json
from cards_integrations.server.service import Item, Service
from cards_integrations.server.settings import ServerSettings
from cards_integrations.settings import Options
from cards_integrations.trace import Alignment

T = TypeVar("T")
Handler = Callable[[Service, HttpRequest], Awaitable[Response]]
REPLIES: dict[Endpoint, type[Reply]] = {"chat": ChatReply, "completions": TextReply}
OWNER = "cards-integrations"
PING_SECONDS = 15.0  # of silence, after which a stream sends a comment, so that proxies keep it open


class ClientGone(Exception):
    """The client has closed the connection."""


def create_app(options: Options, settings: ServerSettings | None = None) -> Starlette:
    """Make the server as an ASGI application. The models are loaded at the first request, or by `Service.load`.

    Args:
        options: The model, the method, the reward and further options of all answers.
        settings: The settings of the server; by default those of `ServerSettings`.

    Returns:
        The application, whose `Service` is `app.state.service`.
    """
    service = Service(options, settings or ServerSettings())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", _route(service, "chat", partial(answer, endpoint="chat")), methods=["POST"]),
            Route(
                "/v1/completions",
                _route(service, "completions", partial(answer, endpoint="completions")),
                methods=["POST"],
            ),
            Route("/v1/models", _route(service, "models", models)),
            Route("/v1/models/{name:path}", _route(service, "models", model)),
            Route("/health", _route(service, "health", health, guarded=False)),
            Route("/metrics", _route(service, "metrics", metrics, guarded=False)),
        ],
        exception_handlers={HTTPException: _not_found},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


# --- the routes ---


async def answer(service: Service, request: HttpRequest, endpoint: Endpoint) -> Response:
    """Reply to /v1/chat/completions and /v1/completions."""
    with service.metrics.counting_refusal(endpoint):
        service.guard.check_load()
        content = await service.guard.body(request)
        call, requests = await asyncio.to_thread(service.read, endpoint, content, request.headers)
    reply = REPLIES[endpoint](service.model, call.trace, call.include_usage)
    items = service.answers(endpoint, requests)
    if not call.stream:
        return await until_gone(request, _whole(reply, call, items))
    try:
        first = await until_gone(request, _first(items))  # errors before it have a status of their own
    except BaseException:
        await items.aclose()
        raise
    return Stream(_events(reply, call, first, items), items, reply.id, service.settings)


async def models(service: Service, request: HttpRequest) -> Response:
    """Reply to /v1/models."""
    return _json({"object": "list", "data": [_model(service)]})


async def model(service: Service, request: HttpRequest) -> Response:
    """Reply to /v1/models/NAME."""
    service.bodies.check_model(request.path_params["name"])
    return _json(_model(service))


async def health(service: Service, request: HttpRequest) -> Response:
    """Reply to /health: with 200 if requests are answered, or will be once the first one has loaded the model."""
    state = await asyncio.to_thread(service.inspect)
    return _json({"status": state.status}, 200 if state.status in ("new", "ready") else 503)


async def metrics(service: Service, request: HttpRequest) -> Response:
    """Reply to /metrics."""
    state = await asyncio.to_thread(service.inspect)
    return Response(service.metrics.text(service.guard.answers, state), media_type=CONTENT_TYPE_LATEST)


def _model(service: Service) -> dict[str, Any]:
    settings = service.settings
    own = {
        "decoding": service.options.decoding.method,
        "methods": list(settings.methods),
        "rewards": sorted(settings.rewards),
        "inline_rewards": list(settings.inline_rewards),
    }
    return {"id": service.model, "object": "model", "created": 0, "owned_by": OWNER, "cards": own}


# --- replies ---


class Stream(EventSourceResponse):
    """The events of a reply. However the stream ends, drafting ends with it.

    Args:
        events: The events to send.
        items: The generator of answers that they are made from, which is closed at the end.
        id: The id of the reply.
        settings: The time limits of the server.
    """

    def __init__(
        self,
        events: AsyncGenerator[dict[str, str], None],
        items: AsyncGenerator[Item, None],
        id: str,
        settings: ServerSettings,
    ) -> None:
        super().__init__(
            events,
            sep="\n",
            ping=PING_SECONDS,
            send_timeout=settings.timeout,
            shutdown_event=anyio.Event(),
            shutdown_grace_period=settings.grace,
            headers={"X-Request-Id": id},
        )
        self._items = items

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._items.aclose()


async def _whole(reply: Reply, call: Call, items: AsyncGenerator[Item, None]) -> Response:
    """Return all answers in one reply."""
    answers: dict[int, Alignment] = {}
    async with aclosing(items):
        async for index, item in items:
            if isinstance(item, Alignment):
                answers[index] = item
    return _json(reply.whole([answers[index] for index in sorted(answers)], len(call.prompts)), id=reply.id)


async def _first(items: AsyncGenerator[Item, None]) -> Item:
    """Return the first item, as a coroutine that `until_gone` can run."""
    return await anext(items)


async def _events(
    reply: Reply, call: Call, first: Item, items: AsyncGenerator[Item, None]
) -> AsyncGenerator[dict[str, str], None]:
    """Yield the events of a stream; an error after the first segment is the last of them."""
    answers: dict[int, Alignment] = {}
    async with aclosing(items):
        for opening in reply.openings(len(call.prompts) * call.n):
            yield _event(opening)
        try:
            async for index, item in _chain(first, items):
                if isinstance(item, Alignment):
                    answers[index] = item
                    yield _event(reply.closing(index, item))
                elif (piece := reply.piece(index, item)) is not None:
                    yield _event(piece)
        except Exception as error:
            yield _event(as_api_error(error).body)
            return
        if call.include_usage:
            whole = [answers[index] for index in sorted(answers)]
            yield _event(reply.final_usage(whole, len(call.prompts)))
        yield {"data": "[DONE]"}


async def _chain(first: Item, rest: AsyncGenerator[Item, None]) -> AsyncIterator[Item]:
    yield first
    async for item in rest:
        yield item


async def until_gone(request: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine and return its result; cancel it if the client goes away.

    Raises:
        ClientGone: The client has closed the connection.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(value: dict[str, Any]) -> dict[str, str]:
    return {"data": as_json(value).decode()}


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None, id: str | None = None) -> Response:
    named = {"X-Request-Id": id} if id else {}
    return Response(as_json(value), status, {**(headers or {}), **named}, media_type="application/json")


def _route(
    service: Service, name: str, handler: Handler, guarded: bool = True
) -> Callable[[HttpRequest], Awaitable[Response]]:
    """Return a handler that replies to errors in OpenAI's form, and asks for the API key if it is guarded."""

    async def handle(request: HttpRequest) -> Response:
        try:
            if guarded:
                with service.metrics.counting_refusal(name):
                    service.guard.check_key(request)
            return await handler(service, request)
        except ClientGone:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            return _refusal(as_api_error(error))

    return handle


def _refusal(error: ApiError) -> Response:
    return _json(error.body, error.status, error.headers)


async def _not_found(request: HttpRequest, error: Exception) -> Response:
    """Reply to a path that is no route, or to a method that its route does not have."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    return _refusal(ApiError(status, f"{request.method} {request.url.path}: there is no such endpoint here."))
