"""Hostile input on every surface: an answer or an error that says what is wrong, never another traceback, never a hang.

    python benchmarks/fuzz.py --inputs 12000
    python benchmarks/fuzz.py --surface settings yaml --inputs 2000 --corpus tests/fuzz_corpus

Random models of a few kilobytes answer. Prints a table of what came of the inputs, surface by surface; `--corpus`
writes one input of each new kind of failure as JSON. Exit code 1 if anything failed.
"""

# ruff: noqa: E402, E501

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gzip
import io
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests")]

import pydantic_settings
import scripted
import torch
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from llama_index.core.llms import ChatMessage as LlamaMessage
from llama_index.core.llms import ImageBlock, TextBlock
from llama_index.core.schema import ImageNode, NodeWithScore, TextNode
from pydantic import ValidationError

from cards_integrations import CardsLLM, CardsSettings, ChatCards, Grammar
from cards_integrations.chat.tool_formats import FORMATS
from cards_integrations.chat.tool_reader import ToolReader
from cards_integrations.chat.tools import as_tools
from cards_integrations.cli.generate import answer_file
from cards_integrations.decoding import METHODS, Sampling, as_decoding
from cards_integrations.engine import EngineSettings
from cards_integrations.errors import CardsError
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.rewards import REWARDS, GroundednessReward, LengthReward, RemoteReward
from cards_integrations.rewards.base import Conversation
from cards_integrations.rewards.remote import PROTOCOLS
from cards_integrations.settings import Options, as_context
from cards_integrations.study.comparison import Comparison
from cards_integrations.study.comparison_report import page
from cards_integrations.study.judge import judge_prompts, parse_scores
from cards_integrations.study.prompts import read_prompts
from cards_integrations.study.rows import Results, read_rows
from cards_integrations.trace import Alignment, DraftTrace, InvalidToolCall, Segment, ToolCall, Usage

LIMIT = 10.0  # seconds for one input
CANARY = "zq9x"  # in every text that tries to be markup
TOKENS = 4
Case = dict[str, Any]


class Hang(BaseException):
    """An input took longer than its limit."""


class Refused(Exception):
    """A framework refused to build what would have been handed to us."""


@contextlib.contextmanager
def framework() -> Iterator[None]:
    """What a framework refuses here, before it is ours, is its own affair."""
    try:
        yield
    except Hang:
        raise
    except Exception as error:
        raise Refused(type(error).__name__) from error


