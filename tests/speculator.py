"""A scheduler that drafts ahead whatever it costs, so that tests do not depend on measured times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from cards_integrations.engine import Engine
from cards_integrations.models.base import Candidate, Context
from cards_integrations.models.kv_cache import TreeCache
from cards_integrations.session import Question, Session


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

    def stepped(self, seconds: float, candidates: int) -> None: ...

    def scored(self, seconds: float, tokens: int) -> None: ...

    def _remember(self, candidate: Candidate) -> None:
        self.kept.setdefault(candidate.context, []).append(candidate)
        self._keep(candidate)


def balance(cache: TreeCache) -> None:
    """Every lane is a tree's or free; every column that a row has taken is on a path or free, never both."""
    lanes = [*cache.lanes, *(lane for tree in cache.trees for lane in tree.lanes)]
    assert sorted(lanes) == list(range(len(cache.sees)))
    for slot, tree in enumerate(cache.trees):
        assert tree.slot == slot
        seen = np.flatnonzero(cache.sees[sorted(tree.lanes)].any(0)).tolist()
        assert sorted([*seen, *tree.freed]) == list(range(1, tree.untouched))
