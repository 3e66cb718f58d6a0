"""Which run a kept segment belongs to: LangChain tells `_generate` of its run, but not `_stream`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

from langchain_core.callbacks import AsyncCallbackManager, CallbackManager
from langchain_core.callbacks.manager import RunManager
from langchain_core.runnables import RunnableConfig, ensure_config
from langchain_core.utils.uuid import uuid7

from cards_integrations.engine.request import Chunk

SEGMENT = "cards_segment"
T = TypeVar("T")
current: ContextVar[Any] = ContextVar("current_run", default=None)
"""The manager of the run that is about to call `_stream`."""


def taken() -> Any:
    """That manager, which is not kept longer than it is needed."""
    run = current.get()
    current.set(None)
    return run


def with_run(config: RunnableConfig | None, model: Any) -> tuple[RunnableConfig, RunManager]:
    """A config that says which id the run will have, and a manager that speaks in its name."""
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


def during(run: RunManager, items: Iterator[T]) -> Iterator[T]:
    """The items, each made while the run is the current one; between them it is not."""
    while True:
        token = current.set(run)
        try:
            item = next(items)
        except StopIteration:
            return
        finally:
            current.reset(token)
        yield item


async def aduring(run: RunManager, items: AsyncIterator[T]) -> AsyncIterator[T]:
    """Like `during`."""
    while True:
        token = current.set(run)
        try:
            item = await anext(items)
        except StopAsyncIteration:
            return
        finally:
            current.reset(token)
        yield item


def teller(run: Any) -> Callable[[Chunk], None] | None:
    """Tells the callbacks of a run of each kept segment, as the custom event `cards_segment`."""
    if run is None or not run.handlers:
        return None
    told = CallbackManager(run.handlers, tags=run.tags, metadata=run.metadata)
    return lambda chunk: told.on_custom_event(SEGMENT, _event(chunk), run_id=run.run_id)


def ateller(run: Any) -> Callable[[Chunk], Awaitable[None]] | None:
    """Like `teller`."""
    if run is None or not run.handlers:
        return None
    told = AsyncCallbackManager(run.handlers, tags=run.tags, metadata=run.metadata)
    return lambda chunk: told.on_custom_event(SEGMENT, _event(chunk), run_id=run.run_id)


def _event(chunk: Chunk) -> dict[str, Any]:
    return {"segment": chunk.number, **chunk.segment.summary()}
