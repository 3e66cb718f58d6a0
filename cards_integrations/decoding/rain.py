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
    """A draft in the search tree.

    Attributes:
        draft: None at the root, which is the kept text.
        parent: The node that it follows; None at the root.
        prior: Its share among the children that its parent drafted; equal ones are one node with a larger share.
        value: Mean reward over the searches that went through it.
        visits: Number of these searches.
        children: Its distinct children.
    """

    draft: Draft | None
    parent: Node | None = None
    prior: float = 1.0
    value: float = 0.0
    visits: int = 0
    children: list[Node] = field(default_factory=list)

    def path(self) -> Iterator[Node]:
        """Yield the nodes from this one up to the root's child."""
        node: Node | None = self
        while node is not None and node.draft is not None:
            yield node
            node = node.parent


@register_method
class Rain(Decoding):
    """Rewindable Auto-regressive INference (arXiv 2309.07124, section 3.2).

    Before a segment is kept, the tree of possible continuations is searched, each time from the root (rewind). A
    search goes down to a leaf, at each node to the child with the highest

        value + explore * prior * sqrt(visits of the parent) / (1 + its own visits),

    grows `width` children there, evaluates them, and updates the values on the way back. Drafts that are similar to
    an evaluated one are updated with it, weighted by the similarity (here of their text; the authors compare
    embeddings). In the end the root's most visited child is kept.

    The authors evaluate with the model itself, `JudgeReward()`; any reward will do.
    """

    method: Literal["rain"] = "rain"
    """Names this method in settings files."""
    width: Annotated[int, Field(ge=1)] = 4
    """Children of a leaf; equal ones count as one, with a larger prior."""
    searches: Annotated[int, Field(ge=1)] = 6
    """The most searches before a segment is kept."""
    explore: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Weight of exploring what was seldom visited; 0 goes by the values alone."""
    share: Annotated[float, Field(ge=0, le=1)] = 0.2
    """How much of an update reaches a sibling of the same text; others get less, by their similarity."""
    value_threshold: FiniteFloat | None = None
    """A segment's searches end early once the most visited child has this value; None: never."""
    boundary: AnyBoundary = FixedLength(length=8)
    """Where a segment ends."""

    async def generate(self, session: Session) -> None:
        root = Node(None)
        while not session.finished:
            for _ in range(self.searches):
                leaf = self._select(root)
                if leaf.draft is not None and leaf.draft.finished:
                    self._update(leaf, leaf.draft.reward)
                else:
                    await self._expand(session, leaf)
                best = max(root.children, key=lambda node: (node.visits, node.value))
                if self.value_threshold is not None and best.value >= self.value_threshold:
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
            assert visits > 0  # only a search makes children
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
            self._update(child, child.draft.reward)

    def _update(self, node: Node, value: float) -> None:
        """Update the mean values up to the root, and those of similar siblings in part."""
        top = node
        for each in node.path():
            each.value += (value - each.value) / (each.visits + 1)
            each.visits += 1
            top = each
            for sibling in each.parent.children if each.parent else ():
                if sibling is not each and sibling.visits:
                    gained = self.share * _similarity(each, sibling)
                    sibling.value += gained * (value - sibling.value) / (sibling.visits + gained)
        if top.parent is not None:
            top.parent.visits += 1


def _similarity(one: Node, other: Node) -> float:
    """Return the similarity of two drafts' texts, from 0 to 1."""
    assert one.draft is not None
    assert other.draft is not None
    return SequenceMatcher(None, one.draft.text, other.draft.text, autojunk=False).ratio()
