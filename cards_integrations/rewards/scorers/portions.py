"""Batches of texts that are read at once, so that no call takes all memory, and others get their turns in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from cards_integrations.transformer.forward import PREFILL_CHUNK


async def portions(lengths: Sequence[int], most: int = PREFILL_CHUNK) -> AsyncIterator[list[int]]:
    """Split texts by length into portions that are read one after another, padded to their longest.

    Args:
        lengths: How long each text is.
        most: Length of a portion, padding included; a longer text is one of its own.

    Yields:
        The indices of the texts of a portion. The event loop goes on between two of them.
    """
    portion: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if portion and (len(portion) + 1) * lengths[index] > most:
            yield portion
            await asyncio.sleep(0)
            portion = []
        portion.append(index)
    if portion:
        yield portion


def padded(tokenizer: Any, encoded: Any, rows: Sequence[int]) -> Any:
    """Return some rows of what a tokenizer has encoded as tensors, padded to the longest of them."""
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True  # it would rather encode them again
    return tokenizer.pad({name: [values[row] for row in rows] for name, values in encoded.items()}, return_tensors="pt")
