"""Counter-based random numbers: every draft has its own stream, whatever else runs at the same time."""

from __future__ import annotations

import secrets
from hashlib import sha256
from threading import local
from typing import Any

from numpy.random import Generator, Philox

_WORD = 2**64
_BLOCK = 4  # numbers of one value of the counter
_AT_ONCE = 9 * _BLOCK
_FRESH = {"bit_generator": "Philox", "buffer": (0, 0, 0, 0), "buffer_pos": _BLOCK, "has_uint32": 0, "uinteger": 0}


class _Source(local):
    """A generator for each thread: a forked child would wait for ever for a lock that another thread held."""

    def __init__(self) -> None:
        self.philox = Philox(0)  # its state is set for each use, which is several times faster than making one
        self.generator = Generator(self.philox)


_source = _Source()


class Uniforms:
    """The uniforms in [0, 1) of one draft: `verdict` for its acceptance, then one for each token.

    The number for (seed, segment, draft, position) depends on nothing else: it is Philox with the seed as its key, and
    segment and draft in the high words of its counter.

    Args:
        seed: The seed of the request.
        segment: Index of the segment in the answer.
        draft: Index of the draft of this segment.
    """

    def __init__(self, seed: int, segment: int, draft: int) -> None:
        self._key = seed % _WORD, 0
        self._place = draft, segment
        self._numbers: list[float] = []
        self.verdict = self[-1]

    def __getitem__(self, position: int) -> float:
        """Return the uniform of the draft's token at `position` (0 is its first)."""
        while len(self._numbers) < position + 2:
            self._numbers += self._following()
        return self._numbers[position + 1]

    def _following(self) -> list[float]:
        """Return the next numbers of the stream."""
        at = {"key": self._key, "counter": (len(self._numbers) // _BLOCK, 0, *self._place)}
        state: Any = _FRESH | {"state": at}
        _source.philox.state = state
        numbers: list[float] = _source.generator.random(_AT_ONCE).tolist()
        return numbers


def derived_seed(seed: int, purpose: str) -> int:
    """Return another seed for another purpose of the same request, such as its thoughts."""
    return int.from_bytes(sha256(f"{seed} {purpose}".encode()).digest()[:8]) >> 1


def fresh_seed() -> int:
    """Return a random seed, for a request that has none."""
    return secrets.randbelow(2**63)


def answer_seeds(seed: int, n: int) -> list[int]:
    """Return the seeds of several answers to one prompt: the first is the request's own, the others follow from it."""
    return [seed, *(derived_seed(seed, str(index)) for index in range(1, n))]
