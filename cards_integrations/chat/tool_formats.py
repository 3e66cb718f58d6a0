"""The formats in which models write tool calls: how each of them is written, constrained and parsed."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from cards_integrations.chat.call_scanner import CallScanner, SplitAnswer
from cards_integrations.chat.grammar import Grammar, json_rule
from cards_integrations.chat.thoughts import leading_thoughts
from cards_integrations.chat.tools import FormatName, ParsedAnswer, Tools, parameters_rule
from cards_integrations.errors import SettingsError
from cards_integrations.trace import InvalidToolCall, ToolCall

WriteLiteral = Callable[[str], str]
"""Returns a text as a literal of a grammar: a string, or the special token that it is."""

_BEGINS_OBJECT = re.compile(r"\s*\[?\s*\{\s*[\"'}]")
_BEGINS_NAMED = re.compile(r"\s*[^\s\[\]]*\s*(\[CALL_ID\][^\s\[\]]*\s*)?\[ARGS\]")
_BEGINS_HARMONY = re.compile(r"[^\s<]+(<\|channel\|>commentary)?\s*(<\|constrain\|>)?(json)?\s*<\|message\|>")


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


_JSON = json.JSONDecoder(strict=False, parse_constant=_no_number)
"""Accepts line breaks within strings, which models forget to escape; refuses NaN and infinity."""


class ToolFormat(ABC):
    """A format of the calls in an answer."""

    name: ClassVar[FormatName]
    """The name of the format, for settings."""
    opening: ClassVar[str] = ""
    """The marker before a call."""
    closing: ClassVar[str] = ""
    """The marker after a call."""
    middle: ClassVar[str] = ""
    """The marker between the name and the arguments of a call."""
    channel: ClassVar[str] = ""
    """The mark before a call in place of that before an answer, `ThinkingFormat.channel`."""
    key: ClassVar[str] = "arguments"
    """The key of the arguments in the JSON of a call."""

    @property
    def markers(self) -> list[str]:
        """The markers of calls, which may be special tokens."""
        return [mark for mark in (self.opening, self.middle, self.closing) if mark]

    # --- writing ---

    def write(self, calls: Sequence[dict[str, Any]]) -> str:
        """Return the text of the calls of an earlier answer."""
        return "\n".join(self._write_call(call["function"]) for call in calls)

    def _write_call(self, function: dict[str, Any]) -> str:
        return json.dumps({"name": function["name"], self.key: function["arguments"]}, ensure_ascii=False)

    # --- constraining ---

    def grammar(self, tools: Tools, literal: WriteLiteral, otherwise: Grammar | None = None) -> Grammar | None:
        """Return the grammar of an answer that may call tools.

        Args:
            tools: The tools.
            literal: Writes literals of the grammar.
            otherwise: The grammar of an answer that calls none; None for any text.

        Returns:
            The grammar; None if neither calls nor other answers are constrained.
        """
        if not (tools.forced or tools.strict or otherwise is not None):
            return None
        rests = [f"rest{i}: {self._rest(function, literal)}" for i, function in enumerate(tools.allowed)]
        opening = literal(self.opening) if isinstance(self, Marked) else ""
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
        return Grammar(f"start: {self._free(literal)}\n{rules}")

    def _after(self, several: bool) -> str:
        """Return the rule for what follows the first opening, made of `rest` and of `one`, a whole call."""
        return 'rest ("\\n" one)*' if several else "rest"

    def _rest(self, function: dict[str, Any], literal: WriteLiteral) -> str:
        """Return the rule for a call after its opening.

        It has many short literals: one long literal would take precedence over other texts that begin like it.
        """
        name = json.dumps(function["name"], ensure_ascii=False)
        literals = ["{", '"name"', ": ", name, ", ", f'"{self.key}"', ": "]
        return " ".join([*map(literal, literals), parameters_rule(function), literal("}")])

    @abstractmethod
    def _free(self, literal: WriteLiteral) -> str:
        """Return the rules for an answer with any text, whose calls match their schemas."""

    # --- parsing ---

    def parse(self, text: str, tools: Tools) -> ParsedAnswer:
        """Parse an answer, or the beginning of one."""
        split = self._split(text, tools)
        calls: list[ToolCall | InvalidToolCall] = []
        final_calls = 0
        for number, piece in enumerate(split.calls):
            for found in self._parse_piece(piece):
                call_id = f"{tools.call_id}{len(calls):02}"
                if isinstance(found, Malformed):
                    calls.append(InvalidToolCall(call_id, found.name, found.text, found.error))
                elif tools.several or not any(isinstance(call, ToolCall) for call in calls):
                    calls.append(ToolCall(call_id, *found))  # only a grammar keeps a model from a second call
            final_calls = len(calls) if number < split.final else final_calls
        content = split.content.rstrip() if calls else split.content
        return ParsedAnswer(content, tuple(calls), final_calls, split.certain)

    @abstractmethod
    def _split(self, text: str, tools: Tools) -> SplitAnswer:
        """Tell calls from content, in an answer or its beginning."""

    def _parse_piece(self, piece: str) -> list[ParsedCall]:
        """Parse the calls in the text of one; a list of calls is several."""
        try:
            value = _JSON.decode(piece)
        except (ValueError, RecursionError) as error:
            return [Malformed(_name_in(piece), piece, f"not JSON: {error}")]
        return [_parse_call(each) for each in (value if isinstance(value, list) else [value])]


class Marked(ToolFormat):
    """A format with a marker before each call, so that a call can follow any text."""

    def _free(self, literal: WriteLiteral) -> str:
        opening = _escaped(self.opening)
        content = f"CONTENT: /(?s:.*)/ & ~/(?s:.*){opening}(?s:.*)/"
        if not literal(self.opening).startswith('"'):
            return f"CONTENT calls | CONTENT\n{content}"
        # without UNTIL_CALL, the content would swallow the beginning of a call
        to_call = f"UNTIL_CALL: /(?s:.*){opening}/ & ~/(?s:.*){opening}(?s:.+)/"
        return f"UNTIL_CALL after | CONTENT\n{content}\n{to_call}"

    def _split(self, text: str, tools: Tools) -> SplitAnswer:
        return CallScanner(text, self, tools.names).scan()

    def begins_call(self, text: str, start: int) -> bool:
        """True if an object, or a list of objects, begins here."""
        return _BEGINS_OBJECT.match(text, start) is not None

    def call_end(self, text: str, start: int) -> int | None:
        """Return where the JSON value that begins here ends; None if there is none, or not yet."""
        return _json_end(text, start)


class Hermes(Marked):
    """<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>, one after another (Hermes, Qwen, SmolLM2)."""

    name = "hermes"
    opening = "<tool_call>"
    closing = "</tool_call>"

    def _write_call(self, function: dict[str, Any]) -> str:
        return f"{self.opening}\n{super()._write_call(function)}\n{self.closing}"

    def _rest(self, function: dict[str, Any], literal: WriteLiteral) -> str:
        return f'"\\n" {super()._rest(function, literal)} "\\n" {literal(self.closing)}'


class Mistral(Marked):
    """[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...] (Mistral, up to its tokenizer v7)."""

    name = "mistral"
    opening = "[TOOL_CALLS]"

    def write(self, calls: Sequence[dict[str, Any]]) -> str:
        return f"{self.opening}[{', '.join(self._write_call(call['function']) for call in calls)}]"

    def _after(self, several: bool) -> str:
        return '"[" rest (", " rest)* "]"' if several else '"[" rest "]"'


class Named(Marked):
    """A format with the name before the JSON of the arguments, and a marker between the two."""

    begins: ClassVar[re.Pattern[str]]

    def write(self, calls: Sequence[dict[str, Any]]) -> str:
        return "".join(self._write_call(call["function"]) for call in calls)

    def _write_call(self, function: dict[str, Any]) -> str:
        return f"{self.opening}{function['name']}{self.middle}{json.dumps(function['arguments'], ensure_ascii=False)}"

    def begins_call(self, text: str, start: int) -> bool:
        """True if a name and the marker before the arguments begin here."""
        return self.begins.match(text, start) is not None

    def call_end(self, text: str, start: int) -> int | None:
        """Return where the arguments after the second marker end; None if there are none, or not yet."""
        middle = text.find(self.middle, start)
        return None if middle < 0 else _json_end(text, middle + len(self.middle))

    def _parse_piece(self, piece: str) -> list[ParsedCall]:
        header, _, arguments = piece.partition(self.middle)
        name = self._name(header)
        try:
            return [_parse_call({"name": name, "arguments": _JSON.decode(arguments)})]
        except (ValueError, RecursionError) as error:
            return [Malformed(name or None, arguments, f"not JSON: {error}")]

    def _name(self, header: str) -> str:
        """Return the name in the text before the second marker."""
        return header.strip()


class MistralNamed(Named):
    """[TOOL_CALLS]name[ARGS]{...}, one after another (Mistral, from its tokenizer v11 on; some name the id, too)."""

    name = "mistral_named"
    opening = "[TOOL_CALLS]"
    middle = "[ARGS]"
    call_id: ClassVar[str] = "[CALL_ID]"
    begins = _BEGINS_NAMED

    @property
    def markers(self) -> list[str]:
        return [*super().markers, self.call_id]

    def _name(self, header: str) -> str:
        return header.partition(self.call_id)[0].strip()

    def _after(self, several: bool) -> str:
        return "rest one*" if several else "rest"

    def _rest(self, function: dict[str, Any], literal: WriteLiteral) -> str:
        return f"{literal(function['name'])} {literal(self.middle)} {parameters_rule(function)}"


class Harmony(Named):
    """to=functions.name <|constrain|>json<|message|>{...}<|call|>, in a channel for calls, one per answer (gpt-oss)."""

    name = "harmony"
    channel = "<|channel|>commentary"
    opening = " to=functions."
    middle = "<|message|>"
    closing = "<|call|>"  # ends the answer, and is seldom part of its text
    constrain: ClassVar[str] = "<|constrain|>"
    begins = _BEGINS_HARMONY

    @property
    def markers(self) -> list[str]:
        return [*super().markers, self.constrain]

    def _write_call(self, function: dict[str, Any]) -> str:
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        return f"{self.opening}{function['name']} {self.constrain}json{self.middle}{arguments}{self.closing}"

    def _after(self, several: bool) -> str:
        return "rest"

    def _rest(self, function: dict[str, Any], literal: WriteLiteral) -> str:
        literals = [function["name"], " ", self.constrain, "json", self.middle]
        return " ".join([*map(literal, literals), _held_or_any(function), f"{literal(self.closing)}?"])

    def _name(self, header: str) -> str:
        return re.split(r"\s|<\|", header.strip())[0]


class Bare(ToolFormat):
    """{"name": ..., "arguments": {...}}: an answer that begins like this is calls, up to the first other text."""

    name: ClassVar[FormatName] = "json"

    def _after(self, several: bool) -> str:
        return 'rest ("\\n" rest)*' if several else "rest"

    def _free(self, literal: WriteLiteral) -> str:
        content = "/(?s:[^\\s{\\[`].*)?/"
        for marker in self.markers:
            content += f" & ~/{_escaped(marker)}(?s:.*)/"
        return f"calls | CONTENT\nCONTENT: {content}"

    def _split(self, text: str, tools: Tools) -> SplitAnswer:
        thought = leading_thoughts(text)
        found = self._split_rest(text[thought:], tools)
        certain = len(text[:thought].rstrip()) if not found.certain else thought + found.certain
        return SplitAnswer(text[:thought] + found.content, found.calls, found.final, certain)

    def _split_rest(self, text: str, tools: Tools) -> SplitAnswer:
        """Tell calls from content in the text after the thoughts."""
        rest, calls, certain = self._unfenced(text), list[str](), self._content_length(text)
        at = len(text) - len(rest) if rest.startswith(("{", "[")) else len(text)
        while at < len(text):
            end = _json_end(text, at)
            if end is None and _name_in(text[at:]) is not None:
                return SplitAnswer("", [*calls, text[at:].strip()], len(calls), certain)
            if end is None or not self._calls_only(text[at:end], tools):
                break  # JSON, but no call
            calls.append(text[at:end])
            at = len(text) - len(text[end:].lstrip(" \n;,`"))
        return SplitAnswer(text[at:] if calls else text, calls, len(calls), certain)

    def _content_length(self, text: str) -> int:
        """Return the length of the text's beginning that cannot belong to a call."""
        rest = self._unfenced(text)
        fenced = "```" + rest if text.removesuffix(rest).endswith("```") else rest  # may be part of "json"
        could_begin = not rest or any(prefix.startswith(fenced) for prefix in self._prefixes)
        return 0 if could_begin or rest.startswith(("{", "[")) else len(text)

    def _calls_only(self, piece: str, tools: Tools) -> bool:
        """True for a call or a list of calls. An object with only a name is a call if a tool has that name."""
        value = _JSON.decode(piece)
        found = value if isinstance(value, list) else [value]
        named = [not isinstance(_parse_call(each), Malformed) for each in found]
        return (
            all(named)
            and any(named)
            and all("arguments" in each or self.key in each or each["name"] in tools.names for each in found)
        )

    @property
    def _prefixes(self) -> list[str]:
        """Texts that may precede the JSON."""
        return [*self.markers, "```json", "```"]

    def _unfenced(self, text: str) -> str:
        """Return the text without markers and fences before the JSON."""
        rest = text.lstrip()
        for prefix in self._prefixes:
            rest = rest.removeprefix(prefix).lstrip()
        return rest


