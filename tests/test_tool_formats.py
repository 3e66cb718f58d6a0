"""The forms of calls: what is written is read again, whole or as it grows, and grammars allow exactly that."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cards_integrations.chat.grammar import Grammar, GrammarTokenizer
from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.chat.tool_formats import FORMATS
from cards_integrations.chat.tool_reader import ToolReader
from cards_integrations.chat.tools import FormatName, ParsedAnswer, Tools
from cards_integrations.trace import InvalidToolCall, ToolCall

FORMS: list[FormatName] = list(FORMATS)
MARKED: list[FormatName] = ["hermes", "mistral", "mistral_named", "harmony"]
NAMED: list[FormatName] = ["mistral_named", "harmony"]  # the names are outside of the JSON
BARE: list[FormatName] = ["llama3", "json"]
MARKERS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"),
    *("<|constrain|>", "<|message|>", "<|call|>"),
]


def function(name: str, required: Sequence[str] = (), **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


WEATHER = function("get_weather", ["city"], city={"type": "string"}, days={"type": "integer"})
ADD = function("add", ["a", "b"], a={"type": "integer"}, b={"type": "integer"})
TOOLS = Tools((WEATHER, ADD))


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": arguments}}


PARIS = call("get_weather", city="Paris", days=3)
SUM = call("add", a=1, b=-2)


def called(reading: ParsedAnswer) -> list[tuple[str, dict[str, Any]]]:
    """Name and arguments of each call; none of them is invalid."""
    assert all(isinstance(each, ToolCall) for each in reading.calls), reading.calls
    return [(each.name, each.arguments) for each in reading.calls if isinstance(each, ToolCall)]


# --- what is written is read ---

TEXTS = st.lists(
    st.one_of(st.sampled_from([*MARKERS, "{", "}", "[", "]", '"', "\\", "\n", "```", "; ", "é\u2028😀"]), st.text()),
    max_size=4,
).map("".join)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
NAMES = st.text("abcXYZ0_-.äß猫", min_size=1, max_size=12)
CALLS = st.builds(
    lambda name, arguments: {"function": {"name": name, "arguments": arguments}},
    NAMES,
    st.dictionaries(TEXTS, VALUES, max_size=3),
)


@pytest.mark.parametrize("form", FORMS)
@given(st.lists(CALLS, min_size=1, max_size=4))
def test_what_is_written_is_read(form: FormatName, calls: list[dict[str, Any]]) -> None:
    reading = FORMATS[form].parse(FORMATS[form].write(calls), TOOLS)
    assert called(reading) == [(each["function"]["name"], each["function"]["arguments"]) for each in calls]
    assert reading.content == ""
    assert reading.final_calls == len(reading.calls)


@pytest.mark.parametrize("form", FORMS)
@given(st.text(), st.booleans())
def test_text_without_calls_is_said(form: FormatName, text: str, known: bool) -> None:
    if text.strip().lstrip("`").startswith(("{", "[")):
        text = "it is " + text
    reading = FORMATS[form].parse(text, TOOLS)
    assert reading == ParsedAnswer(text)
    assert ToolReader(TOOLS if known else None, FORMATS[form]).update(text, finished=True) == (text, ())


@pytest.mark.parametrize("form", MARKED)
@pytest.mark.parametrize("calls", [[PARIS], [PARIS, SUM], [SUM, PARIS, SUM]], ids=len)
def test_text_around_calls_is_said(form: FormatName, calls: list[dict[str, Any]]) -> None:
    written = FORMATS[form].write(calls)
    for text, said in (
        (f"Let me see.\n{written}", "Let me see."),
        (f"{written} That is it.", "That is it."),
        (f"Let me see. {written}\nThat is it.", "Let me see. That is it."),
    ):
        reading = FORMATS[form].parse(text, TOOLS)
        assert called(reading) == [(each["function"]["name"], each["function"]["arguments"]) for each in calls]
        assert reading.content.split() == said.split()


@pytest.mark.parametrize("form", MARKED)
def test_text_between_calls_is_said(form: FormatName) -> None:
    write = FORMATS[form].write
    reading = FORMATS[form].parse(f"One: {write([PARIS])} two: {write([SUM])} done", TOOLS)
    assert [name for name, _ in called(reading)] == ["get_weather", "add"]
    assert reading.content.split() == ["One:", "two:", "done"]


@pytest.mark.parametrize("form", BARE)
def test_bare_calls_come_first_or_are_text(form: FormatName) -> None:
    written = FORMATS[form].write([PARIS])
    assert FORMATS[form].parse(f"I would write {written}", TOOLS) == ParsedAnswer(f"I would write {written}")
    reading = FORMATS[form].parse(f"\n{written}\nThat is it.", TOOLS)
    assert called(reading) == [("get_weather", {"city": "Paris", "days": 3})]
    assert reading.content == "That is it."


# --- what is taken for a call, though it is written otherwise ---

ONE = '{"name": "add", "arguments": {"a": 1}}'


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", f"<tool_call>{ONE}</tool_call>"),
        ("hermes", f"<tool_call>\n{ONE}"),  # some leave the closing marker to the end of the sequence
        ("hermes", f"<tool_call>[{ONE}]</tool_call>"),
        ("hermes", '<tool_call>{"name":"add","parameters":{"a":1}}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": "{\\"a\\": 1}", "name": "add"}</tool_call>'),
        ("hermes", f"<tool_call> \n\n {ONE} \n </tool_call>\n"),
        ("mistral", f"[TOOL_CALLS] [{ONE}]"),
        ("mistral", f"[TOOL_CALLS]{ONE}"),
        ("mistral", '[TOOL_CALLS][{"name": "add", "arguments": "{\\"a\\": 1}"}]'),
        ("mistral_named", '[TOOL_CALLS] add [ARGS] {"a":1}'),
        ("mistral_named", '[TOOL_CALLS]add[ARGS]"{\\"a\\": 1}"'),
        ("llama3", f"<|python_tag|>{ONE}"),
        ("llama3", '{"type": "function", "name": "add", "parameters": {"a": 1}}'),
        ("llama3", '{"name": "add", "parameters": "{\\"a\\": 1}"}'),
        ("llama3", f"```json\n{ONE}\n```"),
        ("json", f"```json\n{ONE}\n```"),
        ("json", f"```\n{ONE}\n```\n"),
        ("json", f"[{ONE}]"),
        ("json", '{"name":"add","parameters":{"a":1}}'),
    ],
)
def test_other_spellings_of_a_call(form: FormatName, text: str) -> None:
    reading = FORMATS[form].parse(text, TOOLS)
    assert called(reading) == [("add", {"a": 1})]
    assert reading.content == ""


def test_a_call_that_names_its_id() -> None:
    text = '[TOOL_CALLS]add[CALL_ID]a1B2c3D4e[ARGS]{"a": 1}[TOOL_CALLS]now[ARGS]{}'
    reading = FORMATS["mistral_named"].parse(text, TOOLS)
    assert called(reading) == [("add", {"a": 1}), ("now", {})]
    assert reading.content == ""
    for end in range(len(text)):  # no beginning of it is said
        assert FORMATS["mistral_named"].parse(text[:end], TOOLS).certain == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_line_break_in_a_string_need_not_be_escaped(form: FormatName) -> None:
    arguments = {"code": "if x:\n\treturn 1"}
    written = json.dumps(arguments).replace("\\n", "\n").replace("\\t", "\t")
    text = FORMATS[form].write([{"function": {"name": "run", "arguments": {}}}]).replace("{}", written)
    assert called(FORMATS[form].parse(text, Tools((function("run"),)))) == [("run", arguments)]


@pytest.mark.parametrize("form", FORMS)
def test_a_list_of_calls(form: FormatName) -> None:
    if form in NAMED:
        pytest.skip("its names are outside of the JSON")
    text = FORMATS[form].opening + f"[{ONE}, {ONE}]" + FORMATS[form].closing
    assert called(FORMATS[form].parse(text, TOOLS)) == [("add", {"a": 1})] * 2


@pytest.mark.parametrize("form", BARE)
@pytest.mark.parametrize("between", ["\n", "; ", ";", ", ", "\n\n", ""])
def test_what_stands_between_bare_calls(form: FormatName, between: str) -> None:
    assert called(FORMATS[form].parse(between.join([ONE, ONE, ONE]), TOOLS)) == [("add", {"a": 1})] * 3


@pytest.mark.parametrize("form", [form for form in FORMS if form not in NAMED])
def test_no_arguments_are_none(form: FormatName) -> None:
    for written in ('{"name": "now"}', '{"name": "now", "arguments": null}', '{"name": "now", "parameters": null}'):
        text = FORMATS[form].opening + written + FORMATS[form].closing
        assert called(FORMATS[form].parse(text, Tools((function("now"),)))) == [("now", {})]


# --- what should be a call, and is not ---


@pytest.mark.parametrize(
    ("form", "text", "name", "error"),
    [
        ("hermes", '<tool_call>\n{"name": "add", "arguments": {"a": 1}\n</tool_call>', "add", "not JSON"),
        ("hermes", "<tool_call>add(1, 2)</tool_call>", None, "not JSON"),
        ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>', None, '"name"'),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>', None, '"name"'),
        ("hermes", '<tool_call>"add"</tool_call>', None, '"name"'),
        ("hermes", '<tool_call>{"name": "add", "arguments": [1, 2]}</tool_call>', "add", "not an object"),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>', "add", "NaN is no number"),
        ("hermes", '<tool_call>{"name": "add", "arguments": "a=1"}</tool_call>', "add", "not JSON"),
        ("hermes", '<tool_call>{"name": "add", "arguments": "[1]"}</tool_call>', "add", "not an object"),
        ("mistral", '[TOOL_CALLS][{"name": "add", "argum', "add", "not JSON"),
        ("mistral", "[TOOL_CALLS] I would add", None, "not JSON"),
        ("mistral", '[TOOL_CALLS][{"arguments": {}}]', None, '"name"'),
        ("mistral", '[TOOL_CALLS][{"name": "add", "arguments": 3}]', "add", "not an object"),
        ("mistral_named", '[TOOL_CALLS]add[ARGS]{"a": ', "add", "not JSON"),
        ("mistral_named", "[TOOL_CALLS]add", "add", "not JSON"),
        ("mistral_named", "[TOOL_CALLS]add[ARGS][1]", "add", "not an object"),
        ("mistral_named", "[TOOL_CALLS][ARGS]{", None, "not JSON"),
        ("llama3", '{"name": "add", "parameters": {"a": 1', "add", "not JSON"),
        ("json", '[{"name": "add", "arguments": {"a": 1}', "add", "not JSON"),
        ("json", '```json\n{"name": "add", "arg', "add", "not JSON"),
    ],
)
def test_invalid_calls_say_what_is_wrong(form: FormatName, text: str, name: str | None, error: str) -> None:
    reading = FORMATS[form].parse(text, TOOLS)
    [found] = reading.calls
    assert isinstance(found, InvalidToolCall)
    assert found.name == name
    assert error in found.error
    assert reading.content == ""


def test_an_invalid_call_leaves_the_others_whole() -> None:
    text = f"<tool_call>{{bad}}</tool_call>\n<tool_call>{ONE}</tool_call>"
    bad, good = FORMATS["hermes"].parse(text, TOOLS).calls
    assert isinstance(bad, InvalidToolCall)
    assert isinstance(good, ToolCall)
    bad, good = FORMATS["mistral"].parse(f'[TOOL_CALLS][{{"a": 1}}, {ONE}]', TOOLS).calls
    assert isinstance(bad, InvalidToolCall)
    assert isinstance(good, ToolCall)


@pytest.mark.parametrize("form", BARE)
@pytest.mark.parametrize(
    "text",
    [
        '{"temperature": 21}',
        "[1, 2]",
        '{"name": 3, "arguments": {}}',
        '{"name": "add", "arguments": [1]}',
        '{"arguments": {"a": 1}}',
        '```json\n{"x": [{}]}\n```',
        "[see below](http://x)",
        "{curly",
        '"add"',
        "12",
        "",
        "[]",
        '{"name": "Bob", "age": 3}',
    ],
)
def test_json_that_is_no_call_is_said(form: FormatName, text: str) -> None:
    assert FORMATS[form].parse(text, TOOLS) == ParsedAnswer(text)


@pytest.mark.parametrize("form", BARE)
def test_json_after_a_call_that_is_none_is_said(form: FormatName) -> None:
    reading = FORMATS[form].parse(f'{ONE}\n{{"x": 1}}', TOOLS)
    assert called(reading) == [("add", {"a": 1})]
    assert reading.content == '{"x": 1}'


@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_repeats_a_bracket(form: FormatName) -> None:
    own = FORMATS[form]
    text = own.opening + own.middle + "[" * 3000
    reading = own.parse(text, TOOLS)
    assert not any(isinstance(each, ToolCall) for each in reading.calls)


# --- markers that are only named, thoughts, and several calls between one pair ---

THOUGHT = "<think>I can use {opening} for add: {opening}{call}{closing}? No.</think>"


@pytest.mark.parametrize("form", FORMS)
def test_a_call_that_is_considered_in_a_thought_is_none(form: FormatName) -> None:
    own = FORMATS[form]
    for thought in (THOUGHT, THOUGHT.replace("<think>", "\n[THINK]").replace("</think>", "[/THINK]\n")):
        thought = thought.format(opening=own.opening, closing=own.closing, call=own.write([PARIS]))
        reading = own.parse(f"{thought}\n{own.write([SUM])}", TOOLS)
        assert called(reading) == [("add", {"a": 1, "b": -2})]
        assert reading.content == thought.rstrip()
        check_streamed(form, f"{thought}\n{own.write([SUM])}", range(600))
        assert own.parse(thought.partition("?")[0], TOOLS).calls == ()  # nor in one that never ends


@pytest.mark.parametrize("form", MARKED)
def test_a_thought_between_calls_and_one_that_is_only_named(form: FormatName) -> None:
    write = FORMATS[form].write
    for text, names in (
        (f"{write([SUM])}\n<think>Or {write([PARIS])}?</think>\n{write([SUM])}", ["add", "add"]),
        (f"I write <think> first. {write([PARIS])}", ["get_weather"]),
        (write([call("say", text="<think>")]) + write([call("say", text="</think>")]), ["say", "say"]),
    ):
        assert [name for name, _ in called(FORMATS[form].parse(text, TOOLS))] == names
        check_streamed(form, text, range(600))


@pytest.mark.parametrize("form", MARKED)
@pytest.mark.parametrize(
    "prose",
    [
        "I write {opening} to call get_weather.\n",
        "Between {opening} and {closing} there is JSON.\n",
        "`{opening}`, `{closing}` and {opening} are marks\n",
        "{opening} is the mark.\n",
        "I would write {opening}{{...}}{closing} here: ",
    ],
)
def test_a_marker_that_is_only_named_is_text(form: FormatName, prose: str) -> None:
    own = FORMATS[form]
    prose = prose.format(opening=own.opening, closing=own.closing)
    reading = own.parse(prose + own.write([SUM]), TOOLS)
    assert called(reading) == [("add", {"a": 1, "b": -2})]
    assert reading.content == prose.rstrip()
    check_streamed(form, prose + own.write([SUM]), range(600))


@pytest.mark.parametrize("text", ["I use <tool_call> and </tool_call>.", "It is <tool_call>", "Say <tool_call> {...}"])
def test_a_marker_that_is_only_named_is_no_invalid_call(text: str) -> None:
    assert FORMATS["hermes"].parse(text, TOOLS) == ParsedAnswer(text)


@pytest.mark.parametrize("between", ["\n", " ", ", ", "; ", ""])
def test_several_calls_between_one_pair_of_markers(between: str) -> None:
    text = f"<tool_call>\n{between.join([ONE] * 3)}\n</tool_call>\nThat is it."
    reading = FORMATS["hermes"].parse(text, TOOLS)
    assert called(reading) == [("add", {"a": 1})] * 3
    assert reading.content.strip() == "That is it."
    check_streamed("hermes", text, range(300))


# --- ids ---


@pytest.mark.parametrize("form", FORMS)
def test_ids_are_unique_and_of_nine_characters(form: FormatName) -> None:
    tools = [Tools((ADD,)), Tools((ADD,))]
    text = FORMATS[form].write([SUM] * 12)
    ids = [each.id for own in tools for each in FORMATS[form].parse(text, own).calls]
    assert len(set(ids)) == 24
    assert all(len(each) == 9 and each.isalnum() for each in ids)
    assert ids[:12] == [each.id for each in FORMATS[form].parse(text + " and", tools[0]).calls]  # they stay


def test_ids_of_invalid_calls_count_too() -> None:
    text = f"<tool_call>no</tool_call><tool_call>{ONE}</tool_call><tool_call>no</tool_call>"
    assert len({each.id for each in FORMATS["hermes"].parse(text, TOOLS).calls}) == 3


# --- read as it grows ---


def streamed(form: FormatName, text: str, cuts: Sequence[int]) -> tuple[str, list[ToolCall | InvalidToolCall]]:
    """What is told of a text that grows by pieces."""
    reader, said, calls = ToolReader(TOOLS, FORMATS[form]), "", list[ToolCall | InvalidToolCall]()
    for end in sorted({cut for cut in cuts if cut < len(text)}):
        more, new = reader.update(text[:end], finished=False)
        said += more
        calls += new
    more, new = reader.update(text, finished=True)
    return said + more, [*calls, *new]


def check_streamed(form: FormatName, text: str, cuts: Sequence[int]) -> None:
    whole = FORMATS[form].parse(text, TOOLS)
    said, calls = streamed(form, text, cuts)
    assert said == whole.content
    assert calls == list(whole.calls)


CLOSED = [  # no string is left open, and no number stands alone: see `test_what_can_still_become_a_call_waits`
    *(FORMATS[form].write(calls) for form in FORMS for calls in ([PARIS], [SUM, SUM])),
    *(FORMATS[form].write([call("say", text=text)]) for form in FORMS for text in ("[ARGS]", "}")),
    "<think>", "</think>", "[THINK]", "[/THINK]",
    *MARKERS, *(marker[:4] for marker in MARKERS), *(marker[4:] for marker in MARKERS),
    ONE, '{"x": 1}', '{"name": "a"}', "{bad}", "{", "}", "[", "]", "null", "[]", "the sky", "\n", "; ", " ",
]  # fmt: skip
WILD = [
    *CLOSED, ONE[:20], '"', "1", "2", "-", "```json", "```", "`", "\t",
    *(FORMATS[form].write([call("say", text=text)]) for form in FORMS for text in ("<tool_call>", "</tool_call>")),
]  # fmt: skip
CUTS = st.one_of(st.lists(st.integers(0, 300), max_size=12), st.just(list(range(600))))


def texts(fragments: list[str]) -> st.SearchStrategy[str]:
    letters = st.text(st.characters(codec="utf-8", exclude_categories=["Nd"], exclude_characters='"`'), max_size=3)
    return st.lists(st.one_of(st.sampled_from(fragments), letters), max_size=7).map("".join)


@pytest.mark.parametrize("form", FORMS)
@given(texts(WILD), CUTS)
@example('<tool_call>{"name": "say", "arguments": {"text": "</tool_call>"}}</tool_call>', list(range(99)))
@example("[TOOL_CALLS]12", [13])
@example("[TOOL_CALLS]add[ARGS]12", [22])
@example(f"```json\n{ONE}\n```", [8])
@settings(max_examples=300)
def test_nothing_of_any_text_is_taken_back(form: FormatName, text: str, cuts: list[int]) -> None:
    check_streamed(form, text, cuts)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("before", ["", "Let me see: "])
def test_every_character_on_its_own(form: FormatName, before: str) -> None:
    text = before + FORMATS[form].write([PARIS, SUM, call("say", text='<tool_call> [TOOL_CALLS] {"a": ]}')])
    check_streamed(form, text, range(len(text)))


@pytest.mark.parametrize(
    ("form", "text", "cut"),
    [
        ("hermes", '<tool_call>{"name": "say", "arguments": {"text": "</tool_call>"}}</tool_call>', 62),
        ("hermes", "<tool_call>12</tool_call>", 12),
        ("mistral", "[TOOL_CALLS]12", 13),
        ("mistral_named", "[TOOL_CALLS]add[ARGS]12", 22),
        ("llama3", f"<|python_tag|>\n{ONE}", 15),
        ("llama3", f"```json\n{ONE}\n```", 8),
        ("json", f"```json\n{ONE}\n```", 8),
        ("json", f"```\n{ONE}\n```", 4),
    ],
)
def test_what_can_still_become_a_call_waits(form: FormatName, text: str, cut: int) -> None:
    check_streamed(form, text, [cut])


@pytest.mark.parametrize("form", FORMS)
def test_calls_are_told_as_soon_as_they_are_whole(form: FormatName) -> None:
    reader = ToolReader(TOOLS, FORMATS[form])
    text = FORMATS[form].write([PARIS])
    end = len(text) - len(FORMATS[form].closing)
    assert reader.update(text[: end - 4], finished=False) == ("", ())
    said, [found] = reader.update(text[:end], finished=False)
    assert (said, found.name) == ("", "get_weather")
    assert reader.update(text, finished=False) == ("", ())
    assert reader.update(text, finished=True) == ("", ())


@pytest.mark.parametrize("form", FORMS)
def test_words_are_told_at_once(form: FormatName) -> None:
    reader = ToolReader(TOOLS, FORMATS[form])
    assert reader.update("The sky", finished=False) == ("The sky", ())
    assert reader.update("The sky is blue", finished=False) == (" is blue", ())
    assert reader.update("The sky is blue.", finished=True) == (".", ())


def test_half_a_marker_waits_and_then_is_said() -> None:
    reader = ToolReader(TOOLS, FORMATS["hermes"])
    assert reader.update("a <tool", finished=False) == ("a", ())
    assert reader.update("a <tool is", finished=False) == (" <tool is", ())


def test_a_call_that_is_cut_is_told_at_the_end() -> None:
    reader = ToolReader(TOOLS, FORMATS["hermes"])
    text = '<tool_call>\n{"name": "add", "argu'
    assert reader.update(text, finished=False) == ("", ())
    said, [found] = reader.update(text, finished=True)
    assert said == ""
    assert isinstance(found, InvalidToolCall)
    assert found.name == "add"


# --- grammars ---


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny.byte_pairs(size=400)


@pytest.fixture(scope="module")
def special() -> Any:
    """The markers are special tokens, as with Mistral and Llama."""
    tokenizer = tiny.byte_pairs(size=400)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
    return tokenizer


class Judge:
    """Says of texts whether a grammar takes them, as a tokenizer reads them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.grammars = GrammarTokenizer(tokenizer, len(tokenizer), {1})

    def literal(self, form: FormatName) -> Any:
        return ChatTokenizer(self.tokenizer, form).grammar_literal

    def begins(self, grammar: Grammar | None, text: str, read_by: Any = None) -> bool:
        """Is it the beginning of an answer?"""
        return self._state(grammar, text, read_by) is not None

    def takes(self, grammar: Grammar | None, text: str, read_by: Any = None) -> bool:
        """Is it a whole answer?"""
        state = self._state(grammar, text, read_by)
        return state is not None and bool(state.is_accepting())

    def _state(self, grammar: Grammar | None, text: str, read_by: Any) -> Any:
        assert grammar is not None
        ids = (read_by or self.tokenizer)(text, add_special_tokens=False)["input_ids"]
        state = self.grammars.matcher(grammar).state
        return state if state.try_consume_tokens(ids) == len(ids) else None


