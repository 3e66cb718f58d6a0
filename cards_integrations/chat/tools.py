"""The tools that an answer may call, and an answer that was parsed into content and calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

from cards_integrations.chat.grammar import as_json, json_rule
from cards_integrations.errors import SettingsError, short_repr
from cards_integrations.trace import InvalidToolCall, ToolCall

FormatName = Literal["hermes", "mistral", "mistral_named", "harmony", "llama3", "json"]


@dataclass(frozen=True)
class Tools:
    """The tools that an answer may call, and whether it has to."""

    schemas: tuple[dict[str, Any], ...]
    """Functions as OpenAI describes them: `{"type": "function", "function": {"name", ...}}`."""

    choice: str = "auto"
    """"auto" (the model decides), "any" (at least one call), or the name of a tool (one call of it)."""

    parallel: bool = True
    """Whether one answer may have several calls."""

    strict: bool = False
    """Whether a grammar holds calls to their schemas even under "auto"."""

    call_id: str = field(default_factory=lambda: uuid4().hex[:7])
    """The beginning of the ids of all calls."""

    def __post_init__(self) -> None:
        if self.choice not in ("auto", "any") and self.choice not in self.names:
            raise SettingsError(
                f"tool_choice={short_repr(self.choice)}: there is no such tool, only {', '.join(self.names)}."
            )

    @property
    def names(self) -> list[str]:
        """The names of all tools."""
        return [schema["function"]["name"] for schema in self.schemas]

    @property
    def forced(self) -> bool:
        """True if an answer has to be a call."""
        return self.choice != "auto"

    @property
    def allowed(self) -> list[dict[str, Any]]:
        """The functions that may be called."""
        functions = [schema["function"] for schema in self.schemas]
        return [f for f in functions if self.choice in ("auto", "any", f["name"])]

    def check_schemas(self) -> None:
        """Raise a `SettingsError` if no grammar can hold the calls of an allowed tool to its schema."""
        for function in self.allowed:
            parameters_rule(function)

    @property
    def several(self) -> bool:
        """True if one answer may have more than one call."""
        return self.parallel and self.choice in ("auto", "any")


def as_tools(schemas: Sequence[Mapping[str, Any]] | None, choice: Any = None, parallel: bool = True) -> Tools | None:
    """Return tools, given the arguments of a call in either framework; None if no tool may be called.

    Args:
        schemas: The functions, as OpenAI describes them.
        choice: The tool choice as a name, a bool, or in the form of OpenAI or Anthropic.
        parallel: Whether one answer may have several calls.

    Raises:
        SettingsError: An argument cannot be used as given.
    """
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        return as_tools(*_allowed(schemas or (), choice), parallel)
    name = _choice_name(choice)
    if not schemas or name == "none":
        if name not in ("auto", "none"):
            raise SettingsError(f"tool_choice={short_repr(choice)} needs tools=.")
        return None
    if not isinstance(schemas, (list, tuple)):
        raise SettingsError(f"tools={short_repr(schemas)}: pass a list of them.")
    by_name = {each["function"]["name"]: each for each in map(_as_function, schemas)}  # without duplicates
    functions = tuple(by_name.values())
    tools = Tools(functions, name, parallel, any(f["function"].get("strict") for f in functions))
    if tools.forced or tools.strict:
        tools.check_schemas()
    return tools


def _allowed(schemas: Sequence[Mapping[str, Any]], choice: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], str]:
    """Return the tools that OpenAI's "allowed_tools" leaves the model, and its mode: "auto" or "required"."""
    given = choice.get("allowed_tools", choice)
    named = given.get("tools") if isinstance(given, Mapping) else None
    if not isinstance(named, list) or given.get("mode", "auto") not in ("auto", "required"):
        raise SettingsError(f'tool_choice={short_repr(choice)}: name "tools", and "auto" or "required" as the "mode".')
    known = {each["function"]["name"]: each for each in map(_as_function, schemas)}
    for name in map(_choice_name, named):
        if name not in known:
            raise SettingsError(f"tool_choice={short_repr(name)}: there is no such tool, only {', '.join(known)}.")
    return [known[_choice_name(each)] for each in named], given.get("mode", "auto")


def _as_function(schema: Any) -> dict[str, Any]:
    """Return a tool in OpenAI's form, checked.

    Raises:
        SettingsError: It is not a function, or its parameters are not the schema of an object.
    """
    function = schema.get("function", schema) if isinstance(schema, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise SettingsError(f"tools: {short_repr(schema)} is not a function with a name, a description and parameters.")
    as_json(dict(function), f"tool {short_repr(function['name'])}:")
    if not isinstance(function.get("parameters") or {}, Mapping):
        raise SettingsError(
            f"tool {short_repr(function['name'])}: parameters={short_repr(function['parameters'])} is not a JSON "
            "schema: pass a mapping."
        )
    kind = (function.get("parameters") or {}).get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise SettingsError(
            f"tool {short_repr(function['name'])}: its parameters are of the type {short_repr(kind)}; arguments of a "
            "call are an object."
        )
    return {"type": "function", "function": dict(function)}


def _choice_name(choice: Any) -> str:
    """Return the name of a choice in any form: "auto", "any", "none", or the name of a tool."""
    if isinstance(choice, Mapping):  # as OpenAI or Anthropic write it
        function = choice.get("function", choice)
        if not isinstance(function, Mapping):
            raise SettingsError(f"tool_choice={short_repr(choice)}: its function is not a mapping with a name.")
        choice = function.get("name", choice.get("type"))
    if choice is None or choice is False:
        return "auto" if choice is None else "none"
    if choice is True:
        return "any"
    if not isinstance(choice, str):
        raise SettingsError(
            f"tool_choice={short_repr(choice)}: there is no such tool; pass a name, 'auto', 'any' or 'none'."
        )
    return "any" if choice == "required" else choice


def parameters_rule(function: Mapping[str, Any]) -> str:
    """Return an expression, for a rule of a grammar, of the arguments of a function."""
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    return json_rule(parameters, f"tool {short_repr(function['name'])}")


@dataclass(frozen=True)
class ParsedAnswer:
    """The content and the calls of an answer, or of the beginning of one."""

    content: str
    """The text beside the calls."""

    calls: tuple[ToolCall | InvalidToolCall, ...] = ()
    """All calls in order, an unfinished one included."""

    final_calls: int = 0
    """The number of calls, from the first one on, that no later text can change."""

    certain: int = field(default=0, compare=False)
    """The length of the beginning that cannot turn out to belong to a call, in characters."""
