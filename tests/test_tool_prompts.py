"""Chat templates of several families: what form of calls they show, what they make of tools, and whole answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tiny
from conftest import Start

from cards_integrations import CardsLLM
from cards_integrations.chat.grammar import Grammar
from cards_integrations.chat.message import Message
from cards_integrations.chat.template import ChatTokenizer, as_text
from cards_integrations.chat.tools import FormatName, as_tools
from cards_integrations.decoding import Cards, Sampling, Uncertainty
from cards_integrations.engine import Engine, EngineSettings, Request
from cards_integrations.engine.request import Chunk
from cards_integrations.errors import SettingsError
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.settings import LocalModel, Placement
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import FunctionReward, RewardLoader
from cards_integrations.trace import Alignment, ToolCall

QWEN = """
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- '# Tools\n\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' }}{{- tool | tojson }}
    {%- endfor %}
    {{- '\n</tools>\n\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' }}
    {{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- set call = tool_call.function %}
            {{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
LLAMA = """
{%- macro turn(role) %}{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}{%- endmacro %}
{%- if messages[0].role == 'system' %}
    {{- turn('system') }}{{- messages[0].content + '<|eot_id|>' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- turn('assistant') }}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
    {%- elif message.role in ('tool', 'ipython') %}
        {{- turn('ipython') }}{{- message.content | tojson }}{{- '<|eot_id|>' }}
    {%- else %}
        {{- turn(message.role) }}
        {%- if loop.first and tools %}
            {{- 'Given the following functions, please respond with a JSON for a function call.\n\n' }}
            {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\n\n' }}{%- endfor %}
        {%- endif %}
        {{- message.content + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- turn('assistant') }}{%- endif %}
"""
MISTRAL = """
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- set ns = namespace(index=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}
        {%- if (message.role == 'user') != (ns.index % 2 == 0) %}
            {{- raise_exception('After the optional system message, conversation roles must alternate') }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools and message == users[-1] %}
            {{- '[AVAILABLE_TOOLS] ' }}{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' }}
        {%- if loop.last and system is defined %}{{- system + '\n\n' }}{%- endif %}
        {{- message.content + '[/INST]' }}
    {%- elif message.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for tool_call in message.tool_calls %}
            {%- if not tool_call.id is defined or tool_call.id | length != 9 %}
                {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
            {%- endif %}
            {%- set out = tool_call.function | tojson %}
            {{- out[:-1] }}{{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}{{- ', ' }}{%- endif %}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content + eos_token }}
    {%- elif message.role in ('tool', 'tool_results') %}
        {%- if not message.tool_call_id is defined or message.tool_call_id | length != 9 %}
            {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + (message.content | tojson) + ', "call_id": "' }}
        {{- message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}
"""
NAMED = """
{%- if tools %}{{- '[AVAILABLE_TOOLS]' }}{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{- '[SYSTEM_PROMPT]' + message.content + '[/SYSTEM_PROMPT]' }}
    {%- elif message.role == 'user' %}{{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.role == 'tool' %}{{- '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- message.content }}
        {%- for call in message.tool_calls %}
            {{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' }}{{- call.function.arguments | tojson }}
        {%- endfor %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}
"""
JSON = """
{%- if tools %}{{- 'Tools: ' }}{{- tools | tojson }}{{- '\n' }}{%- endif %}
{%- for message in messages %}
    {{- message.role + ': ' + message.content }}
    {%- for call in message.tool_calls %}{{- call.function | tojson }}{%- endfor %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}
"""
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRICT_ROLES = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEMPLATES: dict[str, str | None] = {
    "qwen": QWEN, "llama": LLAMA, "mistral": MISTRAL, "named": NAMED, "json": JSON, "chatml": CHATML,
    "strict roles": STRICT_ROLES, "none": None,
}  # fmt: skip
SHOWN: dict[str, FormatName] = {
    "qwen": "hermes", "llama": "llama3", "mistral": "mistral", "named": "mistral_named", "json": "json"
}  # fmt: skip
MARKERS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"]
TURNS = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "[INST]", "[/INST]"]


def tokenizer_of(template: str | None, markers: str = "special") -> Any:
    """`markers` are special tokens, added ones (as Qwen's are), or spelled with ordinary ones."""
    tokenizer = tiny.byte_pairs('{"name": "get_weather", "arguments": {"city": ', 400)
    tokenizer.chat_template = None if template is None else TEMPLATES[template]
    tokenizer.add_special_tokens({"additional_special_tokens": [*TURNS, *(MARKERS if markers == "special" else ())]})
    if markers == "added":
        tokenizer.add_tokens(MARKERS)
    return tokenizer


def chat_of(template: str | None, markers: str = "special", form: FormatName | None = None) -> ChatTokenizer:
    return ChatTokenizer(tokenizer_of(template, markers), form)


def function(name: str, required: list[str], **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": f"To {name}.", "parameters": parameters}}


WEATHER = function(
    "get_weather",
    ["city", "days"],
    city={"enum": ["Paris", "Köln"]},
    days={"type": "integer", "maximum": 9, "minimum": 0},
)
NOTE = function("note", ["text"], text={"type": "string", "maxLength": 6}, loud={"type": "boolean"})
SCHEMAS = [WEATHER, NOTE]
ARGUMENTS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in SCHEMAS}


def called(call_id: str | None, name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": call_id, "function": {"name": name, "arguments": arguments}}


HISTORY: list[Message] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [called("abcdefgh1", "get_weather", city="Köln", days=2)]},
    {"role": "tool", "content": "Error: no signal", "tool_call_id": "abcdefgh1", "name": "get_weather"},
    {"role": "assistant", "content": "No luck."},
    {"role": "user", "content": "Again!"},
]
TWO_CALLS: list[Message] = [
    {"role": "user", "content": "Both?"},
    {
        "role": "assistant",
        "content": "Sure.",
        "tool_calls": [called("abcdefgh1", "get_weather", city="Paris", days=1), called("abcdefgh2", "note", text="x")],
    },
    {"role": "tool", "content": "rain", "tool_call_id": "abcdefgh1", "name": "get_weather"},
    {"role": "tool", "content": "noted", "tool_call_id": "abcdefgh2", "name": "note"},
]
KOELN = '"arguments": {"city": "Köln", "days": 2}'

# --- the form of a model ---


@pytest.mark.parametrize("markers", ["special", "added", "spelled"])
@pytest.mark.parametrize("template", SHOWN)
def test_the_form_that_a_template_shows(template: str, markers: str) -> None:
    chat = chat_of(template, markers)
    assert chat.knows_tools
    assert chat.tool_format.name == SHOWN[template]


@pytest.mark.parametrize("template", ["chatml", "strict roles", "none"])
def test_templates_without_tools_get_hermes(template: str) -> None:
    chat = chat_of(template)
    assert not chat.knows_tools
    assert chat.tool_format.name == "hermes"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}",  # no tools
        "{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}",  # no calls
        "{{ tools }}{% for m in messages if m.role != 'tool' %}{{ m.content }}{{ m.tool_calls }}{% endfor %}",
        "{{ 1 // 0 }}",
        "{% for m in messages %}{{ m.missing.deeper }}{% endfor %}",
        "{{ nonsense(",
    ],
)
def test_half_of_what_tools_need_is_not_enough(template: str) -> None:
    tokenizer = tokenizer_of(None)
    tokenizer.chat_template = template
    chat = ChatTokenizer(tokenizer)
    assert not chat.knows_tools
    assert chat.tool_format.name == "hermes"


