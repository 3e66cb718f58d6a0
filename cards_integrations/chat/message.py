"""The one form of a chat message that the core knows."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]
"""`role` (system, user, assistant, tool) and `content`, a text; with tools also `tool_calls`, `tool_call_id` and
`name`, as chat templates take them."""

PARTIAL_CHARACTER = "\ufffd"
"""What a tokenizer decodes to where a text ends within a character, whose other bytes are still to come."""
