"""The memory that keys and values may take, and the prefix cache: finished texts that may be used again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cards_integrations.errors import OutOfMemory
from cards_integrations.transformer.free_memory import free_memory
from cards_integrations.transformer.kv_cache import States, Tree, TreeCache

RESERVE = 2**28  # bytes of the machine's memory that caches leave free
MIN_PREFIX = 64  # tokens; shorter prefixes are read again, which takes a single step


class CacheNeed(NamedTuple):
    """Rows and columns that a request takes in a cache."""

    cache: TreeCache
    rows: int
    columns: int


@dataclass(eq=False)
class CachedPrefix:
    """A finished text: its tokens, and their keys and values."""

    cache: TreeCache
    ids: list[int]
    states: States

    @property
    def bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.states)


class KVMemory:
    """One budget in bytes for the caches of all models of an engine.

    What live requests leave of it holds finished texts; the least recently used is evicted first. A new
    text that begins like one of them, or like a live one, reuses what they have in common (agents and
    chats send their history again, RAG its system prompt).

    Args:
        limit: The budget in bytes.
        reuse: Whether texts are kept and reused.
        free: Tells how many bytes the machine has left, which other processes share.
    """

    def __init__(self, limit: int, reuse: bool = True, free: Callable[[], int] = lambda: 2**62) -> None:
        self.limit = limit
        self.reuse = reuse
        self.free = free
        self.caches: list[TreeCache] = []
        self.prefixes: list[CachedPrefix] = []  # least recently used first
        self.reclaim: Callable[[], bool] = lambda: False  # gives back a cache that nobody uses; False if there is none

    @property
    def used(self) -> int:
        """Bytes of all caches and of the finished texts."""
        return sum(cache.bytes for cache in self.caches) + sum(prefix.bytes for prefix in self.prefixes)

    @property
    def spare(self) -> int:
        """Bytes that live requests may still take."""
        return self.limit - sum(cache.bytes for cache in self.caches)

    @property
    def spare_columns(self) -> int:
        """Columns that all caches may still grow by."""
        return self.spare // max(1, sum(cache.rows * cache.bytes_per_token for cache in self.caches))

    def admits(self, needs: Sequence[CacheNeed]) -> bool:
        """Return True if the caches can grow as needed; finished texts are evicted for it."""
        more = sum(cache.bytes_with(rows, columns) - cache.bytes for cache, rows, columns in needs)
        while more > self.spare and self.reclaim():
            pass
        return self.evict_for(more)

    def evict_for(self, more: int) -> bool:
        """Evict finished texts until `more` bytes fit; False if they never will."""
        if more > self.spare or not self._machine_has(more):
            return False
        while self.prefixes and self.used + more > self.limit:
            self.prefixes.pop(0)
        return True

    def _machine_has(self, more: int) -> bool:
        """True if the machine has so many bytes left; finished texts are evicted for them."""
        while more > 0 and more > self.free() - RESERVE:
            if not self.evict_all():
                return False
        return True

    def refusal(self, tokens: int) -> OutOfMemory:
        """The error for a request that does not fit."""
        if self.free() < 2 * RESERVE:
            return OutOfMemory(
                f"This machine has {self.free() / 2**20:,.0f} MiB of memory left, too little for a request of {tokens} "
                "tokens: end other processes, or use a shorter prompt or a smaller max_tokens."
            )
        return OutOfMemory(
            f"A request of {tokens} tokens needs more than the {self.limit / 2**20:,.1f} MiB of "
            "EngineSettings.kv_memory: use a shorter prompt, a smaller max_tokens, or more kv_memory."
        )

    def evict_all(self) -> bool:
        """Evict all finished texts; False if there were none."""
        had, self.prefixes = bool(self.prefixes), []
        if had and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return had

    def keep(self, tree: Tree) -> None:
        """Keep the text of a row that is about to be closed; texts that it begins with are evicted."""
        if not self.reuse or len(tree.ids) < MIN_PREFIX:
            return
        size = len(tree.ids) * tree.cache.bytes_per_token
        if size <= self.spare:
            self.prefixes = [p for p in self.prefixes if p.cache is not tree.cache or tree.ids[: len(p.ids)] != p.ids]
            self.evict_for(size)
            self.prefixes.append(CachedPrefix(tree.cache, tree.ids.copy(), tree.cache.read(tree, len(tree.ids))))

    def recall(self, tree: Tree, ids: Sequence[int]) -> None:
        """Fill an empty row with the longest known prefix of a text; at least the text's last token is left to read."""
        if not self.reuse or len(ids) <= MIN_PREFIX:
            return
        live = [(common(t.ids, ids), t) for t in tree.cache.trees if t is not tree]
        finished = [(common(p.ids, ids), p) for p in self.prefixes if p.cache is tree.cache]
        found: list[tuple[int, Tree | CachedPrefix]] = [*live, *finished]
        tokens, source = max(found, key=lambda each: each[0], default=(0, tree))
        tokens = min(tokens, len(ids) - 1)
        if tokens < MIN_PREFIX:
            return
        if isinstance(source, CachedPrefix):
            self.prefixes.remove(source)
            self.prefixes.append(source)  # used last
            states = [(keys[:tokens], values[:tokens]) for keys, values in source.states]
        else:
            states = tree.cache.read(source, tokens)
        tree.cache.write(tree, ids[:tokens], states)

    def forget(self, cache: TreeCache) -> None:
        """Give back the memory of a cache that is not used any more, and its finished texts."""
        self.caches.remove(cache)
        self.prefixes = [prefix for prefix in self.prefixes if prefix.cache is not cache]
        cache.layers.clear()

    def replace(self, old: TreeCache, new: TreeCache) -> None:
        """Put a new cache in the place of an old one, whose finished texts are evicted."""
        self.caches = [cache for cache in self.caches if cache not in (old, new)] + [new]
        self.prefixes = [prefix for prefix in self.prefixes if prefix.cache is not old]


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two texts, in tokens."""
    n = min(len(one), len(other))
    if one[:n] == other[:n]:
        return n
    return next(i for i in range(n) if one[i] != other[i])


def first_to_read(texts: Sequence[Sequence[int]]) -> list[int]:
    """Return the indices of those texts that share no prefix with an earlier one among them.

    The others can reuse what they have in common with one of these, once it has been read.
    """
    first: list[int] = []
    for index, text in enumerate(texts):
        if len(text) <= MIN_PREFIX or not any(
            min(common(texts[other], text), len(text) - 1) >= MIN_PREFIX for other in first
        ):
            first.append(index)
    return first


def budget(share: float, device: torch.device) -> int:
    """Return a budget in bytes.

    Args:
        share: Up to 1, the fraction of the memory that is free now; above, the bytes themselves.
        device: Whose memory it is.
    """
    if share > 1:
        return int(share)
    return int(share * free_memory(device))