@pytest.mark.parametrize(
    "call", ["{{ {'arguments': f.arguments, 'name': f.name} | tojson }}", '{"name":"{{ f.name }}"}']
)
def test_hermes_with_its_keys_in_another_order_or_spacing(call: str) -> None:
    tokenizer = tokenizer_of(None)
    tokenizer.chat_template = (
        "{{ tools }}{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{% set f = c.function %}"
        f"<tool_call>\n{call}\n</tool_call>{{% endfor %}}{{% endfor %}}"
    )
    chat = ChatTokenizer(tokenizer)
    assert chat.knows_tools
    assert chat.tool_format.name == "hermes"


@pytest.mark.parametrize("form", ["hermes", "mistral", "mistral_named", "llama3", "json"])
@pytest.mark.parametrize("template", ["qwen", "chatml", "none"])
def test_a_form_that_is_named_goes_first(template: str, form: FormatName) -> None:
    chat = chat_of(template, form=form)
    assert chat.tool_format.name == form
    assert chat.knows_tools == (template == "qwen")


def test_a_form_that_nobody_knows() -> None:
    with pytest.raises(SettingsError, match="tool_format"):
        LocalModel.model_validate({"model": "x", "tool_format": "xml"})


def test_the_engine_takes_the_form_of_its_model(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("qwen")
    folder = tiny.save(tmp_path, tiny.causal(vocab_size=len(tokenizer)), tokenizer)
    for form in (None, "llama3"):
        engine = Engine(LocalModel(model=folder, tool_format=form), EngineSettings(dtype="float32"))
        assert engine.loaded().chat.tool_format.name == (form or "hermes")
        engine.close()


def test_a_reward_on_the_same_weights_shares_them_whatever_the_form(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("qwen")
    folder = tiny.save(tmp_path, tiny.causal(vocab_size=len(tokenizer)), tokenizer)
    loader = ModelLoader(Placement(device="cpu", dtype="float32"))
    loader.causal(LocalModel(model=folder, tool_format="json"))
    assert RewardLoader(loader).causal(LocalModel(model=folder), "a reward").is_language_model


# --- prompts of templates that know tools ---


@pytest.mark.parametrize(
    ("template", "tool", "call", "result"),
    [
        (
            "qwen", '<tools>\n{"type": "function", "function": {"name": "get_weather"',
            f'<tool_call>\n{{"name": "get_weather", {KOELN}}}\n</tool_call><|im_end|>',
            "<|im_start|>user\n<tool_response>\nError: no signal\n</tool_response><|im_end|>",
        ),
        (
            "llama", '"name": "get_weather",\n',
            '{"name": "get_weather", "parameters": {"city": "Köln", "days": 2}}<|eot_id|>',
            '<|start_header_id|>ipython<|end_header_id|>\n\n"Error: no signal"<|eot_id|>',
        ),
        (
            "mistral", '[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "get_weather"',
            f'[TOOL_CALLS] [{{"name": "get_weather", {KOELN}, "id": "abcdefgh1"}}]</s>',
            '[TOOL_RESULTS] {"content": "Error: no signal", "call_id": "abcdefgh1"}[/TOOL_RESULTS]',
        ),
        (
            "named", '[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "get_weather"',
            '[TOOL_CALLS]get_weather[ARGS]{"city": "Köln", "days": 2}</s>',
            "[TOOL_RESULTS]Error: no signal[/TOOL_RESULTS]",
        ),
        (
            "json", 'Tools: [{"type": "function", "function": {"name": "get_weather"',
            f'assistant: {{"name": "get_weather", {KOELN}}}\n', "tool: Error: no signal\n",
        ),
    ],
)  # fmt: skip
def test_tools_calls_and_results_in_the_templates_own_way(template: str, tool: str, call: str, result: str) -> None:
    chat = chat_of(template)
    text, ids = chat.prompt(HISTORY, as_tools(SCHEMAS))
    assert tool in text
    assert call in text
    assert result in text
    assert "Be kind." in text
    assert text.index(call) < text.index(result) < text.index("Again!")
    assert ids == chat.encode(text)
    without, _ = chat.prompt(HISTORY)  # a later turn, in which nothing may be called
    assert call in without
    assert result in without
    assert tool not in without
    assert "maxLength" not in without


@pytest.mark.parametrize("template", ["qwen", "mistral", "named", "json"])
def test_several_calls_and_results(template: str) -> None:
    chat = chat_of(template)
    text, _ = chat.prompt(TWO_CALLS, as_tools(SCHEMAS))
    assert text.index('"city": "Paris"') < text.index('"text": "x"') < text.index("rain") < text.index("noted")
    assert "You can call functions" not in text


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_plain_string_with_tools(template: str) -> None:
    chat = chat_of(template)
    text, ids = chat.prompt("Weather?", as_tools(SCHEMAS))
    assert text.count('"get_weather"') == 1
    assert "Weather?" in text
    assert ids == chat.encode(text)
    assert "get_weather" not in chat.prompt("Weather?")[0]


# --- where a template knows no tools, or does not take these messages ---


def told(text: str) -> list[dict[str, Any]]:
    """The functions that our own instruction tells of."""
    assert text.count("You can call functions") == 1
    return [json.loads(line) for line in text.partition("<tools>\n")[2].partition("\n</tools>")[0].splitlines()]


@pytest.mark.parametrize("template", ["chatml", "strict roles", "none"])
@pytest.mark.parametrize("form", ["hermes", "mistral", "mistral_named", "llama3", "json"])
def test_a_system_message_tells_of_tools(template: str, form: FormatName) -> None:
    chat = chat_of(template, form=form)
    text, _ = chat.prompt(HISTORY, as_tools(SCHEMAS))
    assert told(text) == [tool["function"] for tool in SCHEMAS]
    example = [{"function": {"name": "<name>", "arguments": {"<argument>": "<value>"}}}]
    assert chat.tool_format.write(example) in text
    assert text.index("Be kind.") < text.index("You can call functions") < text.index("Weather?")
    call, result = chat.tool_format.write(HISTORY[2]["tool_calls"]), "<tool_response>\nError: no signal"
    assert text.index(call) < text.index(result) < text.index("No luck.") < text.index("Again!")
    assert not any(role in text for role in ("|>tool\n", "tool: ", "Tool: "))


def test_the_instruction_is_a_system_message_of_its_own() -> None:
    text, _ = chat_of("chatml").prompt("Weather?", as_tools(SCHEMAS))
    assert text.startswith("<|im_start|>system\nYou can call functions")
    assert text.endswith("<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("template", ["chatml", "strict roles", "none"])
def test_a_history_with_calls_and_no_tools(template: str) -> None:
    text, _ = chat_of(template).prompt(HISTORY)
    assert "You can call" not in text
    assert f'<tool_call>\n{{"name": "get_weather", {KOELN}}}\n</tool_call>' in text
    assert "<tool_response>\nError: no signal\n</tool_response>" in text


def test_a_template_that_takes_one_call_only() -> None:
    chat = chat_of("llama")
    text, _ = chat.prompt(TWO_CALLS, as_tools(SCHEMAS))
    order = ["Both?", "Sure.", '{"name": "get_weather", "parameters": {"city": "Paris"', '"rain"', '"note"', '"noted"']
    places = [text.rindex(each) for each in order]
    assert places == sorted(places)
    assert "You can call" not in text
    assert text.count("ipython") == 2


@pytest.mark.parametrize("call_id", ["call_12345678", "", "1"])
def test_ids_that_a_template_refuses(call_id: str) -> None:
    history: list[Message] = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [called(call_id, "get_weather", city="Köln", days=2)]},
        {"role": "tool", "content": "sunny", "tool_call_id": call_id, "name": "get_weather"},
    ]
    text, _ = chat_of("mistral").prompt(history, as_tools(SCHEMAS))
    assert "[AVAILABLE_TOOLS]" in text
    [shown] = set(re.findall(r'"(?:call_)?id": "([0-9a-f]{9})"', text))
    assert f'[TOOL_CALLS] [{{"name": "get_weather", {KOELN}, "id": "{shown}"}}]' in text
    assert f'[TOOL_RESULTS] {{"content": "sunny", "call_id": "{shown}"}}' in text


def test_calls_without_ids_for_a_template_that_measures_them() -> None:
    history: list[Message] = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [called(None, "get_weather", city="Köln", days=2)]},
        {"role": "tool", "content": "sunny", "tool_call_id": None, "name": "get_weather"},
    ]
    text, _ = chat_of("mistral").prompt(history, as_tools(SCHEMAS))
    assert "sunny" in text


