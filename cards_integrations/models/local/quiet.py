"""transformers without its bars and remarks, in the thread that loads for this package and in no other."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LOGGERS = ("transformers", "sentence_transformers", "peft", "huggingface_hub")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Let transformers show and say nothing but errors inside the block.

    Its bars and its handlers belong to the process, and what other threads do with them goes on as before.
    """
    from transformers.utils.logging import EmptyTqdm, set_tqdm_hook

    thread = threading.get_ident()

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if threading.get_ident() == thread:
            return EmptyTqdm(*args, **options)
        return before(factory, args, options) if before is not None else factory(*args, **options)

    def passes(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.levelno >= logging.ERROR

    before = set_tqdm_hook(hook)
    handlers = [handler for name in LOGGERS for handler in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(passes)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(passes)
        if (now := set_tqdm_hook(before)) is not hook:  # somebody has set another since
            set_tqdm_hook(now)
