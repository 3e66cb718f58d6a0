"""OpenTelemetry spans of requests, by the conventions for generative AI. Off unless CARDS_TELEMETRY=1.

All faces meet in `Worker.answer`, and so do the spans of all: `chat MODEL`, children of whatever span their callers
are in, each with an event `gen_ai.evaluation.result` for every kept segment that has a reward. Prompts and texts are
in them only if the conventions' own variable, OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT, asks for it.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cards_integrations.chat.message import Message
from cards_integrations.chat.template import FormattedPrompt, as_messages
from cards_integrations.engine.request import Chunk, Request
from cards_integrations.errors import SettingsError
from cards_integrations.trace import Alignment, InvalidToolCall, ToolCall

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

PROVIDER = "cards-integrations"
CAPTURE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
EVALUATION = "gen_ai.evaluation.result"
SAMPLING = ("temperature", "top_k", "top_p", "frequency_penalty", "presence_penalty")
Emit = Callable[[Chunk], None] | None


class RequestSpan:
    """What is told of one request; nothing while telemetry is off.

    Attributes:
        emit: Called with each kept segment; None if nobody wants to know.
    """

    def __init__(self, emit: Emit) -> None:
        self.emit = emit

    def end(self, answer: Alignment) -> Alignment:
        """Tell what became of the request.

        Returns:
            The answer, as it is.
        """
        return answer


class RecordedSpan(RequestSpan):
    """A request's span.

    Args:
        span: Where it is told.
        request: The request.
        emit: Who else wants each kept segment.
    """

    def __init__(self, span: Span, request: Request, emit: Emit) -> None:
        super().__init__(self._segment)
        self._span = span
        self._next = emit
        self._reward = request.reward.name if request.reward is not None else ""

    def _segment(self, chunk: Chunk) -> None:
        segment = chunk.segment
        if segment.reward is not None:
            kept = next((d.verdict for d in segment.drafts if d.verdict in ("accepted", "best")), None)
            found = {
                "gen_ai.evaluation.name": self._reward,
                "gen_ai.evaluation.score.value": segment.reward,
                "gen_ai.evaluation.score.label": kept,
                "cards.segment.number": chunk.number,
                "cards.segment.thought": chunk.thought is not None,
                "cards.segment.tokens": len(segment.token_ids),
                "cards.segment.drafts": len(segment.drafts),
                "cards.segment.threshold": segment.threshold,
            }
            self._span.add_event(EVALUATION, _told(found))
        if self._next is not None:
            self._next(chunk)

    def end(self, answer: Alignment) -> Alignment:
        usage = answer.usage
        found = {
            "gen_ai.response.id": answer.request_id,
            "gen_ai.response.model": answer.model,
            "gen_ai.response.finish_reasons": [answer.finish_reason],
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
            "gen_ai.usage.output_tokens": usage.output_tokens,
            "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens,
            "cards.drafts": usage.drafts,
            "cards.drafted_tokens": usage.drafted_tokens,
            "cards.reward": answer.reward,
            "cards.seed": str(answer.seed),  # it may have more than 64 bits
        }
        self._span.set_attributes(_told(found))
        if captures_content():
            self._span.set_attribute("gen_ai.output.messages", json.dumps([_output(answer)]))
        return answer


@contextmanager
def request_span(request: Request, model: str, emit: Emit) -> Iterator[RequestSpan]:
    """Tell of a request while it is answered inside the block.

    Args:
        request: The request.
        model: What the settings call the model.
        emit: Who wants each kept segment.

    Raises:
        SettingsError: CARDS_TELEMETRY=1, and OpenTelemetry is not installed.
    """
    if os.environ.get("CARDS_TELEMETRY") != "1":
        yield RequestSpan(emit)
        return
    tracer = _tracer()
    from opentelemetry.trace import StatusCode

    name = f"{_operation(request)} {model}"
    with tracer.start_as_current_span(
        name, attributes=_attributes(request, model), record_exception=False, set_status_on_exception=False
    ) as span:
        try:
            yield RecordedSpan(span, request, emit)
        except (Exception, asyncio.CancelledError) as error:
            span.set_attribute("error.type", type(error).__qualname__)
            span.set_status(StatusCode.ERROR, str(error) if captures_content() else None)  # it may quote a text
            raise


def captures_content() -> bool:
    """True if prompts and answers may be told, too."""
    return os.environ.get(CAPTURE, "").lower() in ("true", "1", "span_only", "span_and_event")


def _tracer() -> Tracer:
    try:
        from opentelemetry import trace
    except ImportError:
        raise SettingsError(
            "CARDS_TELEMETRY=1 needs OpenTelemetry: pip install 'cards-integrations[otel]', or unset it."
        ) from None
    return trace.get_tracer("cards_integrations")


def _operation(request: Request) -> str:
    return "text_completion" if isinstance(request.prompt, FormattedPrompt) else "chat"


def _attributes(request: Request, model: str) -> dict[str, Any]:
    """Return the attributes that are known before the answer."""
    found: dict[str, Any] = {
        "gen_ai.operation.name": _operation(request),
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.request.seed": request.seed,
        "gen_ai.request.stop_sequences": list(request.stop) or None,
        "gen_ai.output.type": "json" if request.grammar is not None else "text",
        "cards.decoding.method": request.decoding.method,
        "cards.reward.name": request.reward.name if request.reward is not None else None,
    }
    found |= {f"gen_ai.request.{name}": getattr(request.sampler, name, None) for name in SAMPLING}
    if captures_content():
        found["gen_ai.input.messages"] = json.dumps([_input(each) for each in as_messages(request.prompt)])
    return _told(found)


def _told(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes whose values a span can hold."""
    return {
        name: value
        for name, value in attributes.items()
        if value is not None
        and not (isinstance(value, float) and not math.isfinite(value))
        and not (isinstance(value, int) and abs(value) >= 2**63)
    }


def _input(message: Message) -> dict[str, Any]:
    """Return a message in the form of the OpenTelemetry conventions."""
    content, calls = message["content"], message.get("tool_calls", ())
    if message["role"] == "tool":
        parts = [{"type": "tool_call_response", "id": message.get("tool_call_id"), "response": content}]
    else:
        parts = [{"type": "text", "content": content}] if content else []
    parts += [_call(call.get("id"), call["function"]["name"], call["function"]["arguments"]) for call in calls]
    return {"role": message["role"], "parts": parts}


def _output(answer: Alignment) -> dict[str, Any]:
    texts = {"reasoning": answer.thoughts, "text": answer.content}
    parts: list[dict[str, Any]] = [{"type": kind, "content": text} for kind, text in texts.items() if text]
    calls: list[ToolCall | InvalidToolCall] = [*answer.tool_calls, *answer.invalid_tool_calls]
    parts += [_call(call.id, call.name, call.arguments) for call in calls]
    return {"role": "assistant", "parts": parts, "finish_reason": answer.finish_reason}


def _call(call_id: str | None, name: str | None, arguments: Any) -> dict[str, Any]:
    return {"type": "tool_call", "id": call_id, "name": name, "arguments": arguments}