@pytest.fixture(scope="module", params=["ordinary markers", "special markers"])
def judge(request: pytest.FixtureRequest, plain: Any, special: Any) -> Judge:
    return Judge(plain if request.param == "ordinary markers" else special)


def several(form: FormatName, *calls: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], ...]:
    """Calls that one answer may have in this form; gpt-oss ends after the first."""
    return () if form == "harmony" else calls


WRONG = [
    call("subtract", a=1, b=2),
    call("add", a=1),
    call("add", a=1, b="2"),
    call("add", a=1, b=2, c=3),
    call("add"),
    call("get_weather", city=3),
    call("get_weathers", city="Paris"),
]


@pytest.mark.parametrize("form", FORMS)
def test_forced_calls_are_of_the_form(judge: Judge, form: FormatName) -> None:
    write = FORMATS[form].write
    grammar = FORMATS[form].grammar(Tools((WEATHER, ADD), "any"), judge.literal(form))
    for calls in ([PARIS], [SUM], *several(form, [PARIS, SUM], [SUM, SUM, SUM]), [call("get_weather", city="Oslo")]):
        assert judge.takes(grammar, write(calls)), calls
        assert not judge.takes(grammar, write(calls)[:-1]), calls
        assert not judge.begins(grammar, write(calls) + " Done.")
        assert not judge.begins(grammar, "Let me see. " + write(calls))
    for wrong in WRONG:
        assert not judge.begins(grammar, write([wrong])), wrong
        assert not judge.begins(grammar, write([SUM, wrong])), wrong
    for text in ("", "Hello.", "{}", "[]", "null"):
        assert not judge.takes(grammar, text), text


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("parallel", [True, False])
def test_a_forced_tool_is_called_once(judge: Judge, form: FormatName, parallel: bool) -> None:
    write = FORMATS[form].write
    grammar = FORMATS[form].grammar(Tools((WEATHER, ADD), "add", parallel), judge.literal(form))
    assert judge.takes(grammar, write([SUM]))
    assert not judge.begins(grammar, write([PARIS]))
    assert not judge.begins(grammar, write([SUM, SUM]))
    assert not judge.begins(grammar, write([SUM, PARIS]))


