"""Whether a request may begin: its time, a row, and memory for its keys and values."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext

from cards_integrations.engine.preemption import Preemption
from cards_integrations.errors import CardsTimeout, PromptError, SettingsError
from cards_integrations.rewards.base import scoring
from cards_integrations.transformer.kv_memory import CacheNeed, KVMemory


class Admission:
    """Lets requests begin, first come first served.

    A request that a reward makes goes first: the requests that hold the rows and the memory wait for that reward.

    Args:
        max_rows: Requests that run at once.
        memory: The budget of all caches.
        preemption: The requests that hold memory, and those that had to give it back and come first.
    """

    def __init__(self, max_rows: int, memory: KVMemory, preemption: Preemption) -> None:
        self._rows = asyncio.Semaphore(max_rows)
        self._memory = memory
        self._preemption = preemption
        self._scores = 0  # groups of texts that are scored outside of any request: they hold memory, too
        self._turn = asyncio.Lock()  # held by the one that waits for memory

    @asynccontextmanager
    async def row(self) -> AsyncIterator[None]:
        """Hold one of the rows."""
        async with nullcontext() if scoring.get() else self._rows:
            yield

    @asynccontextmanager
    async def memory(self, soon: Sequence[CacheNeed], whole: Sequence[CacheNeed]) -> AsyncIterator[None]:
        """Wait until the caches have room for one more request, which must open its rows inside the block.

        Args:
            soon: Rows and columns that the request begins with.
            whole: Rows and columns that it takes if it writes all of `max_tokens`.

        Raises:
            OutOfMemory: The whole does not fit even alone, or no other request will free what it begins with.
        """
        if whole and self._memory.needed(whole) > self._memory.limit:
            raise self._memory.refusal(whole[0].columns)
        if not whole or scoring.get():
            await self._make_room(whole)
            yield
            return
        async with self._turn:
            while not self._has_room(soon):
                await self._wait(whole)
            yield

    def _has_room(self, needs: Sequence[CacheNeed]) -> bool:
        """True if there is memory, and no preempted request that comes first."""
        return not self._preemption.pending and self._fits(needs)

    def _fits(self, needs: Sequence[CacheNeed]) -> bool:
        return self._memory.admits(needs, self._preemption.promised)

    @asynccontextmanager
    async def memory_to_score(self, needs: Sequence[CacheNeed]) -> AsyncIterator[None]:
        """Wait for room to score texts outside of any request, as long as others may free some.

        The rows must be opened inside the block; once they are closed, `scored` must be called.
        """
        async with nullcontext() if scoring.get() else self._turn:
            while not self._fits(needs) and self._others_end():
                await self._next_change()
            yield
            self._scores += 1

    def scored(self) -> None:
        """Note that texts have been scored, and their rows closed."""
        self._scores -= 1
        self._preemption.freed.set()

    async def _wait(self, needs: Sequence[CacheNeed]) -> None:
        if not self._others_end():
            raise self._memory.refusal(needs[0].columns)
        await self._next_change()

    async def _make_room(self, needs: Sequence[CacheNeed]) -> None:
        """Make room for a request that a reward makes: preempt others, or wait for such a request that runs already.

        The requests that wait for the reward may hold all of the memory. So one request like this at a time may go
        beyond the budget, if the machine has the memory.
        """
        depth = scoring.get()
        while needs and not self._fits(needs):
            if self._preemption.preempt_newest():
                continue
            if not self._preemption.nested(depth):
                if not self._memory.machine_has(self._memory.needed(needs)):
                    raise self._memory.refusal(needs[0].columns)
                return
            await self._next_change()

    def _others_end(self) -> bool:
        """True if a request will free memory that does not itself wait for this one."""
        return bool(self._preemption.live or self._scores) and not scoring.get()

    async def _next_change(self) -> None:
        self._preemption.freed.clear()
        await self._preemption.freed.wait()


@asynccontextmanager
async def time_limit(seconds: float | None) -> AsyncIterator[None]:
    """Bound the time of a request.

    Args:
        seconds: The limit; None for no limit.

    Raises:
        CardsTimeout: The time is over.
    """
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise CardsTimeout(
            f"No answer within timeout={seconds} seconds: use a larger timeout, or a smaller max_tokens."
        ) from None


def check_length(prompt_tokens: int, max_tokens: int, window: int) -> None:
    """Check that prompt and answer fit into the model's context.

    Raises:
        PromptError: The prompt alone does not fit.
        SettingsError: `max_tokens` is too large for the rest.
    """
    if prompt_tokens >= window:
        raise PromptError(
            f"The prompt has {prompt_tokens} tokens, and the model's context is {window}. Shorten it by "
            f"{prompt_tokens - window + 1} tokens at least, and by those of the answer."
        )
    if prompt_tokens + max_tokens > window:
        raise SettingsError(
            f"max_tokens={max_tokens} does not fit: the prompt has {prompt_tokens} tokens, and the "
            f"model's context is {window}; the most that fits is {window - prompt_tokens}."
        )