def test_arguments_that_are_no_object_for_a_template_that_lists_them() -> None:
    tokenizer = tokenizer_of(None)
    tokenizer.chat_template = (
        "{{ tools }}{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}<function={{ c.function.name }}>"
        "{% for key, value in c.function.arguments | items %}{{ key }}={{ value }}{% endfor %}{% endfor %}{% endfor %}"
    )
    chat = ChatTokenizer(tokenizer)
    assert chat.knows_tools
    call = {"type": "function", "id": "a", "function": {"name": "note", "arguments": [1]}}
    text, _ = chat.prompt([{"role": "assistant", "content": "", "tool_calls": [call]}], as_tools(SCHEMAS))
    assert "note" in text


def test_roles_that_do_not_alternate() -> None:
    twice: list[Message] = [{"role": "user", "content": "Weather?"}, {"role": "user", "content": "Please."}]
    text, _ = chat_of("mistral").prompt(twice, as_tools(SCHEMAS))
    assert text.count("[INST]") == 1
    assert text.index("[AVAILABLE_TOOLS]") < text.index("Weather?") < text.index("Please.")


# --- what else meets a conversation with tools ---


@pytest.mark.parametrize("template", TEMPLATES)
def test_those_who_know_no_tools_read_the_same_in_plain_messages(template: str) -> None:
    chat = chat_of(template)
    plain = chat.without_tools(HISTORY)
    assert isinstance(plain, list)
    assert [message["role"] for message in plain] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert all(message.keys() == {"role", "content"} for message in plain)
    assert plain[2]["content"] == chat.tool_format.write(HISTORY[2]["tool_calls"])
    assert plain[3]["content"] == "<tool_response>\nError: no signal\n</tool_response>"
    assert chat.without_tools("Hi.") == "Hi."
    assert chat.without_tools(HISTORY[:2]) == HISTORY[:2]
    assert HISTORY[2]["tool_calls"]  # it is a copy