@pytest.mark.parametrize("form", FORMS)
def test_one_call_at_a_time(judge: Judge, form: FormatName) -> None:
    write = FORMATS[form].write
    for tools in (Tools((WEATHER, ADD), "any", False), Tools((WEATHER, ADD), "auto", False, strict=True)):
        grammar = FORMATS[form].grammar(tools, judge.literal(form))
        assert judge.takes(grammar, write([SUM]))
        assert judge.takes(grammar, write([PARIS]))
        assert not judge.begins(grammar, write([SUM, PARIS]))


@pytest.fixture(scope="module")
def reader(plain: Any) -> Judge:
    return Judge(plain)


@pytest.mark.parametrize("form", FORMS)
@given(TEXTS.filter(lambda text: "\x7f" not in text), st.integers(-(10**9), 10**9))  # llguidance escapes that one
@settings(max_examples=50)
def test_every_string_may_be_an_argument(reader: Judge, form: FormatName, city: str, days: int) -> None:
    grammar = FORMATS[form].grammar(Tools((WEATHER, ADD), "any"), reader.literal(form))
    assert reader.takes(grammar, FORMATS[form].write([call("get_weather", city=city, days=days)]))


@pytest.mark.parametrize("form", FORMS)
def test_odd_names_and_no_parameters(judge: Judge, form: FormatName) -> None:
    write = FORMATS[form].write
    odd = {"type": "function", "function": {"name": 'say_"hällo"-\\n/x'}}
    grammar = FORMATS[form].grammar(Tools((odd,), "any"), judge.literal(form))
    assert judge.takes(grammar, write([call('say_"hällo"-\\n/x')]))
    assert not judge.begins(grammar, write([call('say_"hällo"-\\n/x', more=1)]))


