"""Schedulers for tests: one that drafts ahead whatever it costs, and one that watches another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from cards_integrations.engine import Engine
from cards_integrations.engine.draft_pool import Question
from cards_integrations.engine.scheduler import Scheduler
from cards_integrations.engine.session import Session
from cards_integrations.models.base import Candidate, Context
from cards_integrations.transformer.kv_cache import TreeCache


class Eager:
    """Drafts the `most` candidates that are most probably looked at, and scores at every `wait`-th chance.

    It remembers which candidates were kept, and checks the books of all caches at every step.
    """

    def __init__(self, engine: Engine, most: int = 12, wait: int = 1, rate: float = 0.5) -> None:
        self.model = engine.loaded()
        self.most, self.wait, self.rate = most, wait, rate
        self.asked = 0
        self.ahead: set[Candidate] = set()  # those that followed an unjudged one
        self.kept: dict[Context, list[Candidate]] = {}
        self._keep = self.model.keep
        self.model.keep = self._remember  # type: ignore[method-assign]
        assert engine._worker is not None
        engine._worker.scheduler = self

    @property
    def adopted(self) -> list[Candidate]:
        """Kept candidates that had begun before the one they follow was judged."""
        return [candidate for kept in self.kept.values() for candidate in kept if candidate in self.ahead]

    def candidates(self, sessions: Iterable[Session]) -> list[Candidate]:
        for cache in self.model.memory.caches:
            balance(cache)
        found = [p for s in sessions if s.drafting is not None for p in s.drafting.prospects(1.0, self.rate)]
        found.sort(key=lambda prospect: -prospect[0])
        chosen = [(pending or drafts.begin()).candidate for _, drafts, pending in found[: self.most]]
        self.ahead.update(candidate for candidate in chosen if candidate.parent is not None)
        return chosen

    def score_now(self, questions: Sequence[Question], sessions: int) -> bool:
        self.asked += 1
        return self.asked % self.wait == 0

    def _remember(self, candidate: Candidate) -> None:
        self.kept.setdefault(candidate.context, []).append(candidate)
        self._keep(candidate)


class Watch:
    """Chooses as the engine's scheduler does, and sees how much is in use at most."""

    def __init__(self, engine: Engine) -> None:
        self.model = engine.loaded()
        self.memory = self.model.memory
        assert engine._worker is not None
        self.chooses: Scheduler = engine._worker.scheduler
        self.live = self.rows = self.kept = self.bytes = 0
        engine._worker.scheduler = self

    def candidates(self, sessions: Iterable[Session]) -> list[Candidate]:
        live = list(sessions)
        self.live = max(self.live, len(live))
        self.rows = max(self.rows, len(self.model.transformer.cache.trees))
        self.kept = max(self.kept, len(self.memory.prefixes))
        self.bytes = max(self.bytes, self.memory.used)
        for cache in self.memory.caches:
            balance(cache)
        return self.chooses.candidates(live)

    def score_now(self, questions: Sequence[Question], sessions: int) -> bool:
        return self.chooses.score_now(questions, sessions)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(20_000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it never came true")


def balance(cache: TreeCache) -> None:
    """Every mask row is a tree's or free; every column that a row has taken is on a path or free, never both."""
    mask_rows = [*cache.free_mask_rows, *(mask_row for tree in cache.trees for mask_row in tree.mask_rows)]
    assert sorted(mask_rows) == list(range(len(cache.visible)))
    for row, tree in enumerate(cache.trees):
        assert tree.row == row
        seen = np.flatnonzero(cache.visible[sorted(tree.mask_rows)].any(0)).tolist()
        assert sorted([*seen, *tree.freed]) == list(range(1, tree.untouched))
