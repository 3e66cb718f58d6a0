"""Answers that are JSON: an instruction shows the schema to the model, and a grammar enforces it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from cards_integrations.chat.grammar import Grammar, as_json, json_rule
from cards_integrations.chat.message import Message, with_instruction
from cards_integrations.chat.pydantic_schema import pydantic_schema
from cards_integrations.chat.template import FormattedPrompt, as_messages
from cards_integrations.errors import SettingsError, short_repr

INSTRUCTION = "Answer with a JSON object that this JSON schema describes:\n{schema}"


@dataclass(frozen=True)
class ResponseFormat:
    """The answer is a JSON value that matches a schema, or any JSON object."""

    schema: Mapping[str, Any] | None = None
    """The JSON schema; None for any object, which the prompt has to describe."""

    def __post_init__(self) -> None:
        _ = self.grammar  # raises if no grammar can hold it

    @property
    def grammar(self) -> Grammar:
        """The grammar of the answer."""
        return Grammar("start: " + json_rule(self.schema or {"type": "object"}, "response_format"))

    @property
    def instruction(self) -> str:
        """What shows the schema to the model."""
        return INSTRUCTION.format(schema=as_json(self.schema, "response_format"))

    def instruct(self, prompt: str | list[Message]) -> str | list[Message]:
        """Return the prompt with the schema in its system message; as it is without a schema, or if it is formatted."""
        if self.schema is None or isinstance(prompt, FormattedPrompt):
            return prompt
        return with_instruction(as_messages(prompt), self.instruction)


def as_response_format(value: Any) -> ResponseFormat | None:
    """Return a format, given OpenAI's `response_format`, a JSON schema or a pydantic class; None for plain text.

    Raises:
        SettingsError: It is something else, or a schema that no grammar can express.
    """
    if value is None or isinstance(value, ResponseFormat):
        return value
    if isinstance(value, type) and issubclass(value, BaseModel):
        return ResponseFormat(pydantic_schema(value))
    if isinstance(value, Mapping):
        return _from_mapping(value)
    raise SettingsError(
        f"response_format={short_repr(value)}: pass a JSON schema, a pydantic class, or what OpenAI's API takes."
    )


def _from_mapping(value: Mapping[str, Any]) -> ResponseFormat | None:
    """Return the format of a mapping as the servers of OpenAI and llama.cpp take it, or of a schema itself."""
    match value.get("type"):
        case "text":
            return None
        case "json_object":
            given = {key for key in value if value[key] is not None}
            return ResponseFormat(_schema_in(value)) if given - {"type", "strict"} else ResponseFormat()
        case "json_schema":
            return ResponseFormat(_schema_in(value.get("json_schema", value)))
    return ResponseFormat(value)


def _schema_in(value: Any) -> Mapping[str, Any]:
    found = value.get("schema") if isinstance(value, Mapping) else None
    if isinstance(found, type) and issubclass(found, BaseModel):
        return pydantic_schema(found)
    if not isinstance(found, Mapping):
        raise SettingsError(f'response_format={short_repr(value)} has no JSON schema: pass it as "schema".')
    return found