@pytest.mark.parametrize("form", FORMS)
def test_a_free_choice_has_no_grammar(form: FormatName) -> None:
    assert FORMATS[form].grammar(TOOLS, json.dumps) is None


STRICT = Tools((WEATHER, ADD), strict=True)


@pytest.mark.parametrize("form", MARKED)
def test_strict_calls_after_any_text(judge: Judge, form: FormatName) -> None:
    write, opening = FORMATS[form].write, FORMATS[form].opening
    grammar = FORMATS[form].grammar(STRICT, judge.literal(form))
    said = "Two < three, [sic] {ha}\n\n«é😀» </tool"
    for text in ("", said, write([SUM]), *map(write, several(form, [SUM, PARIS]))):
        assert judge.takes(grammar, text), text
    for wrong in WRONG:
        assert not judge.begins(grammar, write([wrong])), wrong
        assert not judge.begins(grammar, said + write([wrong])), wrong
    assert not judge.begins(grammar, f"{said}{opening} hello")
    assert not judge.takes(grammar, said + opening)
    assert not judge.takes(grammar, said + write([SUM])[:-1])


@pytest.mark.parametrize("form", MARKED)
def test_strict_calls_may_follow_any_text(judge: Judge, form: FormatName) -> None:
    write = FORMATS[form].write
    grammar = FORMATS[form].grammar(STRICT, judge.literal(form))
    for said in ("Hello. ", "\n\n", "1 < 2 ", "[sic]", "«é😀»", "</tool", "<", "[", FORMATS[form].opening[:-1]):
        for calls in ([PARIS], *several(form, [SUM, PARIS])):
            assert judge.takes(grammar, said + write(calls)), said