class Llama3(Bare):
    """{"name": ..., "parameters": {...}}, perhaps after <|python_tag|> (Llama 3.1 and later)."""

    name = "llama3"
    opening = "<|python_tag|>"
    key = "parameters"

    def write(self, calls: Sequence[dict[str, Any]]) -> str:
        return "; ".join(self._write_call(call["function"]) for call in calls)

    def _after(self, several: bool) -> str:
        return 'rest ("; " rest)*' if several else "rest"


FORMATS: dict[FormatName, ToolFormat] = {
    each.name: each for each in (Hermes(), Mistral(), MistralNamed(), Harmony(), Llama3(), Bare())
}


class Malformed:
    """A text in the place of a call that is not one.

    Args:
        name: The name of the tool; None if there is none in the text.
        text: What the model wrote.
        error: What is wrong with it.
    """

    def __init__(self, name: str | None, text: str, error: str) -> None:
        self.name, self.text, self.error = name, text, error


ParsedCall = Malformed | tuple[str, dict[str, Any]]
"""A malformed call, or the name and the arguments of one."""


def _parse_call(value: Any) -> ParsedCall:
    """Return the call in a JSON value; its arguments may have either key, and may be a string of JSON."""
    written = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return Malformed(None, written, 'a call is an object with "name" and "arguments"')
    arguments = value.get("arguments", value.get("parameters"))
    if arguments is None:  # of a tool that takes none
        arguments = {}
    if isinstance(arguments, str):
        try:
            arguments = _JSON.decode(arguments)
        except (ValueError, RecursionError) as error:
            return Malformed(value["name"], arguments, f"not JSON: {error}")
    if not isinstance(arguments, dict):
        return Malformed(value["name"], json.dumps(arguments, ensure_ascii=False), "the arguments are not an object")
    return value["name"], arguments


def _held_or_any(function: dict[str, Any]) -> str:
    """Return a rule for the arguments of a function: any object if no grammar can express their schema."""
    try:
        return parameters_rule(function)
    except SettingsError:
        return json_rule({"type": "object"})


def _json_end(text: str, start: int) -> int | None:
    """Return where the JSON value that begins here or after blanks ends; None if it is missing or incomplete."""
    start = len(text) - len(text[start:].lstrip())
    try:
        value, end = _JSON.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    may_continue = end == len(text) and isinstance(value, (int, float)) and not isinstance(value, bool)
    return None if may_continue else end  # more digits may follow


def _name_in(piece: str) -> str | None:
    """Return the name in a call that is not JSON, or not yet; None if there is none."""
    before, key, rest = piece.partition('"name": "')
    name, quote, _ = rest.partition('"')
    return name if key and quote and not before.strip(" \n[{") else None


def _escaped(text: str) -> str:
    """Return a text as a part of a regular expression."""
    return "".join(c if c.isalnum() or c in "<>_" else "\\" + c for c in text)
