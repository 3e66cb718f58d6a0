"""Incremental parsing: the content and the calls of an answer that grows."""

from __future__ import annotations

from cards_integrations.chat.tool_formats import ToolFormat
from cards_integrations.chat.tools import ParsedAnswer, Tools
from cards_integrations.trace import InvalidToolCall, ToolCall


class ToolReader:
    """Reads the answer to one request.

    Args:
        tools: The tools that it may call; None if all of it is content.
        tool_format: How the model writes calls.
    """

    def __init__(self, tools: Tools | None, tool_format: ToolFormat) -> None:
        self.tools = tools
        self.tool_format = tool_format
        self._characters = 0  # of the content that `update` has returned
        self._calls = 0  # that `update` has returned

    def parse(self, text: str) -> ParsedAnswer:
        """Parse a whole answer."""
        return ParsedAnswer(text) if self.tools is None else self.tool_format.parse(text, self.tools)

    def in_call(self, text: str) -> bool:
        """True if a text ends in the middle of a call."""
        parsed, opening = self.parse(text), self.tool_format.opening
        return len(parsed.calls) > parsed.final_calls or bool(opening and text.rstrip().endswith(opening))

    def update(self, text: str, finished: bool) -> tuple[str, tuple[ToolCall | InvalidToolCall, ...]]:
        """Return the content and the complete calls that have been added since the last update.

        Args:
            text: The answer so far.
            finished: Whether it is whole; if not, what later text could change is held back.
        """
        parsed = self.parse(text)
        content, calls = parsed.content, parsed.calls
        if self.tools is not None and not finished:
            content = text[: parsed.certain]
            calls = calls[: parsed.final_calls]
        new = content[self._characters :], calls[self._calls :]
        self._characters, self._calls = max(self._characters, len(content)), len(calls)
        return new
