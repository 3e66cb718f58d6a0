"""LangChain's `with_structured_output`: answers that a grammar holds to a schema, and parsers for them."""

# mypy: disable-error-code="name-defined"

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Annotated, Any, Literal

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import AddableDict, Runnable, RunnableConfig, RunnableGenerator
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel, SkipValidation

from cards_integrations.chat.response_format import as_response_format
from cards_integrations.errors import SettingsError
from cards_integrations.langchain.convert import UNNAMED, is_schema, json_schema, tool_schemas

OF_NUMBERS = "0123456789.eE+-"
Method = Literal["json_schema", "function_calling", "json_mode"]


class CompleteAnswer:
    """A parser that refuses an answer which `max_tokens` cut."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """Parse the answer.

        Raises:
            OutputParserException: It is not complete.
        """
        first = result[0]
        if isinstance(first, ChatGeneration) and _is_cut(first.message):  # in a stream, true for the last chunk only
            raise OutputParserException(
                "The answer was cut at max_tokens before it was complete; use a larger max_tokens.",
                llm_output=first.text,
            )
        return super().parse_result(result, partial=partial)  # type: ignore[misc]


class AnswerOrCall(CompleteAnswer):
    """A parser of an answer that may also call the tools that were given along; it is None then."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """Parse the answer, if it is one; of a part of it a number at the end does not count, as it may go on."""
        first = result[0]
        if isinstance(first, ChatGeneration):
            if getattr(first.message, "tool_calls", ()):
                return None
            if partial and "finish_reason" not in first.message.response_metadata:
                result = [Generation(text=first.text.rstrip(OF_NUMBERS))]
        return super().parse_result(result, partial=partial)


class CompleteJson(AnswerOrCall, JsonOutputParser):
    """Parses a dict."""


class CompletePydantic(AnswerOrCall, PydanticOutputParser[BaseModel]):
    """Parses an object of a pydantic class."""

    def _parse_obj(self, obj: Any) -> Any:
        try:
            return _object_of(self.pydantic_object, obj)
        except ValueError as error:
            raise self._parser_exception(error, obj) from error


class CompleteToolArguments(CompleteAnswer, JsonOutputKeyToolsParser):
    """Parses the arguments of a call, as a dict."""


class CompleteToolPydantic(CompleteToolArguments):
    """Parses the arguments of a call, as an object of a pydantic class."""

    pydantic_object: Annotated[Any, SkipValidation()]
    """The class."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """Return the object; None for a part of it, until all that the class needs is there."""
        arguments = super().parse_result(result, partial=partial)
        try:
            return None if arguments is None else _object_of(self.pydantic_object, arguments)
        except ValueError:
            if partial:
                return None
            raise


def structured_chain(
    llm: Any, schema: Any, method: Method, include_raw: bool, strict: bool | None, options: dict[str, Any]
) -> Runnable[Any, Any]:
    """Return a chain of the chat model and the parser for its answers; see `ChatCards.with_structured_output`."""
    if schema is None and method != "json_mode":
        raise SettingsError(f"with_structured_output: method={method!r} needs a schema: pass one, or use 'json_mode'.")
    options = {**options, "ls_structured_output_format": _traced_format(schema, method, strict)}
    if method == "function_calling":
        model, parser = _calling(llm, schema, strict, options)
    elif method in ("json_schema", "json_mode"):
        response_format: dict[str, Any] = {"type": "json_object"}
        if method == "json_schema":
            response_format = {"type": method, "json_schema": {"schema": json_schema(schema), "strict": strict}}
            as_response_format(response_format)  # so that errors are raised here, not by the call
        model = llm.bind(response_format=response_format, **options)
        parser = CompletePydantic(pydantic_object=schema) if _is_pydantic(schema) else CompleteJson()
    else:
        raise SettingsError(
            f"with_structured_output: method={method!r} is not one of json_schema, function_calling, json_mode."
        )
    return _with_raw(model, parser) if include_raw else model | parser


def _calling(
    llm: Any, schema: Any, strict: bool | None, options: dict[str, Any]
) -> tuple[Runnable[Any, Any], BaseOutputParser[Any]]:
    """Return a model that must call a tool with this schema, and the parser of the call's arguments."""
    (tool,) = tool_schemas([{"title": UNNAMED, **schema} if _is_untitled(schema) else schema], strict)
    name = tool["function"]["name"]
    model = llm.bind_tools([tool], tool_choice=name, parallel_tool_calls=False, **options)
    if _is_pydantic(schema):
        return model, CompleteToolPydantic(key_name=name, first_tool_only=True, pydantic_object=schema)
    return model, CompleteToolArguments(key_name=name, first_tool_only=True)


def _traced_format(schema: Any, method: Method, strict: bool | None) -> dict[str, Any]:
    """Return what LangSmith shows of the structured output."""
    if schema is not None:
        schema = convert_to_json_schema(schema) if _is_pydantic(schema) else json_schema(schema)
    return {"kwargs": {"method": method, "strict": strict}, "schema": schema}


def _with_raw(model: Runnable[Any, Any], parser: BaseOutputParser[Any]) -> Runnable[Any, Any]:
    """Return a chain whose output is a dict of message, parsed object and error, streamed in this order."""

    def parse(messages: Iterator[BaseMessage], config: RunnableConfig) -> Iterator[AddableDict]:
        whole: Any = None
        for message in messages:
            whole = message if whole is None else whole + message
            yield AddableDict(raw=message)
        try:
            yield AddableDict(parsed=parser.invoke(whole, config), parsing_error=None)
        except Exception as error:
            yield AddableDict(parsed=None, parsing_error=error)

    async def aparse(messages: AsyncIterator[BaseMessage], config: RunnableConfig) -> AsyncIterator[AddableDict]:
        whole: Any = None
        async for message in messages:
            whole = message if whole is None else whole + message
            yield AddableDict(raw=message)
        try:
            yield AddableDict(parsed=await parser.ainvoke(whole, config), parsing_error=None)
        except Exception as error:
            yield AddableDict(parsed=None, parsing_error=error)

    return model | RunnableGenerator[Any, Any](parse, aparse)  # type: ignore[arg-type]


def _is_cut(message: BaseMessage) -> bool:
    """True if an answer is not complete. At the limit the grammar closes what is open, if enough tokens are left."""
    if message.response_metadata.get("finish_reason") != "length":
        return False
    if isinstance(message, AIMessage) and (message.tool_calls or message.invalid_tool_calls):
        return bool(message.invalid_tool_calls)
    try:
        json.loads(message.text)
    except ValueError:
        return True
    return False


def _object_of(cls: Any, value: Any) -> Any:
    """Return an object of a pydantic class (v2 or v1), made of values as JSON has them.

    For JSON pydantic takes a text where a class is strict and asks for a date, and prefers a date to a text.
    """
    return cls.model_validate_json(json.dumps(value)) if issubclass(cls, BaseModel) else cls.parse_obj(value)


def _is_pydantic(schema: Any) -> bool:
    return isinstance(schema, type) and is_basemodel_subclass(schema)


def _is_untitled(schema: Any) -> bool:
    return isinstance(schema, Mapping) and is_schema(schema) and "title" not in schema and "name" not in schema