@pytest.mark.parametrize("form", BARE)
def test_strict_bare_calls_come_first(judge: Judge, form: FormatName) -> None:
    write = FORMATS[form].write
    grammar = FORMATS[form].grammar(STRICT, judge.literal(form))
    for text in ("", "Hello {there} [x].", write([SUM]), write([SUM, PARIS]), f"I say {write([WRONG[0]])}"):
        assert judge.takes(grammar, text), text
    for wrong in WRONG:
        assert not judge.begins(grammar, write([wrong])), wrong
        assert not judge.begins(grammar, "\n" + write([wrong])), wrong
        assert not judge.begins(grammar, f"```json\n{write([wrong])}"), wrong
    assert not judge.begins(grammar, '{"x": 1}')


def test_strict_holds_after_a_python_tag_that_is_text(plain: Any) -> None:
    judge = Judge(plain)
    grammar = FORMATS["llama3"].grammar(STRICT, judge.literal("llama3"))
    text = "<|python_tag|>" + FORMATS["llama3"].write([WRONG[0]])
    assert FORMATS["llama3"].parse(text, STRICT).calls
    assert not judge.begins(grammar, text)


@pytest.mark.parametrize("form", MARKED)
def test_strict_holds_after_a_marker_that_is_spelled_out(plain: Any, special: Any, form: FormatName) -> None:
    judge = Judge(special)
    grammar = FORMATS[form].grammar(STRICT, judge.literal(form))
    text = FORMATS[form].write([WRONG[0]])
    assert FORMATS[form].parse(text, STRICT).calls
    assert not judge.begins(grammar, text, read_by=plain)