def test_what_a_call_says_comes_before_it() -> None:
    plain = chat_of("qwen").without_tools(TWO_CALLS)
    assert isinstance(plain, list)
    assert plain[1]["content"].startswith("Sure.\n<tool_call>\n")
    assert plain[1]["content"].count("<tool_call>") == 2


@pytest.mark.parametrize("template", ["qwen", "llama", "mistral", "chatml", "strict roles"])
def test_the_text_around_an_answer_has_the_calls_before_it(template: str) -> None:
    before = chat_of(template).around_answer(HISTORY).before
    assert "get_weather" in before
    assert before.index("Error: no signal") < before.index("Again!")


@pytest.mark.parametrize(
    ("form", "shown"),
    [
        ("hermes", "<tool_call>a</tool_call>b"),
        ("mistral", "a[TOOL_CALLS]b"),
        ("mistral_named", "a[TOOL_CALLS][ARGS]b"),
        ("llama3", "<|python_tag|>ab"),
        ("json", "ab"),
    ],
)
def test_markers_are_text_and_other_special_tokens_are_not(form: FormatName, shown: str) -> None:
    chat = chat_of("chatml", "special", form)
    text = "<|im_start|><|python_tag|><tool_call>a</tool_call>[TOOL_CALLS][ARGS]b<|im_end|></s><pad>"
    assert chat.decode(chat.encode(text)) == shown
    assert chat.decode([]) == ""
    for cut in range(len(chat.encode("«é😀»"))):
        ids = chat.encode("<tool_call>«é😀»")[: cut + 1]
        assert chat.decode(ids).startswith("<tool_call>") == (form == "hermes")


