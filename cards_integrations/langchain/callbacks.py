"""What LangChain's callbacks are told of an answer: every new chunk, and every kept segment as a custom event.

An event needs the run that it belongs to. LangChain passes the manager of the run to `_generate` but not to `_stream`,
which therefore finds it in a context variable.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import aclosing, closing
from contextvars import ContextVar
from typing import Any, TypeVar

from langchain_core.callbacks import AsyncCallbackManager, CallbackManager
from langchain_core.callbacks.manager import RunManager
from langchain_core.outputs import ChatGenerationChunk, GenerationChunk
from langchain_core.runnables import RunnableConfig, ensure_config
from langchain_core.utils.uuid import uuid7

from cards_integrations.engine.request import Chunk
from cards_integrations.trace import Alignment

SEGMENT_EVENT = "cards_segment"
T = TypeVar("T")
OutputChunk = TypeVar("OutputChunk", ChatGenerationChunk, GenerationChunk)
current_run: ContextVar[Any] = ContextVar("current_run", default=None)
"""The manager of the run that is about to call `_stream`."""


def pop_current_run() -> Any:
    """Return the manager of the current run, and reset the variable so that it does not outlive the run."""
    run = current_run.get()
    current_run.set(None)
    return run


def start_run(config: RunnableConfig | None, model: Any) -> tuple[RunnableConfig, RunManager]:
    """Return a config that sets the id of the run, and a manager that sends events under this id."""
    config = ensure_config(config)
    run_id = config.get("run_id") or uuid7()
    config["run_id"] = run_id
    manager = CallbackManager.configure(
        config.get("callbacks"), model.callbacks, model.verbose, config.get("tags"), model.tags,
        config.get("metadata"), model.metadata,
    )  # fmt: skip
    run = RunManager(
        run_id=run_id, handlers=manager.handlers, inheritable_handlers=[], tags=manager.tags,
        metadata=manager.metadata,
    )  # fmt: skip
    return config, run


def within_run(run: RunManager, items: Iterator[T]) -> Iterator[T]:
    """Yield the items; the run is the current one while each is made, but not in between."""
    while True:
        token = current_run.set(run)
        try:
            item = next(items)
        except StopIteration:
            return
        finally:
            current_run.reset(token)
        yield item


async def awithin_run(run: RunManager, items: AsyncIterator[T]) -> AsyncIterator[T]:
    """Async version of `within_run`."""
    while True:
        token = current_run.set(run)
        try:
            item = await anext(items)
        except StopAsyncIteration:
            return
        finally:
            current_run.reset(token)
        yield item


def segment_callback(run: Any) -> Callable[[Chunk], None] | None:
    """Return a function that sends a kept segment to the callbacks of a run; None if there are no callbacks."""
    if run is None or not run.handlers:
        return None
    manager = CallbackManager(run.handlers, tags=run.tags, metadata=run.metadata)
    return lambda chunk: manager.on_custom_event(SEGMENT_EVENT, _segment_data(chunk), run_id=run.run_id)


def asegment_callback(run: Any) -> Callable[[Chunk], Awaitable[None]] | None:
    """Async version of `segment_callback`."""
    if run is None or not run.handlers:
        return None
    manager = AsyncCallbackManager(run.handlers, tags=run.tags, metadata=run.metadata)
    return lambda chunk: manager.on_custom_event(SEGMENT_EVENT, _segment_data(chunk), run_id=run.run_id)


def stream_chunks(
    items: Generator[Chunk | Alignment, None, None],
    convert: Callable[[Chunk | Alignment], OutputChunk | None],
    run_manager: Any,
    on_segment: Callable[[Chunk], None] | None = None,
) -> Iterator[OutputChunk]:
    """Yield the engine's items as LangChain's chunks; the callbacks see each of them first."""
    with closing(items):
        for item in items:
            if on_segment and isinstance(item, Chunk) and item.thought is None:
                on_segment(item)
            if (chunk := convert(item)) is not None:
                if run_manager:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk


async def astream_chunks(
    items: AsyncGenerator[Chunk | Alignment, None],
    convert: Callable[[Chunk | Alignment], OutputChunk | None],
    run_manager: Any,
    on_segment: Callable[[Chunk], Awaitable[None]] | None = None,
) -> AsyncIterator[OutputChunk]:
    """Async version of `stream_chunks`."""
    async with aclosing(items):
        async for item in items:
            if on_segment and isinstance(item, Chunk) and item.thought is None:
                await on_segment(item)
            if (chunk := convert(item)) is not None:
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk


def _segment_data(chunk: Chunk) -> dict[str, Any]:
    return {"segment": chunk.number, **chunk.segment.summary()}
