"""Stop strings, which may span tokens and segments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StopStrings:
    """Strings that end an answer, and are not part of it."""

    strings: tuple[str, ...] = ()
    """The strings."""

    within: Callable[[str], bool] | None = None
    """Returns True for a text that no stop string ends, such as one in the middle of a tool call."""

    def __bool__(self) -> bool:
        return bool(self.strings)

    def find(self, text: str, start: int = 0) -> int | None:
        """Return where the first stop string that ends after `start` begins; None if there is none."""
        at = self._next(text, start, 0)
        while at is not None and self.within is not None and self.within(text[:at]):
            at = self._next(text, start, at + 1)
        return at

    def _next(self, text: str, start: int, begin: int) -> int | None:
        found = [text.find(s, max(begin, start - len(s) + 1)) for s in self.strings]
        return min((at for at in found if at >= 0), default=None)

    def held_back(self, text: str) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        longest = 0
        for stop in self.strings:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
