"""How models write thoughts before an answer: the marks around them, and what chat templates write beside these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from cards_integrations.chat.message import Message

ThinkingMode = Literal["off", "free", "aligned"]

KEYS = ("reasoning_content", "thinking", "reasoning")
"""The keys under which chat templates look for the thoughts of an earlier message."""
SWITCHES = ("enable_thinking", "thinking")
"""The arguments of chat templates that turn thinking on and off."""
_THOUGHT, _ANSWER = "probed thought", "probed answer"


@dataclass(frozen=True)
class ThinkingFormat:
    """How a model writes its thoughts: `opening` `before` thoughts `lead` `closing` `after` `channel` answer.

    Attributes:
        opening: The mark before the thoughts.
        closing: The mark after them.
        before: The text of the template between the opening and the thoughts.
        lead: The text of the template between the thoughts and the closing.
        after: The text of the template between the closing and the answer.
        channel: The mark before every answer, with or without thoughts; a call has another mark in its place. "" for
            none.
        key: The key under which the template looks for the thoughts of an earlier message; None if it shows none.
    """

    opening: str
    closing: str
    before: str = ""
    lead: str = ""
    after: str = ""
    channel: str = ""
    key: str | None = None

    def is_open(self, prompt: str) -> bool:
        """True if a prompt ends within thoughts that its template has opened."""
        return prompt.rstrip().endswith(self.opening)

    def is_closed(self, prompt: str) -> bool:
        """True if a prompt ends with thoughts that its template has closed already."""
        return prompt.rstrip().endswith(self.closing)

    def can_open(self, text: str) -> bool:
        """True if an answer that begins with this text has opened thoughts, or may still do so."""
        text = text.lstrip()
        return text.startswith(self.opening) or self.opening.startswith(text)

    def opens(self, text: str) -> bool:
        """True if an answer that begins with this text has opened thoughts."""
        return text.lstrip().startswith(self.opening)

    def close(self, thoughts: str, by_model: bool) -> str:
        """Return the text between the thoughts and the answer.

        Args:
            thoughts: The thoughts.
            by_model: True if the model ended them, and so has written its own `lead`.
        """
        lead = "" if by_model or thoughts.endswith(self.lead) else self.lead
        return f"{lead}{self.closing}{self.after}"

    def without_thoughts(self, prompt: str, switched: Callable[[], bool]) -> str:
        """Return what to append to a prompt so that the model does not think.

        Args:
            prompt: The rendered prompt.
            switched: Returns True if an argument of the template has turned thinking off.
        """
        closed = f"{self.lead}{self.closing}{self.after}"
        if self.is_open(prompt):
            return closed
        if self.channel or self.is_closed(prompt) or switched():
            return ""
        return f"{self.opening}{self.before}{closed}"


KNOWN = (
    ThinkingFormat("<think>", "</think>", "\n", "\n", "\n\n"),  # Qwen, DeepSeek, GLM, SmolLM, Granite, Nemotron, Kimi
    ThinkingFormat(  # gpt-oss (harmony)
        "<|channel|>analysis<|message|>",
        "<|end|>",
        after="<|start|>assistant",
        channel="<|channel|>final<|message|>",
    ),
    ThinkingFormat("<|channel>thought", "<channel|>", "\n"),  # Gemma 4
    ThinkingFormat("[THINK]", "[/THINK]"),  # Mistral
    ThinkingFormat("<|START_THINKING|>", "<|END_THINKING|>"),  # Command
    ThinkingFormat("<seed:think>", "</seed:think>", "\n", "\n", "\n"),
)
"""The marks of known families, with the text around them for templates that show no thoughts."""


def thinking_format(template: str, render: Callable[[list[Message]], str]) -> ThinkingFormat | None:
    """Find out from a chat template how its model writes thoughts.

    Args:
        template: The template's source.
        render: Renders messages with it.

    Returns:
        The format; None if the template has none of the known marks.
    """
    found = next((known for known in KNOWN if known.opening in template or known.closing in template), None)
    return None if found is None else _as_shown(found, render)


def _as_shown(known: ThinkingFormat, render: Callable[[list[Message]], str]) -> ThinkingFormat:
    """Return the format with the text that this template writes around thoughts, if it shows them."""
    for key in KEYS:
        probe = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": _ANSWER, key: _THOUGHT}]
        try:
            shown = render(probe)
        except Exception:  # a template may raise anything
            continue
        start, answer = shown.find(_THOUGHT), shown.rfind(_ANSWER)
        opening = shown.rfind(known.opening, 0, max(0, start))
        if start < 0 or opening < 0:
            continue
        before = shown[opening + len(known.opening) : start]
        between = shown[start + len(_THOUGHT) : answer].removesuffix(known.channel)
        lead, closing, after = between.partition(known.closing)
        if closing and not before.strip() and not lead.strip():
            return replace(known, before=before, lead=lead, after=after, key=key)
        return replace(known, key=key)
    return known


def switches(mode: ThinkingMode | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a chat template for a mode of thinking, with the given ones, which take precedence."""
    return {**({} if mode is None else dict.fromkeys(SWITCHES, mode != "off")), **given}
