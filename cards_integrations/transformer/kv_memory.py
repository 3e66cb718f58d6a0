"""The memory that keys and values may take, and what is kept of finished texts to be used again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cards_integrations.transformer.kv_cache import States, Tree, TreeCache

LEAST = 64  # shorter prefixes are read again: it takes but a step


class CacheNeed(NamedTuple):
    """Rows and columns that a request takes in a cache."""

    cache: TreeCache
    rows: int
    columns: int


@dataclass(eq=False)
class Kept:
    """A text that was read: its tokens, and their keys and values."""

    cache: TreeCache
    ids: list[int]
    states: States

    @property
    def bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.states)


class KVMemory:
    """One budget in bytes for the caches of all models of an engine.

    What live requests leave of it holds finished texts, the least recently used of which goes
    first. A new text that begins like one of them, or like one that is live, takes over what they
    have in common (agents and chats send their history again, RAG its system prompt).
    """

    def __init__(self, limit: int, reuse: bool = True) -> None:
        self.limit = limit
        self.reuse = reuse
        self.caches: list[TreeCache] = []
        self.kept: list[Kept] = []  # least recently used first

    @property
    def used(self) -> int:
        return sum(cache.bytes for cache in self.caches) + sum(kept.bytes for kept in self.kept)

    @property
    def spare(self) -> int:
        """Bytes that live requests may still take."""
        return self.limit - sum(cache.bytes for cache in self.caches)

    @property
    def spare_columns(self) -> int:
        """Columns that all caches may still grow by."""
        return self.spare // max(1, sum(cache.rows * cache.bytes_per_token for cache in self.caches))

    def admits(self, needs: Sequence[CacheNeed]) -> bool:
        """Is there room for (rows, columns) more in these caches? Finished texts are given up for it."""
        more = sum(cache.bytes_with(rows, columns) - cache.bytes for cache, rows, columns in needs)
        return self.make_room(more)

    def make_room(self, more: int) -> bool:
        """Give up finished texts until `more` bytes fit; False if they never will."""
        if more > self.spare:
            return False
        while self.kept and self.used + more > self.limit:
            self.kept.pop(0)
        return True

    def keep(self, tree: Tree) -> None:
        """Keep a finished text, before its row is closed."""
        if not self.reuse or len(tree.ids) < LEAST:
            return
        size = len(tree.ids) * tree.cache.bytes_per_token
        if size <= self.spare:
            self.kept = [k for k in self.kept if k.cache is not tree.cache or tree.ids[: len(k.ids)] != k.ids]
            self.make_room(size)
            self.kept.append(Kept(tree.cache, tree.ids.copy(), tree.cache.read(tree, len(tree.ids))))

    def recall(self, tree: Tree, ids: Sequence[int]) -> None:
        """Begin an empty row with what is known of a text; at least its last token is left to be read."""
        if not self.reuse or len(ids) <= LEAST:
            return
        most = len(ids) - 1
        live: list[tuple[int, Tree | Kept]] = [(common(t.ids, ids), t) for t in tree.cache.trees if t is not tree]
        kept: list[tuple[int, Tree | Kept]] = [(common(k.ids, ids), k) for k in self.kept if k.cache is tree.cache]
        tokens, source = max([*live, *kept], key=lambda found: found[0], default=(0, tree))
        tokens = min(tokens, most)
        if tokens < LEAST:
            return
        if isinstance(source, Kept):
            self.kept.remove(source)
            self.kept.append(source)  # used last
            states = [(keys[:tokens], values[:tokens]) for keys, values in source.states]
        else:
            states = tree.cache.read(source, tokens)
        tree.cache.write(tree, ids[:tokens], states)

    def forget(self) -> bool:
        """Give up all that was kept; False if there was nothing."""
        had, self.kept = bool(self.kept), []
        if had and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return had

    def replace(self, old: TreeCache, new: TreeCache) -> None:
        """A cache begins afresh."""
        self.caches = [cache for cache in self.caches if cache not in (old, new)] + [new]
        self.kept = [kept for kept in self.kept if kept.cache is not old]


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two texts have in common from their beginning."""
    n = min(len(one), len(other))
    if one[:n] == other[:n]:
        return n
    return next(i for i in range(n) if one[i] != other[i])


def first_to_read(texts: Sequence[Sequence[int]]) -> list[int]:
    """Of texts that wait to be read, those that do not begin like one before them.

    The others can take over what they have in common, once it has been read.
    """
    first: list[int] = []
    for index, text in enumerate(texts):
        if len(text) <= LEAST or not any(min(common(texts[other], text), len(text) - 1) >= LEAST for other in first):
            first.append(index)
    return first


def budget(share: float, device: torch.device) -> int:
    """Bytes: `share` itself, or, up to 1, that fraction of the memory that is free now."""
    if share > 1:
        return int(share)
    if device.type == "cuda":
        return int(share * torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(share * psutil.virtual_memory().available)
