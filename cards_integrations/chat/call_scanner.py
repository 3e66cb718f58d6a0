"""Reading an answer with marked calls from left to right: what it says and calls, and where it only names a marker."""

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
        final: How many of the first calls no later text can change.
        certain: The length of the answer's beginning that cannot turn out to belong to a call, in characters.
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
        """True if what follows an opening can be nothing but a call."""

    def call_end(self, text: str, start: int) -> int | None:
        """Where the call that begins here ends; None if it does not, or not yet."""


class CallScanner:
    """Reads one text.

    An opening begins a call if JSON follows. Otherwise it is a call, though a wrong one, if a closing follows and it
    stands at the beginning of a line, or has a tool's name behind it. Every other opening is named only, and so are
    those within thoughts.

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
        self._at = 0  # what is before has been read
        self._line = 0  # where what was read last ends, if it was a call or a thought
        self._sure = True

    def scan(self) -> SplitAnswer:
        """Take the text apart."""
        while (start := self.text.find(self.markers.opening, self._at)) >= 0:
            if self._passed_thought(start):
                continue
            begin = start + len(self.markers.opening)
            is_call = self._is_call(start, begin)
            if is_call is not False:
                self._before(start)
            if is_call or (is_call is None and self._is_wrong_call(start, begin)):
                self._call(start, begin)
            else:
                self._say(begin)
        self._say(len(self.text))
        return self.found

    def _before(self, start: int) -> None:
        """Note that nothing from here on is certain to be said; neither are blanks before a call."""
        self.found.certain = min(self.found.certain, len(self.text[:start].rstrip()))

    def _say(self, end: int) -> None:
        self.found.content += self.text[self._at : end]
        self._at = end

    def _passed_thought(self, start: int) -> bool:
        """True if a thought begins before this opening and has been read; if it stays open, only at the beginning."""
        thought = next_thought(self.text, self._at)
        if thought is None or thought.begin > start:
            return False
        if thought.end is None and self.text[: thought.begin].strip():
            self._sure = False  # it may be closed yet
            self._before(start)
            return False
        self._say(len(self.text) if thought.end is None else thought.end)
        self._line = self._at
        return True

    def _is_call(self, start: int, begin: int) -> bool | None:
        """Whether an opening begins a call; None if what follows can still decide."""
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

    def _is_wrong_call(self, start: int, begin: int) -> bool:
        """Whether an opening that nothing decides any more was meant as a call."""
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
        """Note a call; returns where it ends."""
        end = self.markers.call_end(self.text, begin)
        if end is None:  # what follows may be part of it
            self._sure = False
            end = self.text.find(self.markers.closing, begin) if self.markers.closing else -1
            end = len(self.text) if end < 0 else end
        self.found.final += self._sure
        self.found.calls.append(self.text[begin:end].strip())
        return end
