"""The memory budget of keys and values, and the prefix cache: finished texts that may be used again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from cards_integrations.errors import OutOfMemory
from cards_integrations.transformer.free_memory import free_memory
from cards_integrations.transformer.kv_cache import Tree, TreeCache
from cards_integrations.transformer.prefix_tree import PrefixNode, PrefixTree
from cards_integrations.transformer.recurrent import State

RESERVE = 2**28  # bytes of the machine's memory that caches leave free
MIN_PREFIX = 64  # tokens; shorter prefixes are read again, which takes one step only


class CacheNeed(NamedTuple):
    """Rows and columns that a request takes in a cache."""

    cache: TreeCache
    rows: int
    columns: int


class KVMemory:
    """One budget in bytes for the caches of all models of an engine.

    What live requests leave of it holds finished texts; the least recently used is evicted first. A new text that
    begins like one of them, or like a live one, reuses their common prefix: agents and chats send their history again,
    RAG its system prompt.

    Args:
        limit: The budget in bytes.
        reuse: Whether texts are kept and reused.
        free: Returns how many bytes the machine has left, which other processes use, too.
    """

    def __init__(self, limit: int, reuse: bool = True, free: Callable[[], int] = lambda: 2**62) -> None:
        self.limit = limit
        self.reuse = reuse
        self.free = free
        self.caches: list[TreeCache] = []
        self._finished: dict[tuple[TreeCache, bool], PrefixTree] = {}  # by cache, long texts apart from others
        self.reclaim: Callable[[], bool] = lambda: False  # frees a cache that is not in use; False if there is none
        self._recent: OrderedDict[PrefixNode, PrefixTree] = OrderedDict()  # least recently used first

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the finished texts."""
        return sum(tree.bytes for tree in self._finished.values())

    @property
    def prefix_lengths(self) -> tuple[int, ...]:
        """Tokens of each finished text that is not the prefix of another, the least recently used first."""
        return tuple(node.end for node in self._recent if not node.children)

    @property
    def used(self) -> int:
        """Bytes of all caches and of the finished texts."""
        return self.limit - self.spare + self.prefix_bytes

    @property
    def spare(self) -> int:
        """Bytes that live requests may still take."""
        return self.limit - sum(cache.bytes for cache in self.caches)

    @property
    def spare_columns(self) -> int:
        """Columns that each row of all caches may still grow by."""
        return self.spare // max(1, sum(len(cache.trees) * cache.bytes_per_token for cache in self.caches))

    def admits(self, needs: Sequence[CacheNeed], promised: int = 0) -> bool:
        """Return True if the caches can grow by these needs and the promised bytes; evict finished texts for it."""
        more = promised + self.needed(needs)
        while more > self.spare and self.reclaim():
            pass
        return self.evict_for(more)

    def evict_for(self, more: int) -> bool:
        """Evict finished texts until `more` bytes fit; return False if that is not enough."""
        if more > self.spare:
            for cache in self.caches:
                cache.compact()
        if more > self.spare or not self.machine_has(more):
            return False
        while self._recent and self.used + more > self.limit:
            self._evict()
        return True

    def _evict(self) -> None:
        leaf, tree = next(iter(self._recent.items()))
        tree.remove(leaf)

    @staticmethod
    def needed(needs: Sequence[CacheNeed]) -> int:
        """Return the bytes of these rows."""
        return sum(rows * cache.row_bytes(columns) for cache, rows, columns in needs)

    def machine_has(self, more: int) -> bool:
        """Return True if the machine has `more` bytes left; evict finished texts for it."""
        while more > 0 and more > self.free() - RESERVE:
            if not self.evict_all():
                return False
        return True

    def refusal(self, tokens: int) -> OutOfMemory:
        """Return the error for a request that does not fit."""
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
        """Evict all finished texts; return False if there were none."""
        had = bool(self._recent)
        self._finished.clear()
        self._recent.clear()
        if had and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return had

    def _texts(self, cache: TreeCache, long: bool = False) -> PrefixTree:
        """Return the finished texts of a cache: the long ones, with other rotary frequencies, or the short ones."""
        if (cache, long) not in self._finished:
            self._finished[cache, long] = PrefixTree(cache.bytes_per_token, cache.bytes_per_state, self._recent)
        return self._finished[cache, long]

    def keep(self, tree: Tree) -> None:
        """Keep the text of a row that is about to be closed, unless it is known or there is no room."""
        if not self.reuse or len(tree.ids) < MIN_PREFIX:
            return
        cache, texts, length = tree.cache, self._texts(tree.cache, tree.long), tree.known(len(tree.ids))
        path, known = texts.match(tree.ids[:length])
        path = texts.cut(path, known)
        texts.use(path)
        held = texts.size(path)
        size = held + (length - known) * cache.bytes_per_token + 2 * cache.bytes_per_state
        if size > self.spare or not length or not self.evict_for(size - held):  # the path itself is not evicted
            return
        if known < length:
            texts.insert(path, tree.ids[known:length], cache.read(tree, length, first=known))
        if cache.pool is not None:
            for end in {min(tree.states), length}:  # states after the prompt, and after the answer
                [*_, last] = texts.cut(texts.match(tree.ids[:end])[0], end)
                texts.note_state(last, cache.pool.read(tree.states[end]))

    def recall(self, tree: Tree, ids: Sequence[int]) -> None:
        """Fill an empty row with the longest known prefix of a text; at least the text's last token is left to read."""
        if not self.reuse or len(ids) <= MIN_PREFIX:
            return
        cache, texts, begins = tree.cache, self._texts(tree.cache, tree.long), [*ids[:-1]]
        path, finished = texts.match(begins)  # how many tokens a finished text has in common with it
        source, live = cache.live_texts.longest(cache.trees, begins, tree.long)  # and a live one
        if cache.pool is not None:
            ends = [node.end for node in path if node.recurrent and node.end <= finished]
            finished, live = max(ends, default=0), source.known(live) if source is not None else 0
            if cache.pool.layout.stepwise and len(ids) - max(finished, live) > MIN_PREFIX:
                return  # reading the rest token by token would take longer than reading the whole
        tokens = max(finished, live)
        if tokens < MIN_PREFIX:
            return
        if cache.shares(live) and self.evict_for(live * cache.bytes_per_token):
            cache.share(tree, begins, source, live)
        if tokens <= tree.prefix:
            return
        if source is not None and live >= finished:
            states, after = cache.read(source, tokens, tree.prefix), source.states.get(tokens)
            recurrent = after.shared() if after is not None else None
        else:
            texts.use(path)
            states = texts.read(path, tokens, tree.prefix)
            recurrent = self._recurrent_states(cache, path, tokens)
        if recurrent is not None:
            tree.states[tokens] = recurrent  # set first, so that closing the row frees it even if memory runs out now
        cache.write(tree, begins[tree.prefix : tokens], states)

    @staticmethod
    def _recurrent_states(cache: TreeCache, path: Sequence[PrefixNode], tokens: int) -> State | None:
        """Return the states after `tokens` tokens of a path, for a row that goes on from there."""
        if cache.pool is None:
            return None
        [state] = cache.pool.write(next(node.recurrent for node in path if node.end == tokens))
        return state

    def forget(self, cache: TreeCache) -> None:
        """Give back the memory of a cache that is no longer used, and its finished texts."""
        self.caches.remove(cache)
        self._forget_texts(cache)
        cache.release()

    def replace(self, old: TreeCache, new: TreeCache) -> None:
        """Put a new cache in the place of an old one, whose finished texts are evicted."""
        self.caches = [cache for cache in self.caches if cache not in (old, new)] + [new]
        self._forget_texts(old)

    def _forget_texts(self, cache: TreeCache) -> None:
        for kind in [each for each in self._finished if each[0] is cache]:
            for node in self._finished.pop(kind).nodes():
                del self._recent[node]


def first_to_read(texts: Sequence[Sequence[int]]) -> list[int]:
    """Return the indices of those texts that share no prefix with an earlier one among them.

    The others can reuse what they have in common with one of these, once it has been read.
    """
    first: list[int] = []
    beginnings: set[tuple[int, ...]] = set()
    for index, text in enumerate(texts):
        beginning = tuple(text[:MIN_PREFIX])
        if len(text) <= MIN_PREFIX or beginning not in beginnings:
            first.append(index)
            beginnings.add(beginning)
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
