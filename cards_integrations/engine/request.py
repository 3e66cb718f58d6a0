"""What goes into the engine, and what comes out of it while an answer is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from cards_integrations.chat.grammar import Grammar
from cards_integrations.chat.message import Message
from cards_integrations.chat.thinking import ThinkingMode
from cards_integrations.chat.tools import Tools
from cards_integrations.decoding.base import Decoding
from cards_integrations.models.local.settings import Placement
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards.base import Reward
from cards_integrations.trace import InvalidToolCall, Segment, ToolCall


class EngineSettings(Placement):
    """Settings of the machine, as opposed to those of the method. No result depends on them.

    Examples:
        >>> CardsLLM(engine=EngineSettings(device="cuda:1", max_rows=16, kv_memory=8 * 2**30))
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    width: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """How many candidates a request drafts at once. "auto" drafts as many as pay off, by the measured time of a step
    and the running acceptance rate, and also ahead of candidates that still wait for their reward."""
    max_rows: Annotated[int, Field(ge=1)] = 64
    """How many requests run at once; further ones wait for a row."""
    kv_memory: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5
    """Memory for the KV caches of all models: bytes or, up to 1, a fraction of what is free once the language model
    is loaded. Requests that do not fit wait. Running ones take memory as they grow; when it runs out, the newest give
    theirs back, and are computed again later."""
    prefix_reuse: bool = True
    """Keep finished texts in the memory that live requests leave free, so that of a prompt that begins like one of them
    only the rest is read. False reads every prompt from its start."""


@dataclass(frozen=True)
class Request:
    """One answer to be written.

    Attributes:
        prompt: The user's text, or the messages of a chat.
        decoding: The decoding method.
        reward: The reward that guides it; None for a method that needs none.
        sampler: How tokens are drawn from logits.
        max_tokens: Most tokens of the answer.
        stop: Strings that end the answer, and are not part of it; within a grammar or a tool call they end nothing.
        seed: Seed of all random numbers; None draws a fresh one.
        timeout: Seconds until `CardsTimeout`; None waits for ever.
        context: Texts that the answer should be grounded in, for rewards that look at them.
        grammar: What the answer has to match.
        tools: Tools that the answer may call.
        thinking: Whether the model thinks before it answers, and whether its thoughts are guided, too; None leaves
            it to its chat template.
        max_thinking_tokens: Most tokens of the thoughts, beside those of the answer.
        chat_template_kwargs: Arguments of the chat template.
        finish_at: "sentence" cuts an answer that reaches `max_tokens` after its last whole sentence.
        logprobs: Report log p of each token, and this many of the most likely ones; None reports nothing.
    """

    prompt: str | list[Message]
    decoding: Decoding
    reward: Reward | None = None
    sampler: Sampler = field(default_factory=Sampler)
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    seed: int | None = None
    timeout: float | None = None
    context: tuple[str, ...] = ()
    grammar: Grammar | None = None
    tools: Tools | None = None
    thinking: ThinkingMode | None = None
    max_thinking_tokens: int = 1024
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    finish_at: Literal["token", "sentence"] = "token"
    logprobs: int | None = None


@dataclass(frozen=True)
class Chunk:
    """A kept segment as it is streamed.

    Attributes:
        text: The text of the answer that has become final with it: no later token can take it back.
        segment: The segment itself, with its drafts.
        number: Its place in the answer, from 0.
        calls: The tool calls that are complete with it.
        thought: In place of `text`, for a segment of the thoughts before the answer; None for one of the answer.
    """

    text: str
    segment: Segment
    number: int
    calls: tuple[ToolCall | InvalidToolCall, ...] = ()
    thought: str | None = None
