"""OpenTelemetry spans by the conventions for generative AI: one for each request, whichever face it came through."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import faces
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from cards_integrations import CardsLLM
from cards_integrations.engine import telemetry
from cards_integrations.errors import CardsTimeout, SettingsError

SECRET = "The code is 1234"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What is told, with telemetry on."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    monkeypatch.setenv("CARDS_TELEMETRY", "1")
    return exporter


@pytest.fixture(scope="module")
def llm() -> Iterator[CardsLLM]:
    with faces.cards_llm() as found:
        yield found


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_span_for_each_request_with_an_event_for_each_segment(llm: CardsLLM, spans: InMemorySpanExporter) -> None:
    answer = llm.align("Hello", temperature=0.5, stop=["~~"])
    [span] = spans.get_finished_spans()
    assert span.name == f"chat {answer.model}"
    found = attributes(span)
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.provider.name"] == "cards-integrations"
    assert found["gen_ai.request.model"] == found["gen_ai.response.model"] == answer.model
    wanted = {"temperature": 0.5, "top_k": 40, "max_tokens": 20, "seed": 7, "stop_sequences": ("~~",)}
    assert {name: found[f"gen_ai.request.{name}"] for name in wanted} == wanted
    assert found["gen_ai.response.finish_reasons"] == (answer.finish_reason,)
    assert found["gen_ai.usage.input_tokens"] == answer.usage.prompt_tokens
    assert found["gen_ai.usage.output_tokens"] == answer.usage.completion_tokens
    assert found["cards.drafted_tokens"] == answer.usage.drafted_tokens
    assert (found["cards.decoding.method"], found["cards.reward"]) == ("cards", answer.reward)
    told = [(event.name, dict(event.attributes or {})) for event in span.events]
    assert [name for name, _ in told] == ["gen_ai.evaluation.result"] * len(answer.segments)
    assert [each["gen_ai.evaluation.score.value"] for _, each in told] == [s.reward for s in answer.segments]
    assert [each["cards.segment.drafts"] for _, each in told] == [len(s.drafts) for s in answer.segments]
    assert {each["gen_ai.evaluation.name"] for _, each in told} == {llm.reward.name if llm.reward else ""}
    assert {each["gen_ai.evaluation.score.label"] for _, each in told} <= {"accepted", "best"}


def test_it_is_the_same_answer_and_the_same_segments(
    llm: CardsLLM, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list(llm.align_stream("Hello"))
    monkeypatch.delenv("CARDS_TELEMETRY")
    plain = list(llm.align_stream("Hello"))
    assert [item.text for item in told] == [item.text for item in plain]
    assert len(spans.get_finished_spans()) == 1


async def test_spans_are_children_of_their_callers(llm: CardsLLM, spans: InMemorySpanExporter) -> None:
    with trace.get_tracer("test").start_as_current_span("outer") as outer:
        llm.invoke("Hello")
        await llm.acomplete("Hello")
        llm.align_batch(["One", "Two"])
    *inner, last = spans.get_finished_spans()
    assert last.name == "outer"
    assert [span.parent.span_id for span in inner if span.parent] == [outer.get_span_context().span_id] * 4


def test_texts_are_told_only_on_request(
    llm: CardsLLM, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(prompt: str, texts: list[str]) -> list[float]:
        raise ValueError(prompt)

    answer = llm.align(SECRET)
    with pytest.raises(Exception, match=SECRET):
        llm.align(SECRET, reward=fails)
    quiet, failed = spans.get_finished_spans()
    assert failed.status.status_code is StatusCode.ERROR
    assert attributes(failed)["error.type"] == "RewardError"
    assert SECRET not in quiet.to_json() + failed.to_json()
    assert json.dumps(answer.text) not in quiet.to_json()
    spans.clear()
    monkeypatch.setenv(telemetry.CAPTURE, "true")
    llm.align([("system", "Be brief."), ("user", SECRET)])
    found = attributes(spans.get_finished_spans()[0])
    assert json.loads(found["gen_ai.input.messages"]) == [
        {"role": "system", "parts": [{"type": "text", "content": "Be brief."}]},
        {"role": "user", "parts": [{"type": "text", "content": SECRET}]},
    ]
    [said] = json.loads(found["gen_ai.output.messages"])
    assert said["role"] == "assistant"
    assert said["finish_reason"] == "length"


def test_what_is_cancelled_or_too_late_is_an_error(llm: CardsLLM, spans: InMemorySpanExporter) -> None:
    with pytest.raises(CardsTimeout):
        llm.align("Hello", timeout=1e-6)
    stream = llm.align_stream("Hello", max_tokens=1000)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    llm.align("Hello")  # after whose answer the other one has ended
    late, gone, _ = spans.get_finished_spans()
    assert attributes(late)["error.type"] == "CardsTimeout"
    assert attributes(gone)["error.type"] == "CancelledError"


def test_it_says_what_to_install(llm: CardsLLM, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(SettingsError, match=r"cards-integrations\[otel\]"):
        llm.align("Hello")
