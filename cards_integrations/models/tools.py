"""Tools that an answer may call, and what was read of its calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

from cards_integrations.errors import SettingsError
from cards_integrations.trace import InvalidToolCall, ToolCall

FormatName = Literal["hermes", "mistral", "mistral_named", "llama3", "json"]


@dataclass(frozen=True)
class Tools:
    """What an answer may call.

    `schemas` are functions as OpenAI describes them: `{"type": "function", "function": {"name", ...}}`.
    `choice` is "auto" (the model decides), "any" (it calls at least one), or the name of a tool, which
    it calls once. `strict`: under "auto" a call is held to its schema, too.
    """

    schemas: tuple[dict[str, Any], ...]
    choice: str = "auto"
    parallel: bool = True
    strict: bool = False
    call_id: str = field(default_factory=lambda: uuid4().hex[:7])

    def __post_init__(self) -> None:
        if self.choice not in ("auto", "any") and self.choice not in self.names:
            raise SettingsError(f"tool_choice={self.choice!r}: there is no such tool, only {', '.join(self.names)}.")
        for name in self.names:
            if self.names.count(name) > 1:
                raise SettingsError(f"tools: two of them are called {name!r}.")

    @property
    def names(self) -> list[str]:
        return [schema["function"]["name"] for schema in self.schemas]

    @property
    def forced(self) -> bool:
        return self.choice != "auto"

    @property
    def allowed(self) -> list[dict[str, Any]]:
        """The functions that may be called."""
        functions = [schema["function"] for schema in self.schemas]
        return [f for f in functions if self.choice in ("auto", "any", f["name"])]

    @property
    def several(self) -> bool:
        """May one answer call more than once?"""
        return self.parallel and self.choice in ("auto", "any")


def as_tools(schemas: Sequence[Mapping[str, Any]] | None, choice: Any = None, parallel: bool = True) -> Tools | None:
    """From what callers of either framework say; None where no tool may be called."""
    if not schemas or choice == "none" or choice is False:
        if not schemas and choice not in (None, "auto", "none", False):
            raise SettingsError(f"tool_choice={choice!r} needs tools=.")
        return None
    functions = tuple(_function(schema) for schema in schemas)
    return Tools(functions, _choice(choice), parallel, any(f["function"].get("strict") for f in functions))


def _function(schema: Any) -> dict[str, Any]:
    function = schema.get("function", schema) if isinstance(schema, Mapping) else {}
    if not isinstance(function.get("name"), str):
        raise SettingsError(f"tools: {schema!r} is not a function with a name, a description and parameters.")
    return {"type": "function", "function": dict(function)}


def _choice(choice: Any) -> str:
    if isinstance(choice, Mapping):  # as OpenAI or Anthropic write it
        choice = choice.get("function", choice).get("name") or choice.get("type")
    if choice is None:
        return "auto"
    return "any" if choice in (True, "any", "required") else str(choice)


@dataclass(frozen=True)
class Reading:
    """What an answer says and calls; `unfinished`: its text ends within the last call."""

    said: str
    calls: tuple[ToolCall | InvalidToolCall, ...] = ()
    unfinished: bool = False
