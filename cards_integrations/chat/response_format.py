"""Answers that are JSON: the model is told, and the grammar holds it to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from cards_integrations.chat.grammar import Grammar, as_json
from cards_integrations.chat.message import Message
from cards_integrations.chat.template import Formatted, as_messages
from cards_integrations.chat.tool_prompts import told
from cards_integrations.errors import SettingsError, short_repr

TOLD = "Answer with a JSON object that this JSON schema describes:\n{schema}"


@dataclass(frozen=True)
class ResponseFormat:
    """A JSON object; with a `schema` one that it validates, and that the model is told of.

    Without a schema the prompt has to say what the object should hold.
    """

    schema: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _ = self.grammar  # refuses what is no schema

    @property
    def grammar(self) -> Grammar:
        return Grammar.json_schema({"type": "object"} if self.schema in (None, {}) else self.schema)

    def told(self, prompt: str | list[Message]) -> str | list[Message]:
        """The prompt with the schema in its system message, unless it is formatted already."""
        if self.schema is None or isinstance(prompt, Formatted):
            return prompt
        return told(as_messages(prompt), TOLD.format(schema=as_json(self.schema, "response_format")))


def as_response_format(value: Any) -> ResponseFormat | None:
    """From OpenAI's `response_format`, a JSON schema, or a pydantic class."""
    if value is None or isinstance(value, ResponseFormat):
        return value
    if isinstance(value, type) and issubclass(value, BaseModel):
        return ResponseFormat(value.model_json_schema())
    if isinstance(value, Mapping):
        kind = value.get("type")
        if kind == "text":
            return None
        if kind == "json_object":
            return ResponseFormat()
        if kind == "json_schema" and isinstance(value.get("json_schema"), Mapping):
            return ResponseFormat(value["json_schema"].get("schema"))
        return ResponseFormat(value)
    raise SettingsError(
        f"response_format={short_repr(value)}: pass a JSON schema, a pydantic class, or what OpenAI's API takes."
    )
