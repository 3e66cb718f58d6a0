"""A conversation in the KV cache of a reward model: its trunk, its scored answers, and what a full window omits."""

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
    """Tokens that its path leaves out."""
    root: Branch | None
    """Where its path left the trunk: at one of the row's `reread`, or directly."""
    kept: int
    """How many of the branch's own tokens, from its first on, go into the trunk if the response is kept."""
    path: list[int]
    """All tokens up to the end of those."""
    log_p: list[float] = field(default_factory=list)
    """In nats, of each token of the answer, where a likelihood is read."""

    def can_go_on(self, again: int) -> bool:
        """True if another branch can leave it before the last so many of the tokens that are kept."""
        own = self.kept - again
        return own >= 0 and self.branch.known(self.branch.base + own) == self.branch.base + own


@dataclass
class ConversationRow:
    """An open conversation in the cache."""

    tree: Tree
    before_ids: list[int]
    """Those of all that stands before the answer."""
    answer_ids: AnswerIds | None
    """From an answer to all ids; None where an answer has no text around it."""
    known_ids: list[int] = field(default_factory=list)
    """The trunk's tokens when the row was freed, which are read again together."""
    log_p: list[float] = field(default_factory=list)
    """In nats, of each token of the kept answer, where a likelihood is read."""
    branches: dict[Response, ScoredBranch] = field(default_factory=dict)
    cut: int = 0
    """Tokens that the trunk leaves out, because the window was full."""
    reread: dict[Reading, Branch] = field(default_factory=dict)
    """What is kept, in other readings: for answers with which the window gets full, or the text long."""
    outdated: list[Branch] = field(default_factory=list)
    """Such branches that are of no more use; scored branches may go on from them."""
    warned_about_window: bool = False

    @property
    def reading(self) -> Reading:
        """That of the trunk."""
        return Reading(self.cut, self.tree.long)

    def again(self, tree: Tree, known_ids: list[int]) -> ConversationRow:
        """The same in an empty row, where these tokens are to be read again."""
        return ConversationRow(tree, self.before_ids, self.answer_ids, known_ids, self.log_p, cut=self.cut)

    def begin(self, reading: Reading) -> None:
        """Choose how the trunk is read, of which nothing has been."""
        self.known_ids = self.known_ids[reading.cut - self.cut :] if reading.cut >= self.cut else []
        self.cut, self.tree.long = reading

    def leave(self, text: FittedText, most: int) -> tuple[Branch | None, int, Branch]:
        """The root of a new branch, how many tokens of a text are known, up to `most`, and the branch after these."""
        root, long = self.reread.get(text.reading), text.reading.long
        if root is None and long != self.tree.long:
            return None, 0, self.tree.branch(0, long)
        trunk = self.tree if root is None else root
        shared = trunk.known(min(common(text.ids, trunk.ids), most))
        return root, shared, trunk.branch(shared)

    def keep(self, scored: ScoredBranch) -> None:
        """Make a scored answer part of the trunk."""
        if scored.root is not None and scored.root.ids:  # else it is in the trunk already
            self.tree.keep(scored.root)
        self.tree.keep(scored.branch, scored.kept)
        self.tree.drop(scored.branch)
        self.outdated += self.reread.values()
        self.cut, self.reread = scored.cut, {}
        self.drop_outdated()

    def drop_outdated(self) -> None:
        """Free what no scored branch can need any more."""
        if not self.branches:
            for branch in self.outdated:
                branch.tree.drop(branch)
            self.outdated = []
