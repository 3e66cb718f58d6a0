"""Answers as objects of OpenAI's API."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal
from uuid import uuid4

from cards_integrations.chat.logprobs import openai_logprobs
from cards_integrations.engine.request import Chunk
from cards_integrations.server.logprobs import text_logprobs
from cards_integrations.server.message import delta_of, message_of
from cards_integrations.trace import Alignment


@dataclass
class Reply:
    """The reply to one request, whole or in pieces.

    Attributes:
        model: The name by which the client calls the model.
        trace: Whether it contains rewards and rejected drafts.
        include_usage: Whether a stream ends with the usage.
        id: The id of the reply.
        created: When the reply began, in seconds since 1970.
    """

    prefix: ClassVar[str]
    """The beginning of ids."""
    whole_kind: ClassVar[str]
    """The `object` of a whole reply."""
    piece_kind: ClassVar[str]
    """The `object` of a piece of a stream."""

    model: str
    trace: bool = False
    include_usage: bool = False
    id: str = field(init=False)
    created: int = field(init=False)

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{uuid4().hex}"
        self.created = int(time.time())

    def whole(self, answers: Sequence[Alignment], prompts: int) -> dict[str, Any]:
        """Return the reply with all answers.

        Args:
            answers: The answers, those to one prompt next to each other.
            prompts: The number of prompts.
        """
        choices = [self._traced(self.choice(answer), index, answer) for index, answer in enumerate(answers)]
        return {**self._head(self.whole_kind), "choices": choices, "usage": usage_of(answers, prompts)}

    def openings(self, count: int) -> list[dict[str, Any]]:
        """Return the pieces with which a stream of `count` answers begins."""
        return []

    def piece(self, index: int, chunk: Chunk) -> dict[str, Any] | None:
        """Return the piece for a kept segment; None if all of its text is held back and no trace was asked for."""
        if not (chunk.text or chunk.thought or chunk.calls or self.trace):
            return None
        choice = {"index": index, **self.part(index, chunk), "logprobs": None, "finish_reason": None}
        if self.trace:
            choice["cards"] = {
                "number": chunk.number,
                "thought": chunk.thought is not None,
                **plain(chunk.segment.summary()),
            }
        return self._chunk([choice])

    def closing(self, index: int, answer: Alignment) -> dict[str, Any]:
        """Return the last piece of an answer, with the log-probabilities of all of its tokens if asked for."""
        end = {"logprobs": self.logprobs(answer), "finish_reason": finish_reason(answer)}
        choice = {"index": index, **self.no_part, **end}
        if self.trace:
            choice["cards"] = {**plain(answer.summary()), "segments": len(answer.segments)}
        return self._chunk([choice])

    def final_usage(self, answers: Sequence[Alignment], prompts: int) -> dict[str, Any]:
        """Return the piece with the usage, at the end of a stream."""
        return {**self._chunk([]), "usage": usage_of(answers, prompts)}

    def choice(self, answer: Alignment) -> dict[str, Any]:
        """Return an answer in the form of a choice of this kind of reply."""
        raise NotImplementedError

    def part(self, index: int, chunk: Chunk) -> dict[str, Any]:
        """Return the new part of an answer in the form of a choice of a piece."""
        raise NotImplementedError

    def logprobs(self, answer: Alignment) -> dict[str, Any] | None:
        """Return the log-probabilities of an answer's tokens; None if they were not asked for."""
        raise NotImplementedError

    @property
    def no_part(self) -> dict[str, Any]:
        """An empty part, for the last piece of an answer."""
        raise NotImplementedError

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self.include_usage else {}
        return {**self._head(self.piece_kind), "choices": choices, **usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _traced(self, choice: dict[str, Any], index: int, answer: Alignment) -> dict[str, Any]:
        end = {"logprobs": self.logprobs(answer), "finish_reason": finish_reason(answer)}
        found = {"index": index, **choice, **end}
        if self.trace:
            segments = [plain(segment.summary()) for segment in answer.segments]
            found["cards"] = {**plain(answer.summary()), "segments": segments}
        return found


@dataclass
class ChatReply(Reply):
    """A reply of /v1/chat/completions."""

    prefix, whole_kind, piece_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    calls: dict[int, int] = field(default_factory=dict)
    """How many calls of each answer have been sent, by the answer's index."""

    def openings(self, count: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
            for index in range(count)
        ]

    def choice(self, answer: Alignment) -> dict[str, Any]:
        return {"message": message_of(answer)}

    def part(self, index: int, chunk: Chunk) -> dict[str, Any]:
        sent = self.calls.get(index, 0)
        self.calls[index] = sent + len(chunk.calls)
        return {"delta": delta_of(chunk, sent)}

    def logprobs(self, answer: Alignment) -> dict[str, Any] | None:
        return openai_logprobs(answer.logprobs)

    @property
    def no_part(self) -> dict[str, Any]:
        return {"delta": {}}


@dataclass
class TextReply(Reply):
    """A reply of /v1/completions."""

    prefix, whole_kind, piece_kind = "cmpl", "text_completion", "text_completion"

    def choice(self, answer: Alignment) -> dict[str, Any]:
        return {"text": answer.text}

    def part(self, index: int, chunk: Chunk) -> dict[str, Any]:
        return {"text": chunk.text}

    def logprobs(self, answer: Alignment) -> dict[str, Any] | None:
        return text_logprobs(answer)

    @property
    def no_part(self) -> dict[str, Any]:
        return {"text": ""}


def finish_reason(answer: Alignment) -> Literal["stop", "length", "tool_calls"]:
    """Return why an answer ended, in OpenAI's words."""
    calls = answer.tool_calls or answer.invalid_tool_calls
    return "tool_calls" if calls and answer.finish_reason == "stop" else answer.finish_reason


def usage_of(answers: Sequence[Alignment], prompts: int) -> dict[str, Any]:
    """Return the usage of all answers; a prompt counts once, however many answers it has.

    Args:
        answers: The answers, those to one prompt next to each other.
        prompts: The number of prompts.
    """
    each = len(answers) // prompts
    read = [answer.usage for answer in answers[::each]]
    prompt, completion = sum(u.prompt_tokens for u in read), sum(a.usage.output_tokens for a in answers)
    thoughts = sum(answer.usage.reasoning_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in read)},
        "completion_tokens_details": {"reasoning_tokens": thoughts},
    }


def plain(value: Any) -> Any:
    """Return a value with None in place of numbers that JSON does not have, such as infinite thresholds."""
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(value: Any) -> bytes:
    """Return JSON in ASCII, as a text may contain half of a surrogate pair."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
