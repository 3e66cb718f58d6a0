"""Reads an answer with marked calls from left to right, and tells calls from markers that are only mentioned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from cards_integrations.chat.stop_strings import StopStrings
from cards_integrations.chat.thoughts import next_thought


@dataclass
class SplitAnswer:
    """An answer, or its beginning, taken apart.

    Attributes:
        content: The text beside the calls.
        calls: The text of each call, without its markers.
        final: The number of calls, from the first one on, that no later text can change.
        certain: The length of the beginning that cannot turn out to belong to a call, in characters.
    """

    content: str = ""
    calls: list[str] = field(default_factory=list)
    final: int = 0
    certain: int = 0


class Markers(Protocol):
    """How a format marks its calls."""

    opening: ClassVar[str]
    closing: ClassVar[str]

    def begins_call(self, text: str, start: int) -> bool:
        """True if the text from `start` on, after an opening, can only be a call."""

    def call_end(self, text: str, start: int) -> int | None:
        """Return where the call that begins at `start` ends; None if it does not end, or not yet."""


class CallScanner:
    """Reads one text.

    An opening begins a call if JSON follows. Otherwise it begins a malformed call if a closing follows, and it stands
    at the beginning of a line or a tool's name comes before the closing. All other openings, and all within thoughts,
    are only mentioned: they are text.

    Args:
        text: The answer, or its beginning.
        markers: The format.
        names: Those of the tools.
    """

    def __init__(self, text: str, markers: Markers, names: Sequence[str]) -> None:
        self.text = text
        self.markers = markers
        self.names = names
        held_back = StopStrings((markers.opening,)).held_back(text)
        self.found = SplitAnswer(certain=len(text[: len(text) - held_back].rstrip()))
        self._at = 0  # the text before this index has been read
        self._line = 0  # the end of the last call or thought: what follows it counts as a new line
        self._sure = True  # False after the first part that later text could change

    def scan(self) -> SplitAnswer:
        """Return the text taken apart."""
        while (start := self.text.find(self.markers.opening, self._at)) >= 0:
            if self._passed_thought(start):
                continue
            begin = start + len(self.markers.opening)
            is_call = self._is_call(start, begin)
            if is_call is not False:
                self._limit_certain(start)
            if is_call or (is_call is None and self._is_malformed_call(start, begin)):
                self._call(start, begin)
            else:
                self._say(begin)
        self._say(len(self.text))
        return self.found

    def _limit_certain(self, start: int) -> None:
        """Note that the text from here on may belong to a call; so may the blanks before it."""
        self.found.certain = min(self.found.certain, len(self.text[:start].rstrip()))

    def _say(self, end: int) -> None:
        """Read up to `end` as content."""
        self.found.content += self.text[self._at : end]
        self._at = end

    def _passed_thought(self, start: int) -> bool:
        """Read the thought that begins before this opening, if there is one; True if it was read.

        A thought that is not closed is one only at the beginning of the answer.
        """
        thought = next_thought(self.text, self._at)
        if thought is None or thought.begin > start:
            return False
        if thought.end is None and self.text[: thought.begin].strip():
            self._sure = False  # it may be closed yet
            self._limit_certain(start)
            return False
        self._say(len(self.text) if thought.end is None else thought.end)
        self._line = self._at
        return True

    def _is_call(self, start: int, begin: int) -> bool | None:
        """Return whether an opening begins a call; None if it depends on text that is still to come."""
        if self.markers.begins_call(self.text, begin):
            return True
        closing = self.text.find(self.markers.closing, begin) if self.markers.closing else -1
        another = self.text.find(self.markers.opening, begin)
        if another >= 0 and not 0 <= closing < another:
            return False
        if closing < 0:
            self._sure = False
            return None
        return self._begins_line(start) or any(name in self.text[begin:closing] for name in self.names)

    def _is_malformed_call(self, start: int, begin: int) -> bool:
        """True if an opening that the text so far leaves undecided counts as the beginning of a call."""
        return self._begins_line(start) and not (self.markers.closing and self.text[begin:].strip())

    def _begins_line(self, start: int) -> bool:
        line = max(self._line, self.text.rfind("\n", 0, start) + 1)
        return not self.text[line:start].strip()

    def _call(self, start: int, begin: int) -> None:
        """Read one call, or several between one pair of markers."""
        self._say(start)
        end = self._one_call(begin)
        while self.markers.closing and self.text[end:].lstrip(" \n\t,;").startswith("{"):
            end = self._one_call(self.text.index("{", end))
        rest = self.text[end:].lstrip()
        self._at = self._line = len(self.text) - len(rest.removeprefix(self.markers.closing))

    def _one_call(self, begin: int) -> int:
        """Add a call to those found, and return where it ends."""
        end = self.markers.call_end(self.text, begin)
        if end is None:  # what follows may be part of it
            self._sure = False
            end = self.text.find(self.markers.closing, begin) if self.markers.closing else -1
            end = len(self.text) if end < 0 else end
        self.found.final += self._sure
        self.found.calls.append(self.text[begin:end].strip())
        return end
