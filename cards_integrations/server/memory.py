"""Returns memory that the process no longer uses to the operating system."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

M_ARENA_MAX = -8  # of glibc's malloc.h


def share_one_heap() -> None:
    """Let all threads allocate from one heap, so that what one of them has freed serves the others.

    By default, glibc gives each thread a heap of its own, so drafting could not use what loading has freed. Call this
    before threads begin. It has no effect with other C libraries.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def give_back_unused() -> None:
    """Give free memory, such as loading and the steps of many requests leave, back to the operating system.

    It has no effect with C libraries other than glibc.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def giving_back(every: float) -> Iterator[None]:
    """Call `give_back_unused` every so many seconds, in a thread of its own, while the block runs."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(every):
            give_back_unused()

    threading.Thread(target=work, name="cards-memory", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