@pytest.mark.parametrize("markers", ["added", "spelled"])
@pytest.mark.parametrize("form", ["hermes", "json"])
def test_markers_that_are_no_special_tokens_are_always_text(markers: str, form: FormatName) -> None:
    chat = chat_of("chatml", markers, form)
    assert chat.decode(chat.encode("<tool_call>a</tool_call>[TOOL_CALLS]b<|im_end|></s>")) == (
        "<tool_call>a</tool_call>[TOOL_CALLS]b"
    )
    assert chat.markers == {}


def test_grammars_write_special_tokens_as_themselves() -> None:
    chat = chat_of("qwen", "special")
    [one, two] = chat.encode("<tool_call></tool_call>")
    assert chat.markers == {one: "<tool_call>", two: "</tool_call>"}
    assert chat.grammar_literal("<tool_call>") == f"<[{one}]>"
    assert chat.grammar_literal("</tool_call>") == f"<[{two}]>"
    assert chat.grammar_literal("<|im_end|>") == '"<|im_end|>"'
    assert chat.grammar_literal('a "b" ä\n') == '"a \\"b\\" ä\\n"'
    assert chat_of("llama", "special").grammar_literal("<tool_call>") == '"<tool_call>"'  # not one of its markers
    assert chat_of("qwen", "spelled").grammar_literal("<tool_call>") == '"<tool_call>"'


# --- whole answers ---

