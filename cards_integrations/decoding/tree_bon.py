"""TreeBoN: best-of-N with speculative tree search."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cards_integrations.decoding.base import Decoding, Draft, Session
from cards_integrations.decoding.registry import register_method
from cards_integrations.decoding.segmentation import AnyBoundary, FixedLength


@register_method
class TreeBoN(Decoding):
    """TreeBoN (arXiv 2410.16033, algorithm 1).

    Layers of n drafts; the n / children best of a layer have `children` each in the next one. The best of the last
    layer is kept.

    The authors score with the implicit reward of a DPO pair (`ImplicitReward`), which is meant for
    beginnings; any reward will do. They cut answers into layers of equal length.
    """

    method: Literal["tree_bon"] = "tree_bon"
    """Names this method in settings files."""
    n: Annotated[int, Field(ge=1)] = 16
    """Drafts of a layer."""
    children: Annotated[int, Field(ge=1)] = 4
    """Children of each draft that a layer keeps."""
    boundary: AnyBoundary = FixedLength(length=32)
    """Where a layer ends."""

    async def generate(self, session: Session) -> None:
        parents: list[Draft | None] = [None] * self.n
        layer: list[Draft] = []
        while True:
            grown = iter(await session.grow([p for p in parents if p is None or not p.finished], until=self.boundary))
            layer = [p if p is not None and p.finished else next(grown) for p in parents]
            if all(draft.finished for draft in layer):
                break
            ranked = sorted(dict.fromkeys(layer), key=lambda draft: -draft.reward)
            active = ranked[: max(1, self.n // self.children)]
            for draft in ranked[len(active) :]:
                session.give_up(draft)
            parents = [draft for draft in active for _ in range(1 if draft.finished else self.children)]
        best = max(layer, key=lambda draft: draft.reward)
        best.verdict = "best"
        await session.keep(best)