ANSWER = Grammar.json_schema(
    {"type": "object", "properties": {"mood": {"enum": ["happy", "sad"]}}, "required": ["mood"]}
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strict", [True, False])
def test_calls_or_else_no_text(judge: Judge, form: FormatName, strict: bool) -> None:
    write, tools = FORMATS[form].write, Tools((WEATHER, ADD), strict=strict)
    grammar = FORMATS[form].grammar(tools, judge.literal(form), ANSWER)
    for calls in ([SUM], *several(form, [PARIS, SUM])):
        assert judge.takes(grammar, write(calls)), calls
    for text in (
        "",
        "Hello.",
        '{"mood": "so so"}',
        '{"mood": "sad"} ' + write([SUM]),
        write([SUM]) + '{"mood": "sad"}',
    ):
        assert not judge.takes(grammar, text), text
    for wrong in WRONG:
        assert not judge.begins(grammar, write([wrong])), wrong


@pytest.mark.parametrize("form", FORMS)
def test_the_wanted_answer_instead_of_calls(judge: Judge, form: FormatName) -> None:
    grammar = FORMATS[form].grammar(TOOLS, judge.literal(form), ANSWER)
    for answer in ('{"mood": "sad"}', '{"mood": "happy"}'):
        assert judge.takes(grammar, answer)
        assert FORMATS[form].parse(answer, TOOLS) == ParsedAnswer(answer)


@pytest.mark.parametrize("form", FORMS)
def test_a_forced_call_leaves_no_other_answer(judge: Judge, form: FormatName) -> None:
    grammar = FORMATS[form].grammar(Tools((WEATHER, ADD), "any"), judge.literal(form), ANSWER)
    assert judge.takes(grammar, FORMATS[form].write([SUM]))
    assert not judge.begins(grammar, '{"mood": "sad"}')
