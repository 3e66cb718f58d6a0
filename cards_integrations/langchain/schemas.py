"""Both frameworks' tools and schemas to the one form of the core: functions as OpenAI describes them, JSON schemas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from llama_index.core.tools.types import BaseTool as LlamaIndexTool
from pydantic import BaseModel

from cards_integrations.errors import SettingsError, short_repr


def tool_schemas(tools: Sequence[Any] | None, strict: bool | None = None) -> list[dict[str, Any]]:
    """Of LangChain's and LlamaIndex's tools, functions, pydantic classes, typed dicts and schemas."""
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools or (), Sequence):
        raise SettingsError(f"tools={short_repr(tools)}: pass a list of them.")
    return [_tool_schema(tool, strict) for tool in tools or ()]


def _tool_schema(tool: Any, strict: bool | None) -> dict[str, Any]:
    if isinstance(tool, LlamaIndexTool):
        tool = tool.metadata.to_openai_tool(skip_length_check=True)
    try:
        found = convert_to_openai_tool(tool, strict=strict)
        if strict is not None:  # what is in OpenAI's form already comes back as it was
            found = {**found, "function": {**found["function"], "strict": strict}}
        return found
    except Exception as error:
        raise SettingsError(
            f"tools: {short_repr(tool)} cannot be described as a function: {str(error)[:500]}"
        ) from error


def json_schema(schema: Any) -> dict[str, Any]:
    """Of a pydantic class (v2 or v1), a typed dict, a function's description, or the JSON schema itself."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return schema.model_json_schema()
    if isinstance(schema, Mapping) and "title" not in schema and ("type" in schema or "$ref" in schema):
        return dict(schema)
    return convert_to_json_schema(schema)


def converted(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call, with its tools and classes as the core knows them: schemas."""
    found = dict(overrides)
    if found.get("tools"):
        found["tools"] = tool_schemas(found["tools"])
    for name in ("response_format", "grammar"):
        if isinstance(found.get(name), type) and issubclass(found[name], BaseModel):
            found[name] = json_schema(found[name])
    return found
