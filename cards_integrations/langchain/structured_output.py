"""LangChain's `with_structured_output` for a model whose answers are held to a schema."""

# mypy: disable-error-code="name-defined"

from __future__ import annotations

import json
from operator import itemgetter
from typing import Any, Literal

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel

from cards_integrations.errors import SettingsError
from cards_integrations.langchain.schemas import json_schema, tool_schemas

Method = Literal["json_schema", "function_calling", "json_mode"]


class Whole:
    """A parser that does not take a beginning for the whole."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """What the answer holds; an `OutputParserException` if `max_tokens` cut it."""
        first = result[0]
        if isinstance(first, ChatGeneration) and _cut(first.message):  # of a stream, only the last chunk says so
            raise OutputParserException(
                "The answer was cut at max_tokens before it was whole; use a larger max_tokens.",
                llm_output=first.text,
            )
        return super().parse_result(result, partial=partial)  # type: ignore[misc]


class WholeJson(Whole, JsonOutputParser):
    """A dict."""


class WholePydantic(Whole, PydanticOutputParser[BaseModel]):
    """An object of a pydantic class."""


class WholeToolArguments(Whole, JsonOutputKeyToolsParser):
    """The arguments of a call as a dict."""


class WholeToolPydantic(Whole, PydanticToolsParser):
    """The arguments of a call as an object of a pydantic class."""


def structured(
    llm: Any, schema: Any, method: Method, include_raw: bool, strict: bool | None, options: dict[str, Any]
) -> Runnable[Any, Any]:
    """A chain of a chat model and the parser for what it is asked for."""
    if schema is None and method != "json_mode":
        raise SettingsError(f"with_structured_output: method={method!r} needs a schema.")
    traced = {"kwargs": {"method": method, "strict": strict}, "schema": schema}
    if schema is not None:
        traced["schema"] = json_schema(schema) if _untitled(schema) else convert_to_json_schema(schema)
    parser: BaseOutputParser[Any]
    if method == "function_calling":
        function = {"title": "answer", **schema} if _untitled(schema) else schema
        (tool,) = tool_schemas([function], strict)
        name = tool["function"]["name"]
        asked = llm.bind_tools(
            [tool], tool_choice=name, parallel_tool_calls=False, ls_structured_output_format=traced, **options
        )
        parser = (
            WholeToolPydantic(tools=[schema], first_tool_only=True)
            if _pydantic(schema)
            else WholeToolArguments(key_name=name, first_tool_only=True)
        )
    elif method in ("json_schema", "json_mode"):
        wanted: dict[str, Any] = {"type": "json_object"}
        if method == "json_schema":
            wanted = {"type": "json_schema", "json_schema": {"schema": json_schema(schema), "strict": strict}}
        asked = llm.bind(response_format=wanted, ls_structured_output_format=traced, **options)
        parser = WholePydantic(pydantic_object=schema) if _pydantic(schema) else WholeJson()
    else:
        raise SettingsError(
            f"with_structured_output: method={method!r} is not one of json_schema, function_calling, json_mode."
        )
    return with_raw(asked, parser) if include_raw else asked | parser


def with_raw(asked: Runnable[Any, Any], parser: BaseOutputParser[Any]) -> Runnable[Any, Any]:
    """The message itself, what was parsed of it, and the error if there was one."""
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=asked) | parsed.with_fallbacks([failed], exception_key="parsing_error")


def _cut(message: BaseMessage) -> bool:
    """Is it a beginning only? At the limit a grammar closes what is open, but some things take too many tokens."""
    if message.response_metadata.get("finish_reason") != "length":
        return False
    if isinstance(message, AIMessage) and (message.tool_calls or message.invalid_tool_calls):
        return bool(message.invalid_tool_calls)
    try:
        json.loads(message.text)
    except ValueError:
        return True
    return False


def _pydantic(schema: Any) -> bool:
    return isinstance(schema, type) and is_basemodel_subclass(schema)


def _untitled(schema: Any) -> bool:
    return isinstance(schema, dict) and "title" not in schema and "name" not in schema
