"""Where the texts of a request end in the KV cache: the kept one, and its candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from cards_integrations.chat.detokenizer import Detokenizer
from cards_integrations.models.base import Candidate
from cards_integrations.transformer.forward import Output
from cards_integrations.transformer.kv_cache import Branch


class ReadStates(NamedTuple):
    """The sum of the hidden states, (hidden size,) float32, after the first `tokens` tokens of an answer."""

    total: torch.Tensor
    tokens: int


@dataclass(eq=False)
class Frontier:
    """The end of a path through the tree: that of the kept text, or of a candidate.

    Attributes:
        held: The path in the KV cache; None while the request is preempted, and then until it is read again.
        owner: The candidate that it began as, which it still names after that is kept; None if it began as the prompt.
        own_row: True if the candidate has a row of the cache to itself.
        unread: The last tokens of the path, which the model has not read yet.
        logits: The logits after the last token, once it has been read.
        waiting: Candidates that go on from here as soon as there are logits.
        complete: True if the owner has all of its tokens, and only waits for its hidden states.
        read: The sum of the hidden states after the tokens of the answer, where its request asks for states; None if
            some of them are unknown.
        detokenizer: Decodes the owner's text; None until that is needed.
    """

    held: Branch | None
    owner: Candidate | None = None
    own_row: bool = False
    unread: list[int] = field(default_factory=list)
    logits: Output | None = None
    waiting: list[Candidate] = field(default_factory=list)
    complete: bool = False
    read: ReadStates | None = None
    detokenizer: Detokenizer | None = None

    @property
    def branch(self) -> Branch:
        """The path in the cache; it must be there."""
        assert self.held is not None
        return self.held

    def forget(self, ids: Sequence[int]) -> None:
        """Note that the cache holds nothing of it any more, and that these tokens are to be read."""
        self.held, self.own_row, self.unread, self.logits = None, False, [*ids], None

    def note_state(self, state: torch.Tensor, tokens: int) -> None:
        """Note the hidden state after so many tokens of the answer, 0 being the end of the prompt."""
        if self.read is None:
            self.read = ReadStates(torch.zeros_like(state, dtype=torch.float32), 0) if tokens == 0 else None
        elif tokens > self.read.tokens:  # else it is read again
            self.read = ReadStates(self.read.total + state, tokens) if tokens == self.read.tokens + 1 else None

    @property
    def states(self) -> torch.Tensor | None:
        """The hidden state after the last token, and the mean of those after the answer's tokens, (2, hidden size)."""
        if self.read is None or self.logits is None:
            return None
        return torch.stack([self.logits.state.float(), self.read.total / max(1, self.read.tokens)])

    def own_logits(self) -> None:
        """Replace its logits by a copy, so that they do not keep those of the whole step alive."""
        if self.logits is not None and len(self.logits.batch) > 1:
            self.logits = self.logits.alone()


@dataclass(eq=False)
class OpenRequest:
    """The frontiers of one request: the kept text's, and those of its candidates.

    A candidate that waits for its first logits is at the frontier that it goes on from. `long` is the kept text once
    more, read with the rotary frequencies of long texts, for candidates that outgrow those of short texts.
    """

    kept: Frontier
    candidates: dict[Candidate, Frontier] = field(default_factory=dict)
    long: Frontier | None = None

    def is_trunk(self, frontier: Frontier) -> bool:
        """True for the frontier of the kept text, in either reading."""
        return frontier is self.kept or frontier is self.long

    def origin(self, candidate: Candidate) -> Frontier:
        """Return the frontier that a candidate goes on from."""
        return self.kept if candidate.parent is None else self.candidates.get(candidate.parent, self.kept)

    def join(self, frontier: Frontier, origin: Frontier) -> None:
        """Move all candidates at a frontier without tokens of its own back to its origin."""
        origin.waiting += frontier.waiting
        for candidate, at in self.candidates.items():
            if at is frontier:
                self.candidates[candidate] = origin
