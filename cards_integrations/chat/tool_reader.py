"""An answer that grows, read as what it says and what it calls."""

from __future__ import annotations

from cards_integrations.chat.tool_formats import ToolFormat
from cards_integrations.chat.tools import Reading, Tools
from cards_integrations.trace import InvalidToolCall, ToolCall


class ToolReader:
    """Reads the answer to one request. Without tools everything is said."""

    def __init__(self, tools: Tools | None, form: ToolFormat) -> None:
        self.tools = tools
        self.form = form
        self.said = 0
        self.called = 0

    def read(self, text: str) -> Reading:
        """The whole answer."""
        return Reading(text) if self.tools is None else self.form.read(text, self.tools)

    def new(self, text: str, finished: bool) -> tuple[str, tuple[ToolCall | InvalidToolCall, ...]]:
        """What is certain of this text, and was not at the call before: words, and whole calls."""
        reading = self.read(text)
        said, calls = reading.said, reading.calls
        if self.tools is not None and not finished:
            said = text[: self.form.certain(text)]
            calls = calls[: reading.sure]
        new = said[self.said :], calls[self.called :]
        self.said, self.called = max(self.said, len(said)), len(calls)
        return new
