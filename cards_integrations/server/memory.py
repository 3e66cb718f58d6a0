"""Memory that the process holds and nothing uses."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

M_ARENA_MAX = -8  # of glibc's malloc.h


def share_one_heap() -> None:
    """Let all threads allocate from one heap, so that what one of them has freed serves the others.

    By default glibc gives each thread a heap of its own, and what loading has freed would stay beside what drafting
    takes. It has to be called before threads begin. Only glibc has this call; elsewhere nothing happens.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def give_back_unused() -> None:
    """Let the C library give free memory back to the operating system: loading and the steps of many requests leave it.

    Only glibc has this call; elsewhere nothing happens.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def giving_back(every: float) -> Iterator[None]:
    """Give it back every so many seconds, in a thread of its own, as long as the block runs."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(every):
            give_back_unused()

    threading.Thread(target=work, name="cards-memory", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
