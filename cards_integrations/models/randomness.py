"""Counter-based random numbers: every draft has its own stream, whatever else runs at the same time."""

from __future__ import annotations

import secrets

import numpy as np
from numpy.random import Generator, Philox

_WORD = 2**64


class Uniforms:
    """The uniforms in [0, 1) of one draft: `verdict` for its acceptance, then one for each token.

    The number for (seed, segment, draft, position) depends on nothing else: it is Philox with the seed as
    key, and segment and draft in the high words of its counter.

    Args:
        seed: The request's.
        segment: Index of the segment in the answer.
        draft: Index of the draft of this segment.
    """

    def __init__(self, seed: int, segment: int, draft: int) -> None:
        key = np.array([seed % _WORD, 0], dtype=np.uint64)
        counter = np.array([0, 0, draft, segment], dtype=np.uint64)
        self._stream = Generator(Philox(key=key, counter=counter))
        self.verdict = float(self._stream.random())
        self._tokens: list[float] = []

    def __getitem__(self, position: int) -> float:
        """Return the uniform of the draft's token at `position` (0 is its first)."""
        while len(self._tokens) <= position:
            self._tokens += self._stream.random(32).tolist()
        return self._tokens[position]


def fresh_seed() -> int:
    """Return a random seed, for a request that has none."""
    return secrets.randbelow(2**63)
