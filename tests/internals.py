"""The one place where tests reach inside an engine: to break it, to hold it, or to watch it from within.

What lives in an engine is asked of `Engine.inspect()`; this is for what a reader of it cannot do.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import numpy as np

from cards_integrations.engine import Engine
from cards_integrations.engine.scheduler import Scheduler
from cards_integrations.engine.session import Session
from cards_integrations.engine.worker import Worker
from cards_integrations.rewards.base import RewardModel
from cards_integrations.transformer.kv_cache import TreeCache
from cards_integrations.transformer.kv_memory import KVMemory
from cards_integrations.transformer.prefix_tree import PrefixNode

T = TypeVar("T")


def worker(engine: Engine) -> Worker:
    """The engine's worker, with its models loaded."""
    engine.loaded()
    assert engine._worker is not None
    return engine._worker


def run_inside(engine: Engine, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
    """Run a coroutine in the engine's thread, between two steps."""
    return worker(engine).submit(work).result(timeout)


def language_model(engine: Engine) -> Any:
    """The language model, of whichever backend it is."""
    return engine.loaded()


def reward_models(engine: Engine) -> list[RewardModel]:
    """Those that are loaded now."""
    return list(worker(engine).rewards.built.values())


def reward_model(engine: Engine) -> Any:
    """The one that reads with a decoder of its own."""
    return next(model for model in reward_models(engine) if hasattr(model, "transformer"))


def sessions(engine: Engine) -> list[Session]:
    """The requests that are drafting."""
    return list(worker(engine).steps.live.values())


def memory(engine: Engine) -> KVMemory:
    return worker(engine).memory


def caches(engine: Engine) -> list[TreeCache]:
    """Those of the language model and of all reward models."""
    return memory(engine).caches


def scheduler(engine: Engine) -> Scheduler:
    return worker(engine).steps.scheduler


def replace_scheduler(engine: Engine, other: Scheduler) -> None:
    worker(engine).steps.scheduler = other


@contextmanager
def held(engine: Engine, timeout: float) -> Iterator[None]:
    """The engine's thread does nothing meanwhile; a model that is being loaded is loaded in another one."""
    go_on = threading.Event()
    with suppress(RuntimeError):  # its loop may be gone
        (engine._worker or worker(engine)).loop.call_soon_threadsafe(go_on.wait, timeout)
    try:
        yield
    finally:
        go_on.set()


def at_steps(engine: Engine, calls: dict[int, Callable[[], object]]) -> None:
    """Call something in the running event loop after the engine's n-th forward; the engine waits for its end."""
    loop, steps = asyncio.get_running_loop(), worker(engine).steps
    step = steps.step

    def watched() -> int:
        turns = step()
        for number in sorted(calls):
            if steps.stepwise is not None and steps.stepwise.steps >= number:
                asyncio.run_coroutine_threadsafe(_called(calls.pop(number)), loop).result(10)
        return turns

    steps.step = watched  # type: ignore[method-assign]


async def _called(call: Callable[[], object]) -> None:
    call()


def is_closed(engine: Engine) -> bool:
    """True from the moment on in which closing has begun; does not wait for the engine's thread."""
    return engine._closed


def assert_idle(engine: Engine) -> None:
    """Nothing runs, and no row, column or row of a mask is taken.

    A call of a reward model that was given up ends a moment after the answer that asked for it.
    """
    deadline = time.monotonic() + 5
    while (state := engine.inspect()).scoring and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state.status == "ready"
    assert state.idle, state
    for cache in caches(engine):
        balance(cache)
        assert_empty(cache)


def is_idle(engine: Engine) -> bool:
    """True if `assert_idle` would pass."""
    try:
        assert_idle(engine)
    except AssertionError:
        return False
    return True


def assert_empty(cache: TreeCache) -> None:
    """No row is taken, and only the block that is always there is left."""
    [block] = cache.blocks.values()
    assert not block.trees
    assert len(block.free_mask_rows) == len(block.visible)


def balance(cache: TreeCache) -> None:
    """Every row of a mask is a tree's or free; every column that a row has taken is on a path or free, never both."""
    rows = {block: [tree for tree in cache.trees if tree.block is block] for block in cache.blocks.values()}
    assert sum(map(len, rows.values())) == len(cache.trees)
    for columns, block in cache.blocks.items():
        mask_rows = [*block.free_mask_rows, *(row for tree in rows[block] for row in tree.mask_rows)]
        assert sorted(mask_rows) == list(range(len(block.visible)))
        assert block.visible.shape[1] == block.columns == columns
        assert len(block.trees) <= block.rows == len(block.positions)
        assert {*enumerate(block.trees)} == {(tree.row, tree) for tree in rows[block]}
        for tree in rows[block]:
            seen = np.flatnonzero(block.visible[sorted(tree.mask_rows)].any(0)).tolist()
            assert sorted([*seen, *tree.freed]) == list(range(1, tree.untouched))
            assert tree.untouched <= columns


def finished_texts(memory: KVMemory, cache: TreeCache) -> list[list[int]]:
    """Those that may be used again and do not go on in another, the least recently used first."""
    return [_text(node) for node, tree in memory._recent.items() if not node.children and tree is memory._texts(cache)]


def _text(node: PrefixNode) -> list[int]:
    return [*(_text(node.parent) if node.parent else []), *node.ids]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it without blocking the event loop."""
    for _ in range(20_000):
        if await asyncio.to_thread(condition):
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it never came true")


def wait_until(condition: Callable[[], bool]) -> None:
    """Like `until`, for a thread."""
    for _ in range(20_000):
        if condition():
            return
        threading.Event().wait(0.002)
    raise AssertionError("it never came true")
