"""What lives in an engine, seen from outside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cards_integrations.transformer.kv_cache import TreeCache


@dataclass(frozen=True)
class CacheState:
    """One KV cache: that of the language model, or of a reward model.

    Attributes:
        rows: Requests that hold a row.
        columns: Columns that their texts and candidates take, one for each token, summed over the rows; a prefix that
            rows share counts once.
        allocated_rows: Rows that memory is allocated for.
        allocated_columns: Columns of these rows and of shared prefixes, summed; short texts have narrow rows.
        bytes: Memory for their keys and values.
    """

    rows: int
    columns: int
    allocated_rows: int
    allocated_columns: int
    bytes: int

    @classmethod
    def of(cls, cache: TreeCache) -> CacheState:
        """Return the state of a cache now."""
        shared = sum(map(len, cache.prefixes))
        columns = sum(tree.taken - 1 for tree in cache.trees) + shared  # not the scratch column of each row
        blocks = cache.blocks.values()
        rows, width = sum(block.rows for block in blocks), sum(block.rows * block.columns for block in blocks)
        return cls(len(cache.trees), columns, rows, width + shared, cache.bytes)


@dataclass(frozen=True)
class EngineState:
    """What lives in an engine at one moment, between two of its steps.

    Attributes:
        status: "new" before the first use, then "loading", "ready" or "failed", and "closed".
        requests: Requests that are drafting.
        waiting: Calls that have not been answered, those that are drafting included.
        preempted: How often so far a request had to give its rows back because the caches were full.
        scoring: Calls of reward models that are under way.
        tasks: Tasks in the engine's event loop, including two of its own.
        caches: The KV caches; the language model's is the first.
        memory_limit: Bytes that caches and cached prefixes may take together.
        cached_prefixes: Tokens of each finished text that is kept for reuse, the least recently used first.
        prefix_bytes: Memory that these take.
        rewards: Names of the reward models that are loaded.
        measured_scales: How many rewards' scales were measured here.
        steps: Decode steps of the language model so far, each with one candidate at least.
        forwards: Its forwards so far, those that only read prompts included.
        tokens: Tokens that these forwards have read.
        step_seconds: Seconds of a step by its number of candidates; empty if that was not measured.
    """

    status: Literal["new", "loading", "ready", "failed", "closed"]
    requests: int = 0
    waiting: int = 0
    preempted: int = 0
    scoring: int = 0
    tasks: int = 0
    caches: tuple[CacheState, ...] = ()
    memory_limit: int = 0
    cached_prefixes: tuple[int, ...] = ()
    prefix_bytes: int = 0
    rewards: tuple[str, ...] = ()
    measured_scales: int = 0
    steps: int = 0
    forwards: int = 0
    tokens: int = 0
    step_seconds: Mapping[int, float] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows in use, of all caches."""
        return sum(cache.rows for cache in self.caches)

    @property
    def columns(self) -> int:
        """Columns in use, of all caches."""
        return sum(cache.columns for cache in self.caches)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches."""
        return sum(cache.bytes for cache in self.caches)

    @property
    def idle(self) -> bool:
        """True if nothing runs, and no row is in use."""
        return not (self.requests or self.waiting or self.scoring or self.rows)