LETTERS = FunctionReward(function=lambda prompt, texts: [sum(map(text.count, "aeiou")) / 4 for text in texts])
CARDS = Cards(target_reward=2.0, beta=0.3, max_rejections=3, boundary=Uncertainty(threshold=4.5, min_length=4))
MODELS: list[tuple[str, str, FormatName | None]] = [
    ("qwen", "special", None),
    ("qwen", "spelled", None),
    ("qwen", "added", None),
    ("qwen", "special", "json"),
    ("llama", "special", None),
    ("llama", "spelled", None),
    ("mistral", "special", None),
    ("mistral", "spelled", None),
    ("named", "special", None),
    ("named", "added", None),
    ("json", "spelled", None),
    ("chatml", "special", None),
    ("chatml", "spelled", "mistral_named"),
    ("strict roles", "special", "json"),
    ("none", "special", "mistral"),
    ("none", "spelled", None),
]


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: " ".join(map(str, model)))
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    template, markers, form = request.param
    tokenizer = tokenizer_of(template, markers)
    model = tiny.causal(vocab_size=len(tokenizer), max_position_embeddings=4096)
    folder = tiny.save(tmp_path_factory.mktemp("model"), model, tokenizer)
    engine = Engine(LocalModel(model=folder, tool_format=form), EngineSettings(dtype="float32"))
    yield engine
    engine.close()


def asked(choice: Any, seed: int = 0, prompt: Any = HISTORY, max_tokens: int = 160, **options: Any) -> Request:
    parallel, schemas = options.pop("parallel", True), options.pop("schemas", SCHEMAS)
    decoding = options.pop("decoding", CARDS)
    return Request(
        prompt, decoding, LETTERS, Sampler(), max_tokens, seed=seed, tools=as_tools(schemas, choice, parallel)
    )


def check_calls(answer: Alignment) -> None:
    """Each whole call has arguments that its tool takes; what is cut is the last one, and there is nothing else."""
    for call in answer.tool_calls:
        jsonschema.validate(call.arguments, ARGUMENTS[call.name])
    if answer.finish_reason == "stop":
        assert answer.tool_calls
        assert answer.invalid_tool_calls == ()
        assert answer.content == ""
    else:
        assert answer.finish_reason == "length"
        assert len(answer.invalid_tool_calls) <= 1
    assert len({call.id for call in answer.tool_calls}) == len(answer.tool_calls)


def test_a_call_is_forced(engine: Engine) -> None:
    answers = engine.run_many([asked("any", seed, parallel=seed % 2 == 0) for seed in range(6)])
    assert any(answer.finish_reason == "stop" for answer in answers)
    for answer in answers:
        check_calls(answer)
    assert all(len(answer.tool_calls) <= 1 for answer in answers[1::2])


@pytest.mark.parametrize("name", ["get_weather", "note"])
def test_one_tool_is_forced(engine: Engine, name: str) -> None:
    answers = engine.run_many([asked(name, seed) for seed in range(3)])
    assert any(answer.finish_reason == "stop" for answer in answers)
    for answer in answers:
        check_calls(answer)
        assert {call.name for call in answer.tool_calls} <= {name}
        assert len(answer.tool_calls) == (answer.finish_reason == "stop")
        assert "get_weather" in engine.loaded().chat.decode(answer.prompt_ids)  # it is told of all of them


def test_no_tool_may_be_called(engine: Engine) -> None:
    [answer] = engine.run_many([asked("none", prompt="Weather?", max_tokens=20)])
    assert answer.prompt_ids == tuple(engine.loaded().chat.prompt("Weather?")[1])
    assert "get_weather" not in engine.loaded().chat.decode(answer.prompt_ids)
    assert (answer.tool_calls, answer.invalid_tool_calls) == ((), ())
    assert answer.content == answer.text


def test_free_and_strict_choices_end(engine: Engine) -> None:
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in SCHEMAS]
    free, held = engine.run_many([asked("auto", 1, max_tokens=40), asked(None, 2, max_tokens=40, schemas=strict)])
    for answer in (free, held):
        assert answer.text
        for call in answer.tool_calls:
            jsonschema.validate(call.arguments, ARGUMENTS[call.name])


def test_calls_are_streamed_as_they_are_read(engine: Engine) -> None:
    *streamed, answer = list(engine.stream(asked("any", 4)))
    assert isinstance(answer, Alignment)
    chunks = [chunk for chunk in streamed if isinstance(chunk, Chunk)]
    assert chunks == streamed
    assert "".join(chunk.text for chunk in chunks) == answer.content
    calls = [call for chunk in chunks for call in chunk.calls]
    assert tuple(call for call in calls if isinstance(call, ToolCall)) == answer.tool_calls
    assert len(calls) == len(answer.tool_calls) + len(answer.invalid_tool_calls)


