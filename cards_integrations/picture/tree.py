"""The tree of candidates that an answer was chosen from: what each of them follows, and whether others follow it."""

from __future__ import annotations

from dataclasses import dataclass

from cards_integrations.trace import Alignment, DraftTrace

Point = tuple[int, float]
"""A number of tokens, and the reward of the answer up to there."""


@dataclass(frozen=True)
class Node:
    """A candidate and its place in the tree."""

    draft: DraftTrace
    """The candidate."""
    segment: int
    """The number of its segment, from 1."""
    end: int
    """Tokens of the answer up to its end."""
    start: Point | None
    """The end of what it follows; None if that was not scored."""
    went_on: bool
    """True if others follow it, although it was not kept."""

    @property
    def kept(self) -> bool:
        """True if it is part of the answer."""
        return self.draft.verdict in ("accepted", "best")

    @property
    def point(self) -> Point | None:
        """Its end and its reward; None if it was not scored."""
        return None if self.draft.reward is None else (self.end, self.draft.reward)


def levels_of(alignment: Alignment) -> list[list[Node]]:
    """Return the candidates of each segment, in order."""
    levels: list[list[Node]] = []
    begin, kept = 0, None if alignment.prompt_reward is None else (0, alignment.prompt_reward)
    for i, segment in enumerate(alignment.segments):
        before = {node.draft.index: node for node in levels[-1]} if levels else {}
        following = {draft.parent for later in alignment.segments[i + 1 : i + 2] for draft in later.drafts}
        level = []
        for draft in segment.drafts:
            parent = None if draft.parent is None else before.get(draft.parent)
            start, end = (parent.point, parent.end) if parent else (kept, begin)
            level.append(Node(draft, i + 1, end + len(draft.token_ids), start, draft.index in following))
        levels.append(level)
        begin += len(segment.token_ids)
        kept = None if segment.reward is None else (begin, segment.reward)
    return levels
