"""Memory that the process holds and nothing uses."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def give_back_unused() -> None:
    """Let the C library give free memory back to the operating system: loading a model leaves much of it.

    Only glibc has this call; elsewhere nothing happens.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
