"""RAIN: search with self-evaluation and rewind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Annotated, Literal

from pydantic import Field, FiniteFloat

from cards_integrations.decoding.base import Decoding, Draft, Session
from cards_integrations.decoding.registry import register_method
from cards_integrations.decoding.segmentation import AnyBoundary, FixedLength


@dataclass(eq=False)
class Node:
    """A draft in the search tree, with its mean value over `visits` searches that went through it."""

    draft: Draft | None
    parent: Node | None = None
    prior: float = 1.0
    value: float = 0.0
    visits: int = 0
    children: list[Node] = field(default_factory=list)

    def path(self) -> Iterator[Node]:
        """From here up to the root's child."""
        node: Node | None = self
        while node is not None and node.draft is not None:
            yield node
            node = node.parent


@register_method
class Rain(Decoding):
    """Rewindable Auto-regressive INference (arXiv 2309.07124, section 3.2): before a segment is kept, the tree
    of what could follow is searched, from the root again and again (rewind).

    A search goes down to the child with the highest value + explore * prior * sqrt(visits of the parent)
    / (1 + its own visits) until a leaf, grows `width` children there (equal drafts are one, and their share is
    its prior), evaluates them, and updates the values on the way back. Drafts that are like one that was
    evaluated learn of it, weighted by similarity (here of their text; the authors compare embeddings). The
    search ends after `searches`, or once the most visited child's value reaches `enough`; that child is kept.

    The authors evaluate with the model itself, `JudgeReward()`; any reward will do.
    """

    method: Literal["rain"] = "rain"
    width: Annotated[int, Field(ge=1)] = 4
    searches: Annotated[int, Field(ge=1)] = 6
    explore: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    share: Annotated[float, Field(ge=0, le=1)] = 0.2
    enough: FiniteFloat | None = None
    boundary: AnyBoundary = FixedLength(length=8)

    async def generate(self, session: Session) -> None:
        root = Node(None)
        while not session.finished:
            for _ in range(self.searches):
                leaf = self._select(root)
                if leaf.draft is not None and leaf.draft.finished:
                    self._learn(leaf, leaf.draft.reward)
                else:
                    await self._expand(session, leaf)
                best = max(root.children, key=lambda node: (node.visits, node.value))
                if self.enough is not None and best.value >= self.enough:
                    break
            assert best.draft is not None
            best.draft.verdict = "best"
            await session.keep(best.draft)
            root = best
            root.parent, root.draft = None, None

    def _select(self, root: Node) -> Node:
        node = root
        while node.children:
            scale, visits = self.explore * math.sqrt(node.visits), node.visits
            assert visits > 0  # children come of a search
            node = max(node.children, key=lambda child: child.value + scale * child.prior / (1 + child.visits))
        return node

    async def _expand(self, session: Session, leaf: Node) -> None:
        drafts = await session.grow([leaf.draft] * self.width, until=self.boundary)
        alike: dict[tuple[str, bool], list[Draft]] = {}
        for draft in drafts:
            alike.setdefault((draft.text, draft.finished), []).append(draft)
        for same in alike.values():
            for draft in same[1:]:
                session.give_up(draft)
            leaf.children.append(Node(same[0], leaf, len(same) / len(drafts)))
        for child in leaf.children:
            assert child.draft is not None
            self._learn(child, child.draft.reward)

    def _learn(self, node: Node, value: float) -> None:
        """The mean of all values below, on the way up; and what is like the node learns its share."""
        top = node
        for each in node.path():
            each.value += (value - each.value) / (each.visits + 1)
            each.visits += 1
            top = each
            for sibling in each.parent.children if each.parent else ():
                if sibling is not each and sibling.visits:
                    likeness = _likeness(each, sibling)
                    gained = self.share * likeness
                    sibling.value += gained * (value - sibling.value) / (sibling.visits + gained)
        if top.parent is not None:
            top.parent.visits += 1


def _likeness(one: Node, other: Node) -> float:
    assert one.draft is not None
    assert other.draft is not None
    return SequenceMatcher(None, one.draft.text, other.draft.text, autojunk=False).ratio()