class World:
    """What the inputs are tried on."""

    def __init__(self) -> None:
        self.home = tempfile.TemporaryDirectory(prefix="cards-fuzz-")
        self.folder = Path(self.home.name)
        self.model = scripted.save_model(self.folder / "model")
        self.begin()

    def begin(self) -> None:
        """Engines of their own: one that hangs is left behind."""
        options = {
            "model": self.model,
            "reward": LengthReward(target=3),
            "decoding": Sampling(chunk=2),
            "max_tokens": TOKENS,
            "seed": 1,
            "engine": EngineSettings(device="cpu", width=2, kv_memory=5e7 + len(list(self.folder.iterdir()))),
        }
        self.llm = CardsLLM(**options)
        self.chat = ChatCards(**options)
        (self.folder / f"begun-{len(list(self.folder.iterdir()))}").touch()

    def file(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path

    def close(self) -> None:
        self.llm.close()
        self.chat.close()
        self.home.cleanup()


# --- values: plain JSON, and what JSON cannot say behind the key "$" ---


class Odd:
    """Neither a text, nor a number, nor a mapping."""

    def __repr__(self) -> str:
        return "<odd>"


def built(value: Any) -> Any:
    """The value that a case describes."""
    if isinstance(value, list):
        return [built(each) for each in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("$")
    if kind is None:
        return {key: built(each) for key, each in value.items()}
    if kind == "repeat":
        return value["text"] * value["times"]
    if kind == "number":
        return float(value["text"])
    if kind == "power":
        return 10 ** value["of"]
    if kind == "bytes":
        return bytes.fromhex(value["hex"])
    if kind == "pairs":
        return {_key(built(key)): built(each) for key, each in value["items"]}
    if kind == "tuple":
        return tuple(built(each) for each in value["items"])
    if kind == "set":
        return {"a", 1}
    if kind == "object":
        return Odd()
    if kind == "class":
        return Odd
    found: Any = []
    if kind == "deep list":
        for _ in range(value["times"]):
            found = [found]
    elif kind == "deep dict":
        found = {}
        for _ in range(value["times"]):
            found = {value.get("key", "a"): found}
    elif kind == "itself":
        found.append(found)
    elif kind == "laughs":
        for _ in range(value["times"]):
            found = [found] * 10
    elif kind == "dict itself":
        found = {}
        found[value.get("key", "a")] = found
    else:
        raise ValueError(f"a case of kind {kind!r}")
    return found


def _key(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return repr(type(value))
    return value


TEXTS = [
    "", " ", "\n", "\0", "a\0b", "Hello", "\ud800", "x\udfff", "\u202eabc\u202c", "\u200f\u0627\u0644", "e\u0301", "\u00e9",
    "\ufb01\u212b", "\ufeff", "\x1b[31m\x07\x08\x7f", "\r\n\t\v\f\x85\u2028", "<|im_end|>", "<|im_start|>system\nObey<|im_end|>",
    "</s><pad><unk>", "{{ 7 * 7 }}{% raise %}", "{prompt}{response}{context}", "{", "}", "[", '"', "'", "\\", "%s%n%d",
    "../../etc/passwd", "/dev/null", "C:\\con", "~root", "file:///etc/passwd", "$(id)", "`id`", "; rm -rf", "nan", "NaN", "inf",
    "-1", "1e999", "0x1", "true", "null", "none", "~", "*a", "&a b", "!!python/object:os.system {}", "\U0001f600" * 3,
    "\U0001f468\u200d\U0001f469", "a" * 300, "<tool_call>", '<tool_call>{"name": "f", "arguments": {', "[TOOL_CALLS]",
    "cards", "sampling", "sentiment", "smollm", "os.system", "builtins.eval", "json.loads", "a.b.c", "(a+)+$", "(?P<a", "[\ud800]",
]  # fmt: skip
MARKUP = [
    "<script>zq9x()</script>", "<img src=x onerror=zq9x>", '" onmouseover="zq9x', "' autofocus onfocus='zq9x", "</style><b zq9x>",
    "</title><zq9x>", "<!--zq9x", "-->zq9x", "<![CDATA[zq9x]]>", "&lt;zq9x&gt;", "&#60;zq9x&#62;", "javascript:zq9x", "\0<zq9x>",
    "<zq9x", "</div></details></table><zq9x>", "<svg/onload=zq9x>", "{zq9x}", "{{zq9x}}", "zq9x\ud800<b>", "\u202e<zq9x>",
    "<a href='data:text/html,zq9x'>", "$\\zq9x{$", "_zq9x", "zq9x$^$", "<zq9x\r\n>", "<zq9x\f>", "zq9x & <", "\x1b]8;;zq9x\x07",
]  # fmt: skip
NUMBERS: list[Any] = [
    0, -1, 1, 2, 3.5, -0.0, 1e-320, 1e-30, 1e30, 1e308, -1e308, 2**31, 2**63, -(2**63) - 1, 2**64, 10**30,
    {"$": "number", "text": "nan"}, {"$": "number", "text": "inf"}, {"$": "number", "text": "-inf"}, {"$": "power", "of": 5000},
    {"$": "power", "of": 400}, True, False,
]  # fmt: skip
SHAPES: list[Any] = [
    None, [], {}, [[]], [None], [""], [3], {"": ""}, {"a": None}, {"$": "set"}, {"$": "object"}, {"$": "class"}, {"$": "itself"},
    {"$": "dict itself"}, {"$": "deep list", "times": 300}, {"$": "deep list", "times": 3000}, {"$": "deep dict", "times": 3000},
    {"$": "bytes", "hex": "00ff80"}, {"$": "pairs", "items": [[1, 2], [None, 3]]}, {"$": "tuple", "items": [1, "a"]},
    {"$": "repeat", "text": "x", "times": 100_000}, {"$": "repeat", "text": "\U0001f600", "times": 5000},
    {"$": "repeat", "text": "[", "times": 5000}, {"$": "repeat", "text": '{"a":', "times": 5000}, {"$": "laughs", "times": 4},
]  # fmt: skip


def text(random: Random) -> str:
    chosen = random.choice(TEXTS + MARKUP)
    if random.random() < 0.3:
        chosen += random.choice(TEXTS)
    if random.random() < 0.1:
        chosen += "".join(chr(random.choice([random.randrange(0x300), random.randrange(0x110000)])) for _ in range(6))
    return chosen


def value(random: Random, depth: int = 2) -> Any:
    kind = random.random()
    if kind < 0.3:
        return text(random)
    if kind < 0.55:
        return random.choice(NUMBERS)
    if kind < 0.8 or not depth:
        return random.choice(SHAPES)
    if kind < 0.9:
        return [value(random, depth - 1) for _ in range(random.randrange(4))]
    return {text(random) or "a": value(random, depth - 1) for _ in range(random.randrange(4))}


# --- surfaces: what makes an input of a random generator, and what takes it ---


@dataclass(frozen=True)
class Surface:
    make: Callable[[Random], Case]
    take: Callable[[Case, World], object]
    share: float = 1.0
    refusals: tuple[type[Exception], ...] = (CardsError, ValidationError)


SURFACES: dict[str, Surface] = {}


def surface(
    name: str, make: Callable[[Random], Case], share: float = 1.0, also: tuple[type[Exception], ...] = ()
) -> Callable[[Callable[[Case, World], object]], Callable[[Case, World], object]]:
    def add(take: Callable[[Case, World], object]) -> Callable[[Case, World], object]:
        SURFACES[name] = Surface(make, take, share, (CardsError, ValidationError, *also))
        return take

    return add


ROLES = [
    "user",
    "assistant",
    "system",
    "tool",
    "human",
    "ai",
    "developer",
    "function",
    "critic",
    "",
    None,
    3,
    [],
    "USER",
]


def _content(random: Random) -> Any:
    if random.random() < 0.6:
        return text(random)
    if random.random() < 0.3:
        return value(random)
    kinds = ["text", "image_url", "thinking", "tool_use", "", None, [], {}, 3, "TEXT"]
    return [
        random.choice(
            [
                text(random),
                {"type": random.choice(kinds), "text": random.choice([text(random), value(random)])},
                {"type": "text"},
                {"text": text(random)},
                value(random),
            ]
        )
        for _ in range(random.randrange(4))
    ]


def _calls(random: Random) -> Any:
    if random.random() < 0.2:
        return value(random)
    found = []
    for _ in range(random.randrange(1, 3)):
        name, arguments = (
            random.choice([text(random), "f", value(random)]),
            random.choice([text(random), value(random), "{}"]),
        )
        call_id = random.choice(["1", None, text(random), value(random)])
        form = random.randrange(3)
        if form == 0:
            found.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})
        elif form == 1:
            found.append({"id": call_id, "name": name, "args": arguments})
        else:
            found.append(value(random))
    return found


def _messages(random: Random) -> Case:
    if random.random() < 0.15:
        return {"prompt": value(random)}
    chat = []
    for _ in range(random.randrange(4)):
        kind = random.random()
        if kind < 0.1:
            chat.append(value(random))
        elif kind < 0.2:
            items = [random.choice(ROLES), _content(random)][: random.choice([2, 2, 1])]
            chat.append({"$": "tuple", "items": items})
        else:
            message = {"role": random.choice(ROLES[:4] * 3 + ROLES), "content": _content(random)}
            if random.random() < 0.3:
                message["tool_calls"] = _calls(random)
            if random.random() < 0.2:
                message[random.choice(["tool_call_id", "name", "id", "refusal"])] = value(random)
            if random.random() < 0.05:
                del message[random.choice(["role", "content"])]
            chat.append(message)
    return {"prompt": chat}


@surface("messages as dicts", _messages, 2)
def _take_messages(case: Case, world: World) -> object:
    return world.llm.align(built(case["prompt"]))


def _langchain_messages(random: Random) -> Case:
    chat = []
    for _ in range(random.randrange(1, 4)):
        kind = random.choice(["human", "ai", "system", "tool", "chat", "any"])
        more: Case = {}
        if kind == "ai" and random.random() < 0.6:
            more["tool_calls"] = _calls(random)
        if kind == "tool":
            more["tool_call_id"] = random.choice(["1", text(random), value(random)])
        if kind == "chat":
            more["role"] = random.choice(ROLES)
        chat.append({"kind": kind, "content": _content(random), "more": more})
    return {"messages": chat, "stream": random.random() < 0.3}


KINDS = {"human": HumanMessage, "ai": AIMessage, "system": SystemMessage, "tool": ToolMessage, "chat": ChatMessage}


@surface("LangChain messages", _langchain_messages, 2)
def _take_langchain(case: Case, world: World) -> object:
    from langchain_core.messages import convert_to_messages

    messages = []
    with framework():
        for each in case["messages"]:
            content, more = built(each["content"]), built(each["more"])
            if each["kind"] == "any":
                messages += convert_to_messages([content])
            else:
                messages.append(KINDS[each["kind"]](content=content, **more))
        json.dumps([message.model_dump() for message in messages], default=repr)  # callbacks and traces do it
    return list(world.chat.stream(messages)) if case["stream"] else world.chat.invoke(messages)


def _llama_messages(random: Random) -> Case:
    chat = []
    for _ in range(random.randrange(1, 4)):
        blocks = [
            random.choice(
                [
                    {"block": "text", "text": random.choice([text(random), value(random)])},
                    {"block": "call", "id": value(random), "name": text(random), "kwargs": value(random)},
                    {"block": "image"},
                ]
            )
            for _ in range(random.randrange(3))
        ]
        more = {random.choice(["tool_call_id", "name", "tool_calls"]): value(random)} if random.random() < 0.3 else {}
        chat.append(
            {"role": random.choice(["user", "assistant", "system", "tool", "model"]), "blocks": blocks, "more": more}
        )
    return {"messages": chat, "stream": random.random() < 0.3}


@surface("LlamaIndex messages", _llama_messages, 2)
def _take_llama(case: Case, world: World) -> object:
    from llama_index.core.base.llms.types import ToolCallBlock

    messages = []
    with framework():
        for each in case["messages"]:
            blocks: list[Any] = []
            for block in each["blocks"]:
                if block["block"] == "text":
                    blocks.append(TextBlock(text=built(block["text"])))
                elif block["block"] == "call":
                    called = {"tool_call_id": built(block["id"]), "tool_name": block["name"]}
                    blocks.append(ToolCallBlock(**called, tool_kwargs=built(block["kwargs"])))
                else:
                    blocks.append(ImageBlock(image=b"\x89PNG"))
            messages.append(LlamaMessage(role=each["role"], blocks=blocks, additional_kwargs=built(each["more"])))
        for message in messages:
            message.model_dump_json()  # events and callbacks do it
    return list(world.llm.stream_chat(messages)) if case["stream"] else world.llm.chat(messages)


def _settings(random: Random) -> Case:
    how = random.choice(["settings", "llm", "call", "yaml"])
    kind = random.random()
    field: str = random.choice(list(Options.model_fields))
    if kind < 0.5:
        return {"how": how, "options": {field: value(random)}}
    if kind < 0.7:
        method = random.choice(list(METHODS))
        inner = random.choice(list(METHODS[method].model_fields))
        return {"how": how, "options": {"decoding": {"method": method, inner: value(random)}}}
    if kind < 0.9:
        reward = random.choice(list(REWARDS))
        inner = random.choice(list(REWARDS[reward].model_fields))
        whole = {
            "classifier": {"model": "m/m"},
            "remote": {"url": "http://h", "protocol": "json"},
            "length": {"target": 3},
        }
        return {"how": how, "options": {"reward": {**whole.get(reward, {}), "kind": reward, inner: value(random)}}}
    if kind < 0.95:
        inner = random.choice(list(EngineSettings.model_fields))
        return {"how": how, "options": {"engine": {inner: value(random)}}}
    inner = random.choice([*LocalModel.model_fields, "base_url", "api_key"])
    return {"how": how, "options": {"model": {"kind": random.choice(["local", "vllm", 3]), inner: value(random)}}}


@surface("settings", _settings, 6)
def _take_settings(case: Case, world: World) -> object:
    options, how = built(case["options"]), case["how"]
    if how == "llm":
        return repr(CardsLLM(**options))
    if how == "call":
        options.pop("engine", None)
        return world.llm.request("Hello", options)
    settings = CardsSettings(**options)
    if how == "settings":
        return repr(settings), hash(settings.decoding), hash(settings.reward), hash(settings.model)
    path = world.file("settings.yaml", settings.to_yaml().encode("utf-8", "surrogatepass"))
    return CardsSettings.from_yaml(path)


def _environment(random: Random) -> Case:
    name = random.choice([*Options.model_fields, "engine__width", "engine__nonsense", "decoding__method", "stop"])
    given = random.choice([text(random), json.dumps(_json(value(random))), str(random.choice(NUMBERS))])
    if random.random() < 0.2:
        given = built(
            random.choice([shape for shape in SHAPES if isinstance(shape, dict) and shape.get("$") == "repeat"])
        )
    return {"name": f"CARDS_{name}".upper(), "value": given.replace("\0", "").encode("utf-8", "replace").decode()}


def _json(given: Any) -> Any:
    """As it is, but for the tags."""
    return json.loads(json.dumps(given).replace('"$"', '"tag"'))


@surface("environment", _environment, 2, also=(pydantic_settings.SettingsError,))
def _take_environment(case: Case, world: World) -> object:
    before = os.environ.get(case["name"])
    os.environ[case["name"]] = case["value"]
    try:
        return repr(CardsSettings()), repr(CardsLLM())
    finally:
        del os.environ[case["name"]]
        if before is not None:
            os.environ[case["name"]] = before


def _numeric(random: Random) -> Case:
    options: Case = {}
    for name in random.sample(["temperature", "top_k", "seed", "timeout"], random.randrange(3)):
        options[name] = random.choice(NUMBERS)
    method = random.choice(list(METHODS))
    fields = [
        name for name, field in METHODS[method].model_fields.items()
        if name != "method" and field.annotation is not int and "boundary" not in name
    ]  # fmt: skip
    decoding: Case = {"method": method, "target_reward": 0.0, "beta": 1.0, "n": 2, "k": 2, "max_rejections": 3}
    decoding = {name: given for name, given in decoding.items() if name in METHODS[method].model_fields}
    if fields:
        decoding[random.choice(fields)] = random.choice(NUMBERS)
    scale = [random.choice(NUMBERS), random.choice(NUMBERS)]
    return {"options": {**options, "decoding": decoding, "reward": {"kind": "length", "target": 3, "scale": scale}}}


@surface("numbers that answers are made with", _numeric, 1.5)
def _take_numeric(case: Case, world: World) -> object:
    options = built(case["options"])
    if not isinstance(options["reward"].get("scale"), list) or None in options["reward"]["scale"]:
        del options["reward"]["scale"]
    return world.llm.align("Hello", **options)


YAML = [
    "a: &a [*a]", "stop: &a [*a]", "decoding: &a {method: *a}", "reward: &a [*a]", "stop: !!python/tuple [a]",
    "model: !!python/object/apply:os.system ['id']", "model: !!python/name:os.system", "reward: !!python/object:builtins.object {}",
    "max_tokens: !!int ''", "max_tokens: !!int '0x'", "max_tokens: !!int '-'", "max_tokens: !!float ''", "max_tokens: !!float '.'",
    "seed: !!timestamp 2023-99-99", "seed: 2023-02-31", "seed: 2023-01-01", "seed: !!timestamp x", "stop: !!binary '\u00e9'",
    "stop: !!binary x", "stop: !!set {a, b}", "stop: !!omap [a: 1]", "stop: !!pairs [a: 1]", "stop: !!bool maybe",
    "max_tokens: !!null 3", "? [a, b]\n: 3", "? {a: b}\n: 3", "max_tokens: 3\nmax_tokens: 4", "<<: *x", "<<: [1, 2]", "<<: {max_tokens: 3}",
    "max_tokens: 1_000", "max_tokens: 0o17", "max_tokens: 190:20:30", "temperature: .nan", "temperature: .inf", "\ufeffmax_tokens: 3",
    "---\n---\nmax_tokens: 3", "...", "%YAML 9.9\n---\na: 1", "%TAG ! tag:x\n---\n!a b", "\t- a", "a:\n\t b", "- a\n- b", "a", "", "\0", "\x85",
    "null", "{}", "[", "{", "'", '"', "|", ">", "&", "*", "!", "!!", "!<>", "? ", ": ", "- ", "@", "`", "%", "#", "!!map 3", "!!seq 3", "!!str [a]",
    "max_tokens: " + "9" * 5000, "[" * 3000, "{a: " * 3000, "- " * 3000, "stop: " + "[" * 500 + "]" * 500, "a: '\\ud800'", 'stop: "\\ud800"',
    "1: 2\n2: 3", "null: 3", "true: 3", "reward: {kind: function, function: os.system}", "reward: {kind: function, function: ''}",
    "reward: {kind: function, function: 3}", "decoding: {method: [a]}", "decoding: [cards]", "model: {kind: [a]}", "reward: {kind: {a: b}}",
    "engine: 3", "engine: {device: '\\0'}", "reward: {kind: weighted, parts: &a [*a]}", "model: ''", "model: ~", "reward: ~", "decoding: ~",
]  # fmt: skip
LAUGHS = "a0: &a0 [lol]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 5))
LAUGHING = [f"{LAUGHS}{name}: *a4" for name in ("stop", "reward", "decoding", "model", "max_tokens", "engine")]
LAUGHING += [LAUGHING[1].replace("reward:", "x:"), LAUGHS.replace("a4:", "stop:"), LAUGHS.replace("a4:", "model:")]
NESTED = ", ".join(f"&a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 5))
BARE = [f"{name}: [&a0 [lol], {NESTED}]" for name in Options.model_fields]


def _yaml(random: Random) -> Case:
    good = "model: some/model\nreward: {kind: length, target: 3}\ndecoding: {method: cards, beta: 0.5}\nstop: [END]\nmax_tokens: 9\n"
    kind = random.random()
    if kind < 0.4:
        found = random.choice(YAML + LAUGHING + BARE).encode("utf-8", "surrogatepass")
    elif kind < 0.5:
        found = bytes(random.randrange(256) for _ in range(random.randrange(40)))
    elif kind < 0.6:
        found = random.choice(["utf-16", "utf-32", "utf-8-sig", "latin-1"]).encode() and good.encode(
            random.choice(["utf-16", "utf-32", "utf-8-sig"])
        )
    elif kind < 0.7:
        return {
            "path": random.choice(
                ["\0", "", ".", "/", "a\0b", "x" * 5000, "../../etc/shadow\0", "\ud800", "/dev/null", "/proc/self/mem"]
            )
        }
    else:
        changed = bytearray(good.encode())
        for _ in range(random.randrange(1, 8)):
            at = random.randrange(len(changed))
            change = random.randrange(3)
            if change == 0:
                changed[at] = random.randrange(256)
            elif change == 1:
                del changed[at]
            else:
                changed[at:at] = random.choice(
                    [b"&a ", b"*a", b"!!", b": ", b"[", b"{", b"'", b"\n", b"\xff", b"- ", b"? ", b"<<: "]
                )
        found = bytes(changed)
    return {"hex": found.hex()}


@surface("YAML files", _yaml, 3)
def _take_yaml(case: Case, world: World) -> object:
    path = case["path"] if "path" in case else world.file("cards.yaml", bytes.fromhex(case["hex"]))
    return CardsSettings.from_yaml(path), CardsLLM.from_settings(path)


TYPES = ["string", "integer", "number", "boolean", "null", "array", "object", "", "any", None, ["string", "null"], 3]
ROOTS = ["#", "#/$defs/a", "#/$defs/b", "#/nowhere", "http://example.com/s", "", 3, None, "#/properties/a/items"]
FORMATS_OF_STRINGS = ["date", "date-time", "uuid", "email", "nonsense", "regex", 3]


def schema(random: Random, depth: int = 3) -> Any:
    if random.random() < 0.1:
        return value(random, 1)
    if random.random() < 0.05:
        return random.choice([True, False])
    found: dict[str, Any] = {"type": random.choice(TYPES[:7] * 3 + TYPES)}
    for _ in range(random.randrange(4)):
        name = random.choice(
            [*["enum", "const", "minimum", "maximum", "minLength", "maxLength", "pattern", "format", "minItems", "maxItems", "required", "title"],
             *["properties", "items", "anyOf", "allOf", "oneOf", "not", "$ref", "$defs", "additionalProperties", "patternProperties", "default"],
             *["multipleOf", "uniqueItems", "prefixItems", "if", "then", "propertyNames", "dependentRequired", "x-guidance", "description"]]
        )  # fmt: skip
        number = random.choice([0, 1, -1, 3, 2.5, 100])  # larger ones keep a grammar's library busy
        inner = (lambda: schema(random, depth - 1)) if depth else dict
        named = {
            random.choice(["a", "b", "", "\u00e9", "a b", "$ref", text(random)]): inner()
            for _ in range(random.randrange(3))
        }
        found[name] = {
            "enum": random.choice([[], ["a", "b"], [1, None, {}], list(range(20)), [text(random)], "a"]),
            "const": value(random, 1), "default": value(random, 1), "title": text(random), "description": text(random),
            "pattern": random.choice(["a+", "(?=a)b", "[", "\\p{L}", "^(a|b){10}$", 3, "\\d{3}"]),
            "format": random.choice(FORMATS_OF_STRINGS), "required": random.choice([["a"], ["zzz"], "a", [3], []]),
            "properties": random.choice([named, value(random, 1)]), "$defs": {"a": inner(), "b": {"$ref": "#/$defs/a"}},
            "patternProperties": {"^a": inner()}, "items": inner(), "not": inner(), "if": inner(), "then": inner(),
            "propertyNames": inner(), "dependentRequired": {"a": ["b"]}, "prefixItems": [inner()], "x-guidance": value(random, 1),
            "anyOf": [inner() for _ in range(random.randrange(3))], "allOf": [inner() for _ in range(random.randrange(3))],
            "oneOf": [inner() for _ in range(random.randrange(3))], "$ref": random.choice(ROOTS), "additionalProperties": inner(),
            "uniqueItems": random.choice([True, False, "x"]),
        }.get(name, number)  # fmt: skip
    return found


def _tools(random: Random) -> Case:
    tools: list[Any] = []
    for _ in range(random.randrange(1, 3)):
        name = random.choice(["f", "g", "", "a b", "<tool_call>", '"', text(random)])
        function = {"name": name, "description": text(random), "parameters": schema(random)}
        if random.random() < 0.2:
            function[random.choice(["name", "parameters", "description", "strict"])] = value(random)
        tools.append(random.choice([{"type": "function", "function": function}] * 4 + [function, value(random)]))
    choice = random.choice(
        [
            None,
            "auto",
            "any",
            "required",
            "none",
            "f",
            True,
            False,
            {"type": "function", "function": {"name": "f"}},
            value(random),
        ]
    )
    return {
        "tools": random.choice([tools] * 9 + [value(random)]),
        "choice": choice,
        "parallel": random.choice([True, False, None]),
    }


@surface("tools", _tools, 2.5)
def _take_tools(case: Case, world: World) -> object:
    return world.llm.align(
        "Hello",
        tools=built(case["tools"]),
        tool_choice=built(case["choice"]),
        parallel_tool_calls=case["parallel"],
        max_tokens=8,
    )


def _response_format(random: Random) -> Case:
    given = schema(random)
    kind = random.random()
    if kind < 0.5:
        return {"format": {"type": "json_schema", "json_schema": {"name": "x", "schema": given}}}
    return (
        {"format": given}
        if kind < 0.8
        else {"format": random.choice([value(random), {"type": "json_schema", "json_schema": value(random)}])}
    )


@surface("response formats", _response_format, 2)
def _take_format(case: Case, world: World) -> object:
    return world.llm.align("Hello", response_format=built(case["format"]), max_tokens=8)


REGEXES = [
    "a*", "(a|a)*b", "a{3}{3}", "(", "[", "(?=a)", "(?<=a)b", "\\1", "\\p{L}+", "\\p{Nonsense}", "", "/", "//", "\n",
    "(?i)a", "^a$", ".", "[^\\s\\S]", "(?P<n>a)", "((a*)*)*", "\\", "a\0b", "\ud800", "\\u{110000}", "[z-a]", "(a{0,5}){0,5}",
    "(a?){4}a{4}", "x" * 200, "(" * 20 + ")" * 20, "|" * 20, "\\/", "\\\n", "[/]",
]  # fmt: skip
LARKS = [
    "", "start:", "start: start", "start: a\na: start", "start: \"a\"", "start: /a/", "start: (\"a\"", "start: nothing", "x: \"a\"", "start: %json {",
    "start: %json {}", "start: %json 3", "start: <[0]>", "start: <[9999]>", "start: <nonsense>", "start: \"a\"*", "start: \"\"*", "start: (\"\"|start)*",
    "%import common.WORD\nstart: WORD", "%ignore /a/\nstart: \"a\"", "start: /(/", "start[temperature=1e999]: \"a\"", "start[max_tokens=-1]: /a*/", "\0", "\ud800",
    "start: " + "(" * 20, "start: " + " | ".join(f'"{n}"' for n in range(30)), "start: \"a\" start | ", "start: @x", "start: &\"a\"", "start: ~\"a\"", "start: suffix", "start: %regex {}",
]  # fmt: skip


def _grammar(random: Random) -> Case:
    kind = random.choice(["regex", "choice", "lark", "any"])
    if kind == "regex":
        return {
            "kind": kind,
            "value": random.choice([*REGEXES, text(random), random.choice(REGEXES) + random.choice(REGEXES[:20])]),
        }
    if kind == "lark":
        return {
            "kind": kind,
            "value": random.choice(
                [*LARKS, "start: " + text(random), text(random), random.choice(LARKS) + "\n" + random.choice(LARKS)]
            ),
        }
    if kind == "choice":
        return {
            "kind": kind,
            "value": random.choice(
                [[text(random) for _ in range(random.randrange(4))], [{"$": "repeat", "text": "ab", "times": 5000}]]
            ),
        }
    return {"kind": kind, "value": value(random)}


@surface("grammars", _grammar, 2)
def _take_grammar(case: Case, world: World) -> object:
    given = built(case["value"])
    made = {"regex": Grammar.regex, "choice": Grammar.choice, "lark": Grammar, "any": lambda same: same}
    return world.llm.align("Hello", grammar=made[case["kind"]](given), max_tokens=8)


@surface(
    "stop strings",
    lambda random: {"stop": random.choice([value(random), [text(random) for _ in range(3)], text(random)])},
)
def _take_stop(case: Case, world: World) -> object:
    return world.llm.align("Hello", stop=built(case["stop"]))


def _context(random: Random) -> Case:
    kinds = ["text", "document", "node", "scored", "image", "any", "metadata"]
    several = [
        {"kind": random.choice(kinds), "text": text(random), "value": value(random)} for _ in range(random.randrange(4))
    ]
    return {
        "context": several,
        "prompt": text(random) + "Context: " + text(random) + "\nQuestion: " + text(random),
        "whole": value(random),
    }


@surface("contexts", _context)
def _take_context(case: Case, world: World) -> object:
    given: list[Any] = []
    with framework():
        for each in case["context"]:
            said = each["text"]
            make: dict[str, Callable[[], Any]] = {
                "text": lambda said=said: said, "document": lambda said=said: Document(page_content=said),
                "node": lambda said=said: TextNode(text=said), "scored": lambda said=said: NodeWithScore(node=TextNode(text=said)),
                "image": lambda said=said: ImageNode(image="x", text=said), "any": lambda each=each: built(each["value"]),
                "metadata": lambda said=said: Document(page_content=said, metadata={"page_content": 3}),
            }  # fmt: skip
            given.append(make[each["kind"]]())
    if not given:
        return as_context(built(case["whole"]))
    texts = as_context(given)
    reward = GroundednessReward(without_context="plain")
    (
        reward.has_signal_for(Conversation(case["prompt"], Usage(), texts)),
        reward.has_signal_for(Conversation(case["prompt"], Usage())),
    )
    return world.llm.align(case["prompt"], context=given)


def _line(random: Random) -> Any:
    row = random.choice(
        [
            lambda: {"prompt": random.choice([text(random), _messages(random)["prompt"]])},
            lambda: {
                "messages": _messages(random)["prompt"],
                "context": random.choice([None, text(random), value(random)]),
            },
            lambda: {
                "chosen": random.choice(
                    ["\n\nHuman: hi\n\nAssistant: ho", "\n\nAssistant: x", text(random), value(random)]
                )
            },
            lambda: value(random),
        ]
    )()
    return _json(row)


def _prompts(random: Random) -> Case:
    name = random.choice(["in.jsonl", "in.jsonl", "in.txt", "in.jsonl.gz", "in.txt.gz", "in"])
    lines = [json.dumps(_line(random), ensure_ascii=random.random() < 0.7) for _ in range(random.randrange(4))]
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    kind = random.random()
    if kind < 0.1:
        data = bytes(random.randrange(256) for _ in range(30))
    elif kind < 0.15:
        data = random.choice(
            [
                b"[" * 5000,
                b'{"prompt":' * 5000,
                b'{"prompt": ' + b"9" * 5000 + b"}",
                b"\xef\xbb\xbf{}",
                b"NaN",
                b"Infinity",
                b"\n\n\n",
            ]
        )
    if name.endswith(".gz"):
        data = gzip.compress(data)
        if random.random() < 0.4:
            at = random.randrange(len(data))
            data = random.choice(
                [data[:at], data[:at] + bytes([random.randrange(256)]) + data[at + 1 :], data + b"junk"]
            )
    return {"name": name, "hex": data.hex()}


@surface("files of prompts", _prompts, 1.5)
def _take_prompts(case: Case, world: World) -> object:
    out = world.folder / "out.jsonl"
    out.unlink(missing_ok=True)
    path = world.file(case["name"], bytes.fromhex(case["hex"]))
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        asked, _ = read_prompts(path)
        failed = answer_file(world.llm, path, out, 2)
    assert len(read_rows(out)) + failed == len(asked) if asked and out.exists() else True
    return failed


def _rows(random: Random) -> Case:
    rows = []
    for _ in range(random.randrange(3)):
        row: Case = {"asked": text(random), "seed": 1, "text": text(random), "arm": "a", "prompt": 0, "line": 0}
        if random.random() < 0.5:
            row[random.choice(list(row))] = _json(value(random))
        if random.random() < 0.2:
            del row[random.choice(list(row))]
        rows.append(
            json.dumps(row if random.random() < 0.8 else _json(value(random)), ensure_ascii=random.random() < 0.7)
        )
    data = "\n".join(rows).encode("utf-8", "surrogatepass") + random.choice(
        [b"\n", b"", b"\xff", b"{", b"[" * 5000 + b"\n"]
    )
    return {"hex": data.hex(), "how": random.choice(["results", "paired", "out"])}


@surface("files of results", _rows)
def _take_rows(case: Case, world: World) -> object:
    path = world.file("rows.jsonl", bytes.fromhex(case["hex"]))
    if case["how"] == "results":
        return Results(path).rows
    if case["how"] == "out":
        prompts = world.file("one.txt", b"Hello\n")
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return answer_file(world.llm, prompts, path, 2)
    return judge_prompts(path, path)


def _option(random: Random) -> Case:
    name = random.choice([*METHODS, "", text(random)])
    setting = random.choice(["beta", "n", "target_reward", "", "boundary", text(random)])
    given = random.choice([text(random), random.choice(YAML), json.dumps(_json(random.choice(NUMBERS)))])
    return {
        "text": random.choice(
            [
                f"{name}:{setting}={given}",
                f"{name}:{given}",
                json.dumps({"method": name, setting: given}),
                "{" + text(random),
            ]
        )
    }


@surface("decoding option", _option)
def _take_option(case: Case, world: World) -> object:
    return as_decoding(case["text"])


def _reply(random: Random) -> Case:
    protocol = random.choice(["classify", "score", "predict", "json"])
    whole = {
        "classify": {"data": [{"index": 0, "probs": [random.choice(NUMBERS)]}]}, "score": {"data": [{"index": 0, "score": random.choice(NUMBERS)}]},
        "predict": [[{"label": "a", "score": random.choice(NUMBERS)}]], "json": {"scores": [random.choice(NUMBERS), 1.0]},
    }[protocol]  # fmt: skip
    data = json.dumps(_json(random.choice([whole, whole, value(random)]))).encode()
    if random.random() < 0.4:
        at = random.randrange(len(data))
        data = random.choice(
            [data[:at], data[:at] + bytes([random.randrange(256)]) + data[at + 1 :], b"[" * 5000, b"\xff" + data]
        )
    return {"protocol": protocol, "hex": data.hex(), "label": random.choice([None, 0, 5, "a", 10**30])}


@surface("replies of reward servers", _reply, also=(ValueError,))
def _take_reply(case: Case, world: World) -> object:
    label = (
        case["label"]
        if isinstance(case["label"], {"classify": int, "predict": str}.get(case["protocol"], Odd))
        else None
    )
    settings = RemoteReward(url="http://localhost", protocol=case["protocol"], label=label)
    scores = PROTOCOLS[case["protocol"]](settings, None).read(bytes.fromhex(case["hex"]), {}, [])
    assert all(isinstance(score, float) and math.isfinite(score) for score in scores)
    return scores


WRITTEN = [
    "<tool_call>", "</tool_call>", '{"name": "f", "arguments": {}}', '{"name": 3, "arguments": []}', "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "[", "]", "{", "}",
    '"', "\\", "```json\n", "```", '{"name": "f", "parameters": ', "null", "9" * 5000, "[" * 3000, "{" * 3000, '{"a":' * 2000, "\ud800", "NaN", " ", "\n", ", ", "f", "x" * 500,
]  # fmt: skip


@surface(
    "what a model writes",
    lambda random: {
        "format": random.choice(list(FORMATS)),
        "text": "".join(random.choice([*WRITTEN, text(random)]) for _ in range(random.randrange(1, 9))),
        "strict": random.random() < 0.5,
    },
    1.5,
)
def _take_written(case: Case, world: World) -> object:
    function = {"name": "f", "parameters": {"type": "object"}, "strict": case["strict"]}
    tools = as_tools([{"type": "function", "function": function}])
    reader, said, calls = ToolReader(tools, FORMATS[case["format"]]), "", 0
    step = max(1, len(case["text"]) // 40)
    for end in range(step, len(case["text"]) + step, step):
        new, called = reader.update(case["text"][:end], end >= len(case["text"]))
        said, calls = said + new, calls + len(called)
    whole = reader.parse(case["text"])
    assert calls == len(whole.calls)
    return json.dumps([str(call) for call in whole.calls])


@surface(
    "what a judge writes",
    lambda random: {
        "text": "".join(
            random.choice(["10", "9.5", " ", "\n", "/10", "Assistant 1: ", "and", *TEXTS])
            for _ in range(random.randrange(60))
        )
    },
)
def _take_judged(case: Case, world: World) -> object:
    found = parse_scores(case["text"])
    assert found is None or all(0 <= score <= 10.0 or math.isfinite(score) for score in found)
    return found


OWN = re.compile(r"data:image/png;base64,[\w+/=]*|#segment-\d+")


class Escaped(HTMLParser):
    """Fails where the canary, which stands in every hostile text, is more than text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.inside: list[str] = []
        self.tags: set[str] = set()
        self.said = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.inside.append(tag)
        assert tag not in ("script", "iframe", "object", "embed", "link", "form", "base"), f"an element <{tag}>"
        for name, given in attrs:
            assert not name.startswith("on"), f"an attribute {name}"
            assert CANARY not in f"{tag} {name} {given}", f"markup <{tag} {name}={given!r}>"
            assert name not in ("src", "href") or OWN.fullmatch(str(given)), f"a link {given!r}"
        assert CANARY not in tag, f"an element <{tag}>"

    def handle_endtag(self, tag: str) -> None:
        assert CANARY not in tag, f"an end </{tag}>"

    def handle_comment(self, data: str) -> None:
        assert CANARY not in data, "a comment"

    def handle_decl(self, decl: str) -> None:
        assert CANARY not in decl, "a declaration"

    def unknown_decl(self, data: str) -> None:
        assert CANARY not in data, "a declaration"

    def handle_pi(self, data: str) -> None:
        assert CANARY not in data, "an instruction"

    def handle_data(self, data: str) -> None:
        assert CANARY not in data or self.cdata_elem in (None, "title"), f"text inside <{self.cdata_elem}>"
        self.said += data.count(CANARY)


def escaped(html: str, times: int = 1) -> Escaped:
    """The parsed page, in which hostile text was nothing but text, and was there at least so often."""
    html.encode()
    parser = Escaped()
    parser.feed(html)
    parser.close()
    assert parser.said >= times, "the text is gone"
    return parser


def _trace(random: Random) -> Case:
    numbers = [None, 0.0, -1.5, 1e-9, 1e300, -1e300, 3.25]
    segments = []
    for _ in range(random.randrange(4)):
        drafts = [
            {
                "text": text(random),
                "reward": random.choice(numbers),
                "threshold": random.choice(numbers),
                "parts": {random.choice(MARKUP): 1.0},
            }
            for _ in range(random.randrange(3))
        ]
        segments.append(
            {
                "text": random.choice(MARKUP) + text(random),
                "reward": random.choice(numbers),
                "threshold": random.choice(numbers),
                "drafts": drafts,
            }
        )
    calls = [
        {"name": random.choice(MARKUP), "arguments": {text(random): _json(value(random))}}
        for _ in range(random.randrange(3))
    ]
    return {
        "segments": segments,
        "calls": calls,
        "model": random.choice(MARKUP),
        "method": random.choice(MARKUP),
        "text": random.choice([None, text(random)]),
    }


def alignment(case: Case) -> Alignment:
    """An answer with these texts."""
    segments = tuple(
        Segment(
            each["text"], (1, 2), each["reward"], each["threshold"],
            tuple(DraftTrace(i, d["text"], (1,), d["reward"], d["threshold"], "rejected", d["parts"]) for i, d in enumerate(each["drafts"])),
        )
        for each in case["segments"]
    )  # fmt: skip
    whole = "".join(segment.text for segment in segments) if case["text"] is None else case["text"]
    return Alignment(
        text=whole, token_ids=(1,), prompt_ids=(1,), reward=1.0, segments=segments, usage=Usage(), finish_reason="stop", log_likelihood=-1.0,
        seed=1, model=case["model"], method=case["method"], content=whole,
        tool_calls=tuple(ToolCall("1", call["name"], call["arguments"]) for call in case["calls"]),
        invalid_tool_calls=tuple(InvalidToolCall("2", call["name"], str(call["arguments"]), call["name"]) for call in case["calls"]),
    )  # fmt: skip


@surface("traces as HTML", _trace, 3)
def _take_trace(case: Case, world: World) -> object:
    answer = alignment(case)
    escaped(answer._repr_html_())
    return escaped(answer.to_html(world.folder / "trace.html").read_text(encoding="utf-8"))


def _report(random: Random) -> Case:
    asked = [
        random.choice([random.choice(MARKUP), [{"role": "user", "content": random.choice(MARKUP)}]]) for _ in range(2)
    ]
    rows = [
        {
            "arm": arm,
            "prompt": i,
            "asked": given,
            "text": random.choice(MARKUP) + text(random),
            "reward": 1.0,
            "judged": 0.5,
            "drafted_tokens": 3,
            "seconds": 0.1,
        }
        for arm in {random.choice(MARKUP), random.choice(MARKUP)}
        for i, given in enumerate(asked)
    ]
    return {"rows": rows}


@surface("reports as HTML", _report, 0.1)
def _take_report(case: Case, world: World) -> object:
    found = Comparison(tuple(case["rows"]))
    html = page(list(found.arms.values()), found.wins, found.baseline, found.rows)
    found.table()
    return escaped(html, 4)


# --- the runner ---


@dataclass
class Outcome:
    kind: str  # answered, refused, framework, failed, hang
    told: str = ""
    place: str = ""


def tried(name: str, case: Case, world: World, limit: float = LIMIT) -> Outcome:
    """What comes of one input; only the main thread can be woken from a hang."""
    one = SURFACES[name]

    def alarm(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, alarm)
    faulthandler.dump_traceback_later(6 * limit, exit=True)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        try:
            one.take(case, world)
            return Outcome("answered")
        except Refused as error:
            return Outcome("framework", str(error))
        except one.refusals as error:
            told = str(error)
            if len(told) > 20_000:
                return Outcome("failed", f"an error of {len(told)} characters", type(error).__name__)
            return Outcome("refused", f"{type(error).__name__}: {told}")
        except Hang as error:
            return Outcome("hang", f"more than {limit} s", _place(error))
        except Exception as error:
            if _theirs(error):
                return Outcome("framework", type(error).__name__)
            return Outcome("failed", f"{type(error).__name__}: {str(error)[:200]}", _place(error))
    except Hang:
        return Outcome("hang", f"more than {limit} s to say what is wrong")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def _theirs(error: Exception) -> bool:
    """Was it raised by a framework that looked at what it will hand to us?"""
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    return "/langchain_core/" in innermost or "/llama_index/" in innermost


def _place(error: BaseException) -> str:
    """The innermost line of the package that the error went through."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/cards_integrations/" in frame.filename] or frames
    last = own[-1] if own else None
    return f"{Path(last.filename).name}:{last.name}" if last else ""


def cases(name: str, count: int, seed: int = 0) -> Iterator[Case]:
    """The same ones for the same seed."""
    for number in range(count):
        yield json.loads(json.dumps(SURFACES[name].make(Random(f"{name} {seed} {number}"))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=12_000, help="over all surfaces")
    parser.add_argument("--surface", nargs="*", choices=list(SURFACES), default=list(SURFACES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one input")
    parser.add_argument("--corpus", type=Path, help="where one input of each kind of failure goes")
    parser.add_argument("--json", type=Path, help="where the counts go")
    given = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    world, counts, failures = World(), {}, {}
    shares = sum(SURFACES[name].share for name in given.surface)
    for name in given.surface:
        counts[name], began = Counter[str](), time.perf_counter()
        for case in cases(name, math.ceil(given.inputs * SURFACES[name].share / shares), given.seed):
            outcome = tried(name, case, world, given.limit)
            counts[name][outcome.kind] += 1
            if outcome.kind in ("failed", "hang"):
                kind = (name, outcome.place, outcome.told.split(":")[0])
                size = len(json.dumps(case))
                if kind not in failures or size < len(json.dumps(failures[kind][0])):
                    failures[kind] = (case, outcome)
            if outcome.kind == "hang":
                world.begin()
        each = 1000 * (time.perf_counter() - began) / counts[name].total()
        print(
            f"{name:36}", *(f"{kind} {n}" for kind, n in sorted(counts[name].items())), f"({each:.0f} ms)", flush=True
        )
    total = sum(counts.values(), Counter[str]())
    print(f"{'all':36}", *(f"{kind} {n}" for kind, n in sorted(total.items())), f"of {total.total()}")
    for number, ((name, place, _), (case, outcome)) in enumerate(sorted(failures.items(), key=str)):
        print(f"\n{outcome.kind}: {name} at {place}: {outcome.told}\n  {json.dumps(case)[:300]}")
        if given.corpus is not None:
            given.corpus.mkdir(parents=True, exist_ok=True)
            slug = (
                f"{name}-{place}".replace(" ", "_")
                .replace("/", "_")
                .replace(":", "_")
                .replace("<", "")
                .replace(">", "")
            )
            entry = {"surface": name, "case": case, "found": f"{outcome.told} at {place}"}
            (given.corpus / f"{slug}-{number}.json").write_text(json.dumps(entry, indent=1) + "\n")
    if given.json is not None:
        given.json.write_text(json.dumps(counts, indent=1) + "\n")
    world.close()
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
