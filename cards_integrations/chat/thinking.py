"""Thoughts before an answer: the marks around them, and how a chat template opens, closes and shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from cards_integrations.chat.message import Message

ThinkingMode = Literal["off", "free", "aligned"]

KEYS = ("reasoning_content", "thinking", "reasoning")
"""What chat templates call the thoughts of an earlier message."""
SWITCHES = ("enable_thinking", "thinking")
"""What chat templates call the argument that turns thinking on and off."""
_THOUGHT, _ANSWER = "probed thought", "probed answer"


@dataclass(frozen=True)
class ThinkingFormat:
    """How a model writes its thoughts: `opening` `before` thoughts `lead` `closing` `after` `channel` answer.

    Attributes:
        opening: The mark before them.
        closing: The mark behind them.
        before: What its template writes between the mark and the thoughts.
        lead: What its template writes between the thoughts and the mark.
        after: What its template writes between the mark and the answer.
        channel: The mark before an answer, with and without thoughts, in whose place a call has another; "" for none.
        key: What its template calls the thoughts of an earlier message; None if it does not show them.
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
        """True if an answer that begins with this text may turn out to open thoughts."""
        text = text.lstrip()
        return text.startswith(self.opening) or self.opening.startswith(text)

    def opens(self, text: str) -> bool:
        """True if an answer that begins with this text has opened thoughts."""
        return text.lstrip().startswith(self.opening)

    def close(self, thoughts: str, by_model: bool) -> str:
        """What follows the thoughts up to where the answer begins; a model that ended them wrote its own `lead`."""
        lead = "" if by_model or thoughts.endswith(self.lead) else self.lead
        return f"{lead}{self.closing}{self.after}"

    def without_thoughts(self, prompt: str, switched: Callable[[], bool]) -> str:
        """What to append to a prompt so that there are no thoughts; `switched` tells if its template has seen to it."""
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
"""The marks of known families, with what stands around them where their templates show no thoughts."""


def thinking_format(template: str, render: Callable[[list[Message]], str]) -> ThinkingFormat | None:
    """Read off a chat template how its model writes thoughts; None if it mentions none.

    Args:
        template: The template's source.
        render: Renders messages with it.
    """
    found = next((known for known in KNOWN if known.opening in template or known.closing in template), None)
    return None if found is None else _as_shown(found, render)


def _as_shown(known: ThinkingFormat, render: Callable[[list[Message]], str]) -> ThinkingFormat:
    """The format with what this template writes around thoughts, if it shows them."""
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
    """The arguments of a chat template that turn thinking on or off, and those that were given, which win."""
    return {**({} if mode is None else dict.fromkeys(SWITCHES, mode != "off")), **given}
