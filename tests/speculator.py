"""Schedulers for tests: one that drafts ahead whatever it costs, and one that watches another."""

from __future__ import annotations

from collections.abc import Collection

import internals

from cards_integrations.engine import Engine
from cards_integrations.engine.session import Session
from cards_integrations.models.base import Candidate, Context


class Eager:
    """Drafts the `most` candidates that are most probably examined, and scores at every `wait`-th chance.

    It remembers which candidates were kept, and checks the books of all caches at every step.
    """

    def __init__(self, engine: Engine, most: int = 12, wait: int = 1, rate: float = 0.5) -> None:
        self.model = internals.language_model(engine)
        self.most, self.wait, self.rate = most, wait, rate
        self.asked = 0
        self.ahead: set[Candidate] = set()  # those that followed an unjudged one
        self.kept: dict[Context, list[Candidate]] = {}
        self._keep = self.model.keep
        self.model.keep = self._remember
        internals.replace_scheduler(engine, self)

    @property
    def adopted(self) -> list[Candidate]:
        """Kept candidates that had begun before the one they follow was judged."""
        return [candidate for kept in self.kept.values() for candidate in kept if candidate in self.ahead]

    def candidates(self, sessions: Collection[Session]) -> list[Candidate]:
        for cache in self.model.memory.caches:
            internals.balance(cache)
        drafting = [s.pool.current for s in sessions if s.pool.current is not None]
        found = [ranked for drafts in drafting for ranked in drafts.ranked_candidates(1.0, self.rate)]
        found.sort(key=lambda ranked: -ranked[0])
        chosen = [(pending or drafts.begin()).candidate for _, drafts, pending in found[: self.most]]
        self.ahead.update(candidate for candidate in chosen if candidate.parent is not None)
        return chosen

    def score_now(self, sessions: Collection[Session]) -> bool:
        self.asked += 1
        return self.asked % self.wait == 0

    def _remember(self, candidate: Candidate) -> None:
        self.kept.setdefault(candidate.context, []).append(candidate)
        self._keep(candidate)


class Watch:
    """Chooses as the engine's scheduler does, and sees how much is in use at most."""

    def __init__(self, engine: Engine) -> None:
        self.model = internals.language_model(engine)
        self.memory = self.model.memory
        self.scheduler = internals.scheduler(engine)
        self.live = self.rows = self.kept = self.bytes = self.shared = 0
        internals.replace_scheduler(engine, self)

    def candidates(self, sessions: Collection[Session]) -> list[Candidate]:
        self.live = max(self.live, len(sessions))
        self.rows = max(self.rows, len(self.model.transformer.cache.trees))
        self.kept = max(self.kept, len(self.memory.prefix_lengths))
        self.bytes = max(self.bytes, self.memory.used)
        self.shared = max(self.shared, sum(len(p.users) for cache in self.memory.caches for p in cache.prefixes))
        for cache in self.memory.caches:
            internals.balance(cache)
        return self.scheduler.candidates(sessions)

    def score_now(self, sessions: Collection[Session]) -> bool:
        return self.scheduler.score_now(sessions)
