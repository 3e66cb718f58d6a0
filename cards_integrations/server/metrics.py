"""The metrics of the server, for Prometheus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cards_integrations.engine.inspection import EngineState
from cards_integrations.engine.request import Chunk
from cards_integrations.server.errors import as_api_error
from cards_integrations.trace import Alignment

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
OUTCOMES = {401: "unauthorized", 404: "not_found", 413: "too_large", 429: "busy", 503: "unavailable", 504: "timeout"}


@dataclass
class Watch:
    """The timing of one request."""

    began: float = field(default_factory=time.perf_counter)
    """When it began, in seconds of `time.perf_counter`."""
    first: bool = True
    """True until its first segment."""


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "cards_requests", "Requests by what became of them.", ["endpoint", "outcome"], registry=self.registry
        )
        self._tokens = Counter(
            "cards_tokens", "Tokens of prompts, tokens drafted, and tokens kept.", ["kind"], registry=self.registry
        )
        self._segments = Counter("cards_segments", "Kept segments.", registry=self.registry)
        self._drafts = Counter("cards_drafts", "Candidates that were examined.", registry=self.registry)
        self._seconds = Histogram(
            "cards_request_seconds", "Seconds from a request to the end of its reply.", ["endpoint"],
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self._first = Histogram(
            "cards_first_segment_seconds", "Seconds from a request to its first kept segment.", ["endpoint"],
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self._answers = Gauge("cards_answers", "Answers that are written or wait for a row.", registry=self.registry)
        self._rows = Gauge("cards_rows", "Rows of all KV caches that are in use.", registry=self.registry)
        self._live = Gauge("cards_live_requests", "Requests that are drafting.", registry=self.registry)
        self._cache = Gauge("cards_cache_bytes", "Memory of all KV caches.", registry=self.registry)
        self._texts = Gauge(
            "cards_prefix_bytes", "Memory of finished texts, for prompts that begin like them.", registry=self.registry
        )
        self._limit = Gauge(
            "cards_memory_limit_bytes", "Most memory of KV caches and finished texts.", registry=self.registry
        )
        self._preempted = Gauge("cards_preempted", "Requests that gave their rows back.", registry=self.registry)

    @contextmanager
    def request(self, endpoint: str) -> Iterator[Watch]:
        """Count a request and its outcome, and time it."""
        watch, outcome = Watch(), "answered"
        try:
            yield watch
        except (GeneratorExit, asyncio.CancelledError):
            outcome = "cancelled"
            raise
        except Exception as error:
            outcome = outcome_of(error)
            raise
        finally:
            self._requests.labels(endpoint, outcome).inc()
            self._seconds.labels(endpoint).observe(time.perf_counter() - watch.began)

    @contextmanager
    def counting_refusal(self, endpoint: str) -> Iterator[None]:
        """Count a request if the block refuses it."""
        try:
            yield
        except Exception as error:
            self._requests.labels(endpoint, outcome_of(error)).inc()
            raise

    def segment(self, endpoint: str, watch: Watch, chunk: Chunk) -> None:
        """Count a kept segment."""
        if watch.first:
            watch.first = False
            self._first.labels(endpoint).observe(time.perf_counter() - watch.began)
        self._segments.inc()
        self._tokens.labels("kept").inc(len(chunk.segment.token_ids))

    def answer(self, answer: Alignment) -> None:
        """Count what an answer cost."""
        self._tokens.labels("prompt").inc(answer.usage.prompt_tokens)
        self._tokens.labels("drafted").inc(answer.usage.drafted_tokens)
        self._drafts.inc(answer.usage.drafts)

    def text(self, answers: int, state: EngineState) -> bytes:
        """Return all metrics in the text format of Prometheus.

        Args:
            answers: The number of answers that are being written or wait for a row.
            state: The state of the engine.
        """
        self._answers.set(answers)
        self._rows.set(state.rows)
        self._live.set(state.requests)
        self._cache.set(state.cache_bytes)
        self._texts.set(state.prefix_bytes)
        self._limit.set(state.memory_limit)
        self._preempted.set(state.preempted)
        return generate_latest(self.registry)


def outcome_of(error: Exception) -> str:
    """Return the name of the outcome of a request that failed."""
    status = as_api_error(error).status
    return OUTCOMES.get(status, "invalid" if status < 500 else "failed")
