"""Answers that are JSON: an instruction shows the schema to the model, and a grammar holds the answer to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from cards_integrations.chat.grammar import Grammar, as_json
from cards_integrations.chat.message import Message, with_instruction
from cards_integrations.chat.pydantic_schema import pydantic_schema
from cards_integrations.chat.template import FormattedPrompt, as_messages
from cards_integrations.errors import SettingsError, short_repr

INSTRUCTION = "Answer with a JSON object that this JSON schema describes:\n{schema}"


@dataclass(frozen=True)
class ResponseFormat:
    """A JSON object that matches `schema`; without one, any object, and the prompt has to say which."""

    schema: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _ = self.grammar  # raises if it is no schema

    @property
    def grammar(self) -> Grammar:
        """What the answer may be."""
        return Grammar.json_schema({"type": "object"} if self.schema in (None, {}) else self.schema)

    def instruct(self, prompt: str | list[Message]) -> str | list[Message]:
        """The prompt with the schema in its system message, unless it is formatted already."""
        if self.schema is None or isinstance(prompt, FormattedPrompt):
            return prompt
        instruction = INSTRUCTION.format(schema=as_json(self.schema, "response_format"))
        return with_instruction(as_messages(prompt), instruction)


def as_response_format(value: Any) -> ResponseFormat | None:
    """A format from OpenAI's `response_format`, a JSON schema or a pydantic class; None for plain text."""
    if value is None or isinstance(value, ResponseFormat):
        return value
    if isinstance(value, type) and issubclass(value, BaseModel):
        return ResponseFormat(pydantic_schema(value))
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
