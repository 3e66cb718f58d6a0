"""The forms in which models were taught to write a call: as rules of a grammar, as text, and read again."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from cards_integrations.chat.grammar import Grammar, json_rule
from cards_integrations.chat.stop_strings import StopStrings
from cards_integrations.chat.tools import FormatName, Reading, Tools
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
        rests = [f"rest{i}: {self._rest(function, lark)}" for i, function in enumerate(tools.allowed)]
        opening = lark(self.opening) if isinstance(self, Marked) else ""
        rules = "\n".join([
            f"calls: {opening} after",
            f"after: {self._after(tools.several)}",
            *([f"one: {opening} rest"] if "one" in self._after(tools.several) else []),
            "rest: " + " | ".join(f"rest{i}" for i in range(len(rests))),
            *rests,
        ])  # fmt: skip
        if tools.forced:
            return Grammar(f"start: calls\n{rules}")
        if otherwise is not None:
            return Grammar(f"start: calls | answer\n{rules}\n{otherwise.lark.replace('start:', 'answer:', 1)}")
        if tools.strict:
            return Grammar(f"start: {self._free(lark)}\n{rules}")
        return None

    def _after(self, several: bool) -> str:
        """The rule of what follows the first opening, made of `rest`, and of `one`, a whole call."""
        return 'rest ("\\n" one)*' if several else "rest"

    def _rest(self, function: dict[str, Any], lark: Lark) -> str:
        """The rule of a call after its opening; each literal alone, or it would win over what begins like it."""
        name = json.dumps(function["name"], ensure_ascii=False)
        literals = ["{", '"name"', ": ", name, ", ", f'"{self.key}"', ": "]
        return " ".join([*map(lark, literals), json_rule(_parameters(function)), lark("}")])

    @abstractmethod
    def _free(self, lark: Lark) -> str:
        """Rules for an answer that may say anything, but calls as it should."""

    # --- reading ---

    def read(self, text: str, tools: Tools) -> Reading:
        """What an answer, or the beginning of one, says and calls."""
        said, pieces, sure = self._pieces(text, tools)
        calls: list[ToolCall | InvalidToolCall] = []
        sure_calls = 0
        for number, piece in enumerate(pieces):
            for found in self._read(piece):
                call_id = f"{tools.call_id}{len(calls):02}"
                if isinstance(found, Wrong):
                    calls.append(InvalidToolCall(call_id, found.name, found.text, found.error))
                elif tools.several or not any(isinstance(call, ToolCall) for call in calls):
                    calls.append(ToolCall(call_id, *found))  # nothing but a grammar holds a model to one call
            sure_calls = len(calls) if number < sure else sure_calls
        return Reading(said.rstrip() if calls else said, tuple(calls), sure_calls)

    @abstractmethod
    def certain(self, text: str) -> int:
        """How many characters of an unfinished answer are said, and cannot turn out to belong to a call."""

    @abstractmethod
    def _pieces(self, text: str, tools: Tools) -> tuple[str, list[str], int]:
        """What is said, the text of each call, and how many of those no later text can change."""

    def _read(self, piece: str) -> list[Found]:
        try:
            value = json.loads(piece)
        except (ValueError, RecursionError) as error:
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
        opening = _escaped(self.opening)
        said = f"SAID: /(?s:.*)/ & ~/(?s:.*){opening}(?s:.*)/"
        if not lark(self.opening).startswith('"'):
            return f"SAID calls | SAID\n{said}"
        to_call = f"TO_CALL: /(?s:.*){opening}/ & ~/(?s:.*){opening}(?s:.+)/"  # or the text would swallow its beginning
        return f"TO_CALL after | SAID\n{said}\n{to_call}"

    def _pieces(self, text: str, tools: Tools) -> tuple[str, list[str], int]:
        said, calls, at, sure = list[str](), list[str](), 0, 0
        while (start := text.find(self.opening, at)) >= 0:
            said.append(text[at:start])
            start += len(self.opening)
            end = self._end(text, start)
            if end is None:
                end = text.find(self.closing, start) if self.closing else -1
                end = len(text) if end < 0 else end
            elif sure == len(calls):  # what comes after one that is not whole may be part of it
                sure += 1
            calls.append(text[start:end].strip())
            rest = text[end:].lstrip()
            at = len(text) - len(rest.removeprefix(self.closing))
        return "".join([*said, text[at:]]), calls, sure

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

    def _rest(self, function: dict[str, Any], lark: Lark) -> str:
        return f'"\\n" {super()._rest(function, lark)} "\\n" {lark(self.closing)}'


class Mistral(Marked):
    """[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...] (Mistral, up to its tokenizer v7)."""

    name = "mistral"
    opening = "[TOOL_CALLS]"

    def written(self, calls: Sequence[dict[str, Any]]) -> str:
        return f"{self.opening}[{', '.join(self._written(call['function']) for call in calls)}]"

    def _after(self, several: bool) -> str:
        return '"[" rest (", " rest)* "]"' if several else '"[" rest "]"'


class MistralNamed(Marked):
    """[TOOL_CALLS]name[ARGS]{...}, one after another (Mistral, from its tokenizer v11 on)."""

    name = "mistral_named"
    opening = "[TOOL_CALLS]"
    middle = "[ARGS]"

    def written(self, calls: Sequence[dict[str, Any]]) -> str:
        return "".join(self._written(call["function"]) for call in calls)

    def _written(self, function: dict[str, Any]) -> str:
        return f"{self.opening}{function['name']}{self.middle}{json.dumps(function['arguments'], ensure_ascii=False)}"

    def _after(self, several: bool) -> str:
        return "rest one*" if several else "rest"

    def _rest(self, function: dict[str, Any], lark: Lark) -> str:
        return f"{lark(function['name'])} {lark(self.middle)} {json_rule(_parameters(function))}"

    def _end(self, text: str, start: int) -> int | None:
        middle = text.find(self.middle, start)
        return None if middle < 0 else _json_end(text, middle + len(self.middle))

    def _read(self, piece: str) -> list[Found]:
        name, _, arguments = piece.partition(self.middle)
        try:
            return [_call({"name": name.strip(), "arguments": json.loads(arguments)})]
        except (ValueError, RecursionError) as error:
            return [Wrong(name.strip() or None, arguments, f"not JSON: {error}")]


class Bare(ToolFormat):
    """{"name": ..., "arguments": {...}}: an answer that begins with it is calls, as far as they go."""

    name: ClassVar[FormatName] = "json"

    def certain(self, text: str) -> int:
        rest = self._unfenced(text)
        fenced = "```" + rest if text.removesuffix(rest).endswith("```") else rest  # perhaps half of "json"
        could_begin = not rest or any(prefix.startswith(fenced) for prefix in self._prefixes)
        return 0 if could_begin or rest.startswith(("{", "[")) else len(text)

    def _after(self, several: bool) -> str:
        return 'rest ("\\n" rest)*' if several else "rest"

    def _free(self, lark: Lark) -> str:
        said = "/(?s:[^\\s{\\[`].*)?/"
        for marker in self.markers:
            said += f" & ~/{_escaped(marker)}(?s:.*)/"
        return f"calls | SAID\nSAID: {said}"

    def _pieces(self, text: str, tools: Tools) -> tuple[str, list[str], int]:
        rest, calls = self._unfenced(text), list[str]()
        at = len(text) - len(rest) if rest.startswith(("{", "[")) else len(text)
        while at < len(text):
            end = _json_end(text, at)
            if end is None and _name_in(text[at:]) is not None:
                return "", [*calls, text[at:].strip()], len(calls)
            if end is None or not self._calls_only(text[at:end], tools):
                break  # JSON perhaps, but no call
            calls.append(text[at:end])
            at = len(text) - len(text[end:].lstrip(" \n;,`"))
        return text[at:] if calls else text, calls, len(calls)

    def _calls_only(self, piece: str, tools: Tools) -> bool:
        """Is it a call, or a list of them? An object that only has a name is one if a tool has that name."""
        value = json.loads(piece)
        found = value if isinstance(value, list) else [value]
        named = [not isinstance(_call(each), Wrong) for each in found]
        return (
            all(named)
            and any(named)
            and all("arguments" in each or self.key in each or each["name"] in tools.names for each in found)
        )

    @property
    def _prefixes(self) -> list[str]:
        """What may stand before the JSON."""
        return [*self.markers, "```json", "```"]

    def _unfenced(self, text: str) -> str:
        rest = text.lstrip()
        for prefix in self._prefixes:
            rest = rest.removeprefix(prefix).lstrip()
        return rest


class Llama3(Bare):
    """{"name": ..., "parameters": {...}}, perhaps after <|python_tag|> (Llama 3.1 and later)."""

    name = "llama3"
    opening = "<|python_tag|>"
    key = "parameters"

    def written(self, calls: Sequence[dict[str, Any]]) -> str:
        return "; ".join(self._written(call["function"]) for call in calls)

    def _after(self, several: bool) -> str:
        return 'rest ("; " rest)*' if several else "rest"


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
        except (ValueError, RecursionError) as error:
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
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    goes_on = end == len(text) and isinstance(value, (int, float)) and not isinstance(value, bool)
    return None if goes_on else end  # there may be more digits


def _name_in(piece: str) -> str | None:
    """The name in a call that is not JSON, or not yet."""
    before, found, rest = piece.partition('"name": "')
    name, whole, _ = rest.partition('"')
    return name if found and whole and not before.strip(" \n[{") else None


def _escaped(text: str) -> str:
    return "".join(c if c.isalnum() or c in "<>_" else "\\" + c for c in text)
