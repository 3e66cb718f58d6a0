"""Do answers in a grammar hold their form, and what does it cost?

    python benchmarks/structured.py [--parts schemas tools cost]

    schemas  200 answers of SmolLM2, each to a random JSON schema: they validate, or say that they were cut
    tools    100 answers with tool_choice="any" and 100 with a named tool: valid calls
    cost     time of a step with a grammar over one without, for one answer and for 16 at once

Writes results/structured.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
from rich.console import Console

from cards_integrations import CardsLLM, Grammar
from cards_integrations.decoding import Cards, Sampling
from cards_integrations.trace import Alignment

RESULTS = Path(__file__).parent / "results" / "structured.json"
NAMES = ("name", "city", "count", "tags", "price", "active", "kind", "note", "parent", "size")
WORDS = ("red", "green", "small", "large", "cat", "dog", "north", "south")
FREE = Grammar.regex(r"(?s:.*)")
TOOLS: list[dict[str, Any]] = [
    {"name": "get_weather", "description": "The weather in a city", "parameters": {
        "type": "object", "required": ["city"],
        "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}}}},
    {"name": "add", "description": "Add two numbers", "parameters": {
        "type": "object", "required": ["a", "b"], "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}},
    {"name": "send_message", "description": "Send a message to several people", "parameters": {
        "type": "object", "required": ["to", "text"],
        "properties": {"to": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
                       "text": {"type": "string"}}}},
    {"name": "set_alarm", "description": "Set an alarm", "parameters": {
        "type": "object", "required": ["hour", "minute"],
        "properties": {"hour": {"type": "integer", "minimum": 0, "maximum": 23},
                       "minute": {"type": "integer", "minimum": 0, "maximum": 59}, "daily": {"type": "boolean"}}}},
    {"name": "now", "description": "The time", "parameters": {"type": "object", "properties": {}}},
]  # fmt: skip
ASKED = (
    "What is the weather in Oslo?", "What is 17 plus 25?", "Tell Ann and Bob that I am late.",
    "Wake me at half past six every day.", "What time is it?", "Is it raining in Lima?", "Add 3 and 4, please.",
    "Write to Carla: happy birthday!", "I have to get up at 5:15 tomorrow.", "How late is it now?",
)  # fmt: skip


def schema(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    """A random JSON schema of an object."""
    names = draw.sample(NAMES, draw.randint(1, 4))
    required = [name for name in names if draw.random() < 0.7] or names[:1]
    properties = {name: value(draw, depth + 1) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def value(draw: random.Random, depth: int) -> dict[str, Any]:
    kinds: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": "string"},
        lambda: {"type": "string", "maxLength": draw.randint(1, 12)},
        lambda: {"type": "string", "pattern": draw.choice([r"^[A-Z]{2}-\d{3}$", r"^\d{4}-\d{2}-\d{2}$"])},
        lambda: {"type": "string", "format": draw.choice(["date", "email", "uuid", "ipv4"])},
        lambda: {"enum": draw.sample(WORDS, draw.randint(1, 4))},
        lambda: {"const": draw.choice([*WORDS, 7, True, None])},
        lambda: {"type": "integer"},
        lambda: {"type": "integer", "minimum": draw.randint(-9, 9), "maximum": draw.randint(10, 1000)},
        lambda: {"type": "number"},
        lambda: {"type": "boolean"},
        lambda: {"anyOf": [{"type": "null"}, value(draw, depth)]},
        lambda: {"type": ["integer", "string"]},
    ]
    if depth < 3:
        kinds += [lambda: schema(draw, depth)] * 3
        kinds += [
            lambda: {"type": "array", "items": value(draw, depth + 1), "minItems": draw.randint(0, 2), "maxItems": 3}
        ] * 3
    return draw.choice(kinds)()


def schemas(llm: CardsLLM, say: Callable[[str], None], n: int = 200, at_once: int = 20) -> dict[str, Any]:
    """Each schema is told to the model and enforced; every tenth answer is guided by CARDS."""
    draw, kinds = random.Random(0), Counter[str]()
    for first in range(0, n, at_once):
        wanted = [schema(draw) for _ in range(at_once)]
        engine = llm.engine_for({}, llm)
        requests = []
        for i, each in enumerate(wanted):
            decoding = Cards(max_rejections=3) if i % 10 == 0 else Sampling()
            own = {"response_format": each, "seed": first + i, "decoding": decoding, "max_tokens": 160}
            requests.append(llm.request("Invent an example of such a record.", own))
        for answer, each in zip(engine.run_many(requests), wanted, strict=True):
            kinds[judged(answer, each)] += 1
    say(f"{n} random schemas: {dict(kinds)}")
    return dict(kinds)


def judged(answer: Alignment, wanted: dict[str, Any]) -> str:
    cut = answer.finish_reason == "length"
    try:
        jsonschema.validate(json.loads(answer.text), wanted, format_checker=jsonschema.FormatChecker())
    except (ValueError, jsonschema.ValidationError) as error:
        return "cut, and said so" if cut else f"wrong: {type(error).__name__} {answer.text!r} {wanted}"
    return "valid, closed at the limit" if cut else "valid"


def tools(llm: CardsLLM, say: Callable[[str], None]) -> dict[str, Any]:
    """Ten questions, ten seeds; of the named tool one after another."""
    parameters = {tool["name"]: tool["parameters"] for tool in TOOLS}
    found = {}
    for kind in ("any", "named"):
        counts, right = Counter[str](), 0
        for number, question in enumerate(ASKED):
            name = "any" if kind == "any" else TOOLS[number % len(TOOLS)]["name"]
            answers = llm.align_batch(
                [question] * 10, range(10), tools=TOOLS, tool_choice=name, parallel_tool_calls=kind == "named",
                decoding=Sampling(), max_tokens=160,
            )  # fmt: skip
            for answer in answers:
                counts[called(answer, name, parameters)] += 1
                right += any(call.name == TOOLS[number % len(TOOLS)]["name"] for call in answer.tool_calls)
        found[kind] = {**counts, "the tool that the question is about": right}
        say(f"tool_choice {kind}: {found[kind]}")
    return found


def called(answer: Alignment, name: str, parameters: dict[str, Any]) -> str:
    if not answer.tool_calls or answer.invalid_tool_calls:
        return f"no call: {answer.text!r}"
    for call in answer.tool_calls:
        if name not in ("any", call.name):
            return f"another tool: {answer.text!r}"
        jsonschema.validate(call.arguments, parameters[call.name])
    return "valid, closed at the limit" if answer.finish_reason == "length" else "valid"


def cost(llm: CardsLLM, say: Callable[[str], None], repeats: int = 7) -> dict[str, Any]:
    """The same answers with no grammar, with one that allows everything, and with a JSON schema."""
    person = schema(random.Random(3))
    kinds: dict[str, dict[str, Any]] = {
        "no grammar": {}, "any text": {"grammar": FREE}, "JSON schema": {"grammar": Grammar.json_schema(person)},
    }  # fmt: skip
    found = {}
    for n in (1, 16):
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for repeat in range(repeats + 1):
            for kind, options in kinds.items():
                answers = llm.align_batch(
                    ["Tell me about cats."] * n, range(n), decoding=Sampling(), max_tokens=48, **options
                )
                steps = max(answer.usage.lm_forwards for answer in answers)
                if repeat:
                    seconds[kind].append(max(answer.usage.seconds for answer in answers) / steps)
        plain = seconds["no grammar"]
        found[f"{n} at once"] = {
            kind: {
                "milliseconds a step": 1000 * statistics.median(own),
                "ratio": statistics.median(a / b for a, b in zip(own, plain, strict=True)),
            }
            for kind, own in seconds.items()
        }
        say(f"{n} at once: {json.dumps(found[f'{n} at once'])}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["schemas", "tools", "cost"])
    console = Console()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    llm = CardsLLM()
    for part in parser.parse_args().parts:
        results[part] = {"schemas": schemas, "tools": tools, "cost": cost}[part](llm, console.print)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