def test_what_was_called_can_be_answered(engine: Engine) -> None:
    """Calls go back as history, with their results; the next prompt has both."""
    answer = next(a for a in engine.run_many([asked("note", seed) for seed in range(4)]) if a.finish_reason == "stop")
    [call] = answer.tool_calls
    history: list[Message] = [
        {"role": "user", "content": "Note!"},
        {"role": "assistant", "content": answer.content, "tool_calls": [called(call.id, call.name, **call.arguments)]},
        {"role": "tool", "content": "noted down", "tool_call_id": call.id, "name": call.name},
    ]
    chat = engine.loaded().chat
    text, _ = chat.prompt(history, as_tools(SCHEMAS))
    assert "noted down" in text
    assert json.dumps(call.arguments["text"], ensure_ascii=False) in text
    assert ("You can call functions" in text) == (not chat.knows_tools)  # its ids are those that templates take


@pytest.mark.parametrize("choice", ["any", "note"])
def test_markers_that_are_added_tokens_but_not_special(tmp_path: Path, start: Start, choice: str) -> None:
    tokenizer = tokenizer_of("qwen", "added")
    folder = tiny.save(tmp_path, tiny.causal(vocab_size=len(tokenizer), max_position_embeddings=4096), tokenizer)
    for answer in start(folder).run_many([asked(choice, seed) for seed in range(2)]):
        check_calls(answer)


def test_a_constant_that_is_an_added_token(tmp_path: Path, start: Start) -> None:
    tokenizer = tokenizer_of("chatml", "added")
    folder = tiny.save(tmp_path, tiny.causal(vocab_size=len(tokenizer), max_position_embeddings=4096), tokenizer)
    constant = Grammar.json_schema({"const": "a <tool_call> b"})
    answer = start(folder).run(Request("Hi.", CARDS, LETTERS, max_tokens=40, grammar=constant))
    assert json.loads(answer.text) == "a <tool_call> b"


# --- rewards read conversations without tools ---

seen: list[str] = []


def recorded(prompt: str, texts: list[str]) -> list[float]:
    seen.append(prompt)
    return [0.0 for _ in texts]


@pytest.mark.parametrize("template", ["qwen", "mistral", "chatml", "none"])
def test_rewards_read_no_tool_messages(tmp_path: Path, template: str) -> None:
    tokenizer = tokenizer_of(template)
    model = tiny.causal(vocab_size=len(tokenizer), max_position_embeddings=4096)
    folder = tiny.save(tmp_path, model, tokenizer)
    reward = FunctionReward(function=recorded)
    with CardsLLM(model=folder, reward=reward, engine=EngineSettings(dtype="float32"), max_tokens=30) as llm:
        chat = llm._engine({}).loaded().chat
        expected = as_text(chat.without_tools(HISTORY))
        assert "tool_calls" not in expected
        assert "User: <tool_response>\nError: no signal" in expected
        seen.clear()
        llm.align(HISTORY, tools=SCHEMAS, tool_choice="any", decoding=CARDS)
        assert set(seen) == {expected}
        seen.clear()
        assert llm.score(HISTORY, ["Fine.", "Bad."]) == [0.0, 0.0]
        assert set(seen) == {expected}
        seen.clear()
        llm.align("Hi.", tools=SCHEMAS, decoding=CARDS)
        assert set(seen) == {"Hi."}


def test_rewards_read_the_calls_of_an_answer(tmp_path: Path, start: Start) -> None:
    tokenizer = tokenizer_of("qwen")
    folder = tiny.save(tmp_path, tiny.causal(vocab_size=len(tokenizer), max_position_embeddings=4096), tokenizer)
    read: list[str] = []

    def reads(prompt: str, texts: list[str]) -> list[float]:
        read.extend(texts)
        return [1.0 for _ in texts]

    request = asked("get_weather", 1)
    answer = start(folder).run(Request(**{**vars(request), "reward": FunctionReward(function=reads)}))
    assert answer.text in read
    assert answer.text.startswith("<tool_call>\n")


def test_sampling_needs_no_reward_for_calls(tmp_path: Path, start: Start) -> None:
    tokenizer = tokenizer_of("qwen")
    folder = tiny.save(tmp_path, tiny.causal(vocab_size=len(tokenizer), max_position_embeddings=4096), tokenizer)
    answer = start(folder).run(asked("get_weather", 1, decoding=Sampling()))
    check_calls(answer)
    assert answer.reward is None
