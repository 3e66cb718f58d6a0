"""The forms in which models were taught to write a call: as rules of a grammar, as text, and read again."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from cards_integrations.models.grammar import Grammar, json_rule
from cards_integrations.models.stops import StopStrings
from cards_integrations.models.tools import FormatName, Reading, Tools
from cards_integrations.trace import InvalidToolCall, ToolCall

Lark = Callable[[str], str]
"""How a rule writes a text: as a string, or, where the text is a special token, as that."""


class ToolFormat(ABC):
    """A form of calls in an answer."""

    name: ClassVar[FormatName]
    opening: ClassVar[str] = ""
    closing: ClassVar[str] = ""
    middle: ClassVar[str] = ""
    key: ClassVar[str] = "arguments"

    @property
    def markers(self) -> list[str]:
        """Texts that may be special tokens."""
        return [mark for mark in (self.opening, self.middle, self.closing) if mark]

    # --- writing ---

    def written(self, calls: Sequence[dict[str, Any]]) -> str:
        """Calls of an earlier answer, in the form of its text."""
        return "\n".join(self._written(call["function"]) for call in calls)

    def _written(self, function: dict[str, Any]) -> str:
        return json.dumps({"name": function["name"], self.key: function["arguments"]}, ensure_ascii=False)

    # --- drafting ---

    def grammar(self, tools: Tools, lark: Lark, otherwise: Grammar | None = None) -> Grammar | None:
        """What an answer may be: calls, and where none is forced also what `otherwise` allows, or free text."""
        each = [f"call{i}: {self._call(function, lark)}" for i, function in enumerate(tools.allowed)]
        one = "one: " + " | ".join(f"call{i}" for i in range(len(each)))
        rules = "\n".join([f"calls: {self._calls(tools.several, lark)}", one, *each])
        if tools.forced:
            return Grammar(f"start: calls\n{rules}")
        if otherwise is not None:
            return Grammar(f"start: calls | answer\n{rules}\n{otherwise.lark.replace('start:', 'answer:', 1)}")
        if tools.strict:
            return Grammar(f"start: {self._free(lark)}\n{rules}")
        return None

    def _calls(self, several: bool, lark: Lark) -> str:
        return 'one ("\\n" one)*' if several else "one"

    def _call(self, function: dict[str, Any], lark: Lark) -> str:
        name = json.dumps(function["name"], ensure_ascii=False)
        arguments = json_rule(_parameters(function))
        return f"""{lark(f'{{"name": {name}, "{self.key}": ')} {arguments} {lark("}")}"""

    @abstractmethod
    def _free(self, lark: Lark) -> str:
        """Rules for an answer that may say anything, but calls as it should."""

    # --- reading ---

    def read(self, text: str, tools: Tools) -> Reading:
        """What an answer, or the beginning of one, says and calls."""
        said, pieces, unfinished = self._pieces(text)
        calls: list[ToolCall | InvalidToolCall] = []
        for piece in pieces:
            for found in self._read(piece):
                call_id = f"{tools.call_id}{len(calls):02}"
                if isinstance(found, Wrong):
                    calls.append(InvalidToolCall(call_id, found.name, found.text, found.error))
                else:
                    calls.append(ToolCall(call_id, *found))
        return Reading(said.rstrip() if calls else said, tuple(calls), unfinished)

    @abstractmethod
    def certain(self, text: str) -> int:
        """How many characters of an unfinished answer are said, and cannot turn out to belong to a call."""

    @abstractmethod
    def _pieces(self, text: str) -> tuple[str, list[str], bool]:
        """What is said, the text of each call, and whether the last one is unfinished."""

    def _read(self, piece: str) -> list[Found]:
        try:
            value = json.loads(piece)
        except ValueError as error:
            return [Wrong(_name_in(piece), piece, f"not JSON: {error}")]
        return [_call(each) for each in (value if isinstance(value, list) else [value])]


class Marked(ToolFormat):
    """A form in which a marker announces a call, so that it can follow anything that is said."""

    def certain(self, text: str) -> int:
        start = text.find(self.opening)
        if start < 0:
            start = len(text) - StopStrings((self.opening,)).held_back(text)
        return len(text[:start].rstrip())

    def _free(self, lark: Lark) -> str:
        said = "/(?s:.*)/"
        if lark(self.opening).startswith('"'):  # a special token is no text anyway
            said += f" & ~/(?s:.*){_escaped(self.opening)}(?s:.*)/"
        return f"SAID calls | SAID\nSAID: {said}"

    def _pieces(self, text: str) -> tuple[str, list[str], bool]:
        said, calls, at, unfinished = list[str](), list[str](), 0, False
        while (start := text.find(self.opening, at)) >= 0:
            said.append(text[at:start])
            start += len(self.opening)
            end = self._end(text, start)
            unfinished = end is None
            if end is None:
                end = text.find(self.closing, start) if self.closing else -1
                unfinished = end < 0
                end = len(text) if unfinished else end
            calls.append(text[start:end].strip())
            rest = text[end:].lstrip()
            at = len(text) - len(rest.removeprefix(self.closing))
        return "".join([*said, text[at:]]), calls, unfinished

    def _end(self, text: str, start: int) -> int | None:
        """Where the JSON ends that begins here; None if there is none, or not yet."""
        return _json_end(text, start)


class Hermes(Marked):
    """<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>, one after another (Hermes, Qwen, SmolLM2)."""

    name = "hermes"
    opening = "<tool_call>"
    closing = "</tool_call>"

    def _written(self, function: dict[str, Any]) -> str:
        return f"{self.opening}\n{super()._written(function)}\n{self.closing}"

    def _call(self, function: dict[str, Any], lark: Lark) -> str:
        return f'{lark(self.opening)} "\\n" {super()._call(function, lark)} "\\n" {lark(self.closing)}'


class Mistral(Marked):
    """[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...] (Mistral, up to its tokenizer v7)."""

    name = "mistral"
    opening = "[TOOL_CALLS]"

    def written(self, calls: Sequence[dict[str, Any]]) -> str:
        return f"{self.opening}[{', '.join(self._written(call['function']) for call in calls)}]"

    def _calls(self, several: bool, lark: Lark) -> str:
        more = '(", " one)*' if several else ""
        return f'{lark(self.opening)} "[" one {more} "]"'


class MistralNamed(Marked):
    """[TOOL_CALLS]name[ARGS]{...}, one after another (Mistral, from its tokenizer v11 on)."""

    name = "mistral_named"
    opening = "[TOOL_CALLS]"
    middle = "[ARGS]"

    def written(self, calls: Sequence[dict[str, Any]]) -> str:
        return "".join(self._written(call["function"]) for call in calls)

    def _written(self, function: dict[str, Any]) -> str:
        return f"{self.opening}{function['name']}{self.middle}{json.dumps(function['arguments'], ensure_ascii=False)}"

    def _calls(self, several: bool, lark: Lark) -> str:
        return "one+" if several else "one"

    def _call(self, function: dict[str, Any], lark: Lark) -> str:
        arguments = json_rule(_parameters(function))
        return f"{lark(self.opening)} {lark(function['name'])} {lark(self.middle)} {arguments}"

    def _end(self, text: str, start: int) -> int | None:
        middle = text.find(self.middle, start)
        return None if middle < 0 else _json_end(text, middle + len(self.middle))

    def _read(self, piece: str) -> list[Found]:
        name, _, arguments = piece.partition(self.middle)
        try:
            return [_call({"name": name.strip(), "arguments": json.loads(arguments)})]
        except ValueError as error:
            return [Wrong(name.strip() or None, arguments, f"not JSON: {error}")]


class Bare(ToolFormat):
    """{"name": ..., "arguments": {...}}: an answer that begins with it is calls, as far as they go."""

    name: ClassVar[FormatName] = "json"

    def certain(self, text: str) -> int:
        begun = self._start(text)
        could_begin = any(prefix.startswith(text.lstrip()) for prefix in (*self.markers, "```json"))
        return 0 if begun is not None or could_begin else len(text)

    def _free(self, lark: Lark) -> str:
        return "calls | SAID\nSAID: /(?s:[^\\s{\\[`].*)?/"

    def _pieces(self, text: str) -> tuple[str, list[str], bool]:
        at, calls = self._start(text), list[str]()
        while at is not None and at < len(text):
            end = _json_end(text, at)
            if end is None and _name_in(text[at:]) is not None:
                return "", [*calls, text[at:].strip()], True
            if end is None or any(isinstance(found, Wrong) for found in self._read(text[at:end])):
                break  # JSON perhaps, but no call
            calls.append(text[at:end])
            at = len(text) - len(text[end:].lstrip(" \n;,`"))
        return text[at:] if calls else text, calls, False

    def _start(self, text: str) -> int | None:
        """Where JSON begins, after what may stand before it."""
        rest = text.lstrip()
        for prefix in (*self.markers, "```json", "```"):
            rest = rest.removeprefix(prefix).lstrip()
        return len(text) - len(rest) if rest.startswith(("{", "[")) else None


class Llama3(Bare):
    """{"name": ..., "parameters": {...}}, perhaps after <|python_tag|> (Llama 3.1 and later)."""

    name = "llama3"
    opening = "<|python_tag|>"
    key = "parameters"

    def written(self, calls: Sequence[dict[str, Any]]) -> str:
        return "; ".join(self._written(call["function"]) for call in calls)

    def _calls(self, several: bool, lark: Lark) -> str:
        return 'one ("; " one)*' if several else "one"


FORMATS: dict[FormatName, ToolFormat] = {f.name: f for f in (Hermes(), Mistral(), MistralNamed(), Llama3(), Bare())}


class Wrong:
    """Something that should be a call, and is not."""

    def __init__(self, name: str | None, text: str, error: str) -> None:
        self.name, self.text, self.error = name, text, error


Found = Wrong | tuple[str, dict[str, Any]]


def _call(value: Any) -> Found:
    """Name and arguments of a JSON value; those under the other key, or in a string of JSON, count, too."""
    shown = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return Wrong(None, shown, 'a call is an object with "name" and "arguments"')
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            return Wrong(value["name"], arguments, f"not JSON: {error}")
    if not isinstance(arguments, dict):
        return Wrong(value["name"], json.dumps(arguments, ensure_ascii=False), "the arguments are not an object")
    return value["name"], arguments


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    return function.get("parameters") or {"type": "object", "properties": {}}


def _json_end(text: str, start: int) -> int | None:
    """Where the JSON value ends that begins here or after blanks; None if there is none, or not all of it."""
    start = len(text) - len(text[start:].lstrip())
    try:
        return json.JSONDecoder().raw_decode(text, start)[1]
    except ValueError:
        return None


def _name_in(piece: str) -> str | None:
    """The name in a call that is not JSON, or not yet."""
    before, found, rest = piece.partition('"name": "')
    return rest.partition('"')[0] if found and not before.strip(" \n[{") else None


def _escaped(text: str) -> str:
    return "".join(c if c.isalnum() or c in "<>_" else "\\" + c for c in text)
