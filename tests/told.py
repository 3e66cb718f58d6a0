"""A script for a scripted model: the user says what it will write.

A message has its answers in turn, separated by `THEN`; `$1` in them is what the first tool gave back.
Of answers separated by `OR` a grammar takes the first that it lets through.
"""

from __future__ import annotations

import json
from typing import Any

from cards_integrations.chat.message import Message

THEN, OR = "\n=== then ===\n", "\n=== or ===\n"
OBSERVED = "Observation: "  # how a ReAct agent tells a result, as the user


def as_told(prompt: str | list[Message]) -> list[str]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    asked = max(i for i, message in enumerate(messages) if message["role"] == "user" and not _observed(message))
    since = messages[asked + 1 :]
    answers = messages[asked]["content"].split(THEN)
    answer = answers[min(sum(message["role"] == "assistant" for message in since), len(answers) - 1)]
    results = [message for message in since if message["role"] == "tool" or _observed(message)]
    for i, message in enumerate(results):
        answer = answer.replace(f"${i + 1}", message["content"].removeprefix(OBSERVED))
    return answer.split(OR)


def _observed(message: Message) -> bool:
    return bool(message["content"].startswith(OBSERVED))


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def call(name: str, /, **arguments: Any) -> str:
    """In the form of models whose template knows no tools."""
    return f"<tool_call>\n{dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def steps(llm: Any) -> int:
    """Decode steps of the model so far."""
    return llm.inspect().steps
