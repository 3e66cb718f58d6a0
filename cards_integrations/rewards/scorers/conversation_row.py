"""A conversation in the KV cache of a reward model: its trunk, its scored answers, what a full window leaves out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from cards_integrations.rewards.base import Response
from cards_integrations.rewards.scorers.answer_ids import AnswerIds
from cards_integrations.transformer.kv_cache import Branch, Tree
from cards_integrations.transformer.prefix_tree import common


class Reading(NamedTuple):
    """How a text is read: without its first `cut` tokens, and perhaps with the rotary frequencies of long texts."""

    cut: int = 0
    long: bool = False


class FittedText(NamedTuple):
    """A conversation with an answer as it is read; `suffix` tokens follow the answer."""

    ids: list[int]
    suffix: int
    reading: Reading


@dataclass
class ScoredBranch:
    """A scored response in the cache."""

    branch: Branch
    cut: int
    """How many tokens of the text its path leaves out."""
    root: Branch | None
    """The branch of the row's `reread` that it grows from; None if it grows from the trunk."""
    kept: int
    """How many of the branch's first own tokens become part of the trunk if the response is kept."""
    path: list[int]
    """All tokens up to the end of these."""
    log_p: list[float] = field(default_factory=list)
    """In nats, of each token of the answer, where a likelihood is read."""

    def can_go_on(self, again: int) -> bool:
        """True if another branch can leave it before the last `again` of the tokens that are kept."""
        own = self.kept - again
        return own >= 0 and self.branch.known(self.branch.base + own) == self.branch.base + own


@dataclass
class ConversationRow:
    """An open conversation in the cache."""

    tree: Tree
    before_ids: list[int]
    """The tokens before the answer."""
    answer_ids: AnswerIds | None
    """Encodes the conversation with an answer; None where an answer has no text around it."""
    known_ids: list[int] = field(default_factory=list)
    """The trunk's tokens when the row was freed, which are read again together."""
    log_p: list[float] = field(default_factory=list)
    """In nats, of each token of the kept answer, where a likelihood is read."""
    branches: dict[Response, ScoredBranch] = field(default_factory=dict)
    cut: int = 0
    """How many tokens of the text the trunk leaves out, because the window was full."""
    reread: dict[Reading, Branch] = field(default_factory=dict)
    """The kept text in other readings, for answers that fill the window or make the text a long one."""
    outdated: list[Branch] = field(default_factory=list)
    """Earlier branches of `reread`, from which scored branches may still grow."""
    warned_about_window: bool = False

    @property
    def reading(self) -> Reading:
        """How the trunk is read."""
        return Reading(self.cut, self.tree.long)

    def again(self, tree: Tree, known_ids: list[int]) -> ConversationRow:
        """Return the same conversation in an empty row, where these tokens are to be read again."""
        return ConversationRow(tree, self.before_ids, self.answer_ids, known_ids, self.log_p, cut=self.cut)

    def begin(self, reading: Reading) -> None:
        """Choose how the trunk is read, before anything of it has been."""
        self.known_ids = self.known_ids[reading.cut - self.cut :] if reading.cut >= self.cut else []
        self.cut, self.tree.long = reading

    def leave(self, text: FittedText, most: int) -> tuple[Branch | None, int, Branch]:
        """Make a branch for a text, after as many of its tokens as are known.

        Args:
            text: The text.
            most: The most tokens that may be known.

        Returns:
            The `root` of the branch, how many tokens are known, and the branch.
        """
        root, long = self.reread.get(text.reading), text.reading.long
        if root is None and long != self.tree.long:
            return None, 0, self.tree.branch(0, long)
        trunk = self.tree if root is None else root
        shared = trunk.known(min(common(text.ids, trunk.ids), most))
        return root, shared, trunk.branch(shared)

    def keep(self, scored: ScoredBranch) -> None:
        """Make a scored answer part of the trunk."""
        if scored.root is not None and scored.root.ids:  # else it is part of the trunk already
            self.tree.keep(scored.root)
        self.tree.keep(scored.branch, scored.kept)
        self.tree.drop(scored.branch)
        self.outdated += self.reread.values()
        self.cut, self.reread = scored.cut, {}
        self.drop_outdated()

    def drop_outdated(self) -> None:
        """Free outdated branches once no scored branch can need them."""
        if not self.branches:
            for branch in self.outdated:
                branch.tree.drop(branch)
            self.outdated = []
