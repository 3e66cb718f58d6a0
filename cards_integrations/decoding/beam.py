"""A beam search: in each round all prefixes grow by a draft, and the best drafts go on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from cards_integrations.decoding.base import Draft, Session
from cards_integrations.decoding.segmentation import FixedLength
from cards_integrations.trace import SearchRound


class Beam:
    """The prefixes that a search goes on with, the best one first.

    What all of them share is kept: it is streamed, and what was drafted beside it is freed.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.unkept: dict[Draft, list[Draft]] = {}  # by prefix: those of its drafts that are not kept yet, in order

    @property
    def finished(self) -> bool:
        """True if no prefix can go on."""
        return bool(self.unkept) and all(prefix.finished for prefix in self.unkept)

    async def advance(self, stage: SearchRound, width: int) -> list[float]:
        """Draft a round, and let the best of it and of the finished prefixes go on.

        Args:
            stage: The length of the drafts, and how many prefixes go on.
            width: The most drafts; each finished prefix takes the place of one.

        Returns:
            The rewards of the drafts.
        """
        done = {prefix: path for prefix, path in self.unkept.items() if prefix.finished}
        parents = self._parents(max(1, width - len(done)))
        drafts = await self.session.grow(parents, until=FixedLength(length=stage.tokens))
        grown = {d: [*self.unkept.get(p, []), d] for p, d in zip(parents, drafts, strict=True)}  # type: ignore[arg-type]
        self.unkept = done | grown
        await self._select(stage.survivors)
        return [draft.reward for draft in drafts]

    async def finish(self) -> None:
        """Keep the best prefix, and write it to its end."""
        await self._select(1)
        while not self.session.finished:
            [draft] = await self.session.grow([None], until=FixedLength(length=self.session.max_tokens))
            draft.verdict = "best"
            await self.session.keep(draft)

    def _parents(self, width: int) -> Sequence[Draft | None]:
        """Return a parent for each child: the unfinished prefixes, as evenly as possible."""
        live = [prefix for prefix in self.unkept if not prefix.finished]
        for prefix in live[width:]:
            self.session.give_up(prefix)
        live = live[:width]
        return [live[child * len(live) // width] for child in range(width)] if live else [None] * width

    async def _select(self, survivors: int) -> None:
        """Give up all but the best prefixes, and keep what those share."""
        ranked = sorted(self.unkept, key=lambda prefix: -prefix.reward)
        for prefix in ranked[survivors:]:
            self.session.give_up(prefix)
        chosen = {prefix: self.unkept[prefix] for prefix in ranked[:survivors]}
        shared = [level[0] for level in takewhile(_all_same, zip(*chosen.values(), strict=False))]
        if shared:
            shared[-1].verdict = "best"
            await self.session.keep(shared[-1])
        self.unkept = {prefix: path[len(shared) :] for prefix, path in chosen.items()}


def _all_same(drafts: Sequence[Draft]) -> bool:
    return all(draft is drafts[0] for draft in drafts)
