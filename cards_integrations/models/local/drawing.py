"""Sampling for all candidates of a step at once: a few tensor operations, and one transfer to the host."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from cards_integrations.chat.grammar import GrammarTokenizer
from cards_integrations.models.base import Boundary, Candidate
from cards_integrations.models.local.penalties import Penalties
from cards_integrations.models.sampling import distinct, draw
from cards_integrations.transformer.forward import Output

ON_HOST = {"mps"}  # devices without float64: tokens are drawn on the host


class Drawn(NamedTuple):
    """A token that was drawn for a candidate.

    Attributes:
        token: Its id.
        log_p: Its log-probability in nats, full vocabulary, temperature 1.
        rises: True if the boundary ends the segment before this token (the uncertainty rises).
        top: The most probable tokens at its position and their log p, as many as the request reports.
    """

    token: int
    log_p: float
    rises: bool
    top: Sequence[tuple[int, float]] = ()


class TokenDrawer:
    """Draws the next tokens of candidates, each with its own sampler, grammar and boundary.

    Args:
        grammars: Returns the vocabulary as grammars see it; called when a candidate has a grammar.
        eos: The ids of end-of-sequence.
    """

    def __init__(self, grammars: Callable[[], GrammarTokenizer], eos: Collection[int] = ()) -> None:
        self._grammars = grammars
        self._penalties = Penalties(eos)

    @torch.inference_mode()
    def draw(self, candidates: Sequence[Candidate], outputs: Sequence[Output]) -> list[Drawn]:
        """Draw a token for each candidate, from the logits after its last token."""
        logits, rows = _stacked(outputs)
        logits = logits.cpu() if logits.device.type in ON_HOST else logits
        tokens, forced = self.tokens(candidates, logits, rows)
        log_p = logits.float().log_softmax(-1)
        asked = [*_decisions(candidates, forced, logits, log_p, rows)]
        gains = log_p[torch.from_numpy(np.array(rows)).to(logits.device), tokens]
        numbers = torch.cat([tokens.double(), gains.double(), *(rises.double() for _, rises in asked)]).tolist()
        n, rising = len(candidates), [False] * len(candidates)
        for i, rises in zip([i for members, _ in asked for i in members], numbers[2 * n :], strict=True):
            rising[i] = bool(rises)
        drawn = [*map(Drawn, map(int, numbers[:n]), numbers[n : 2 * n], rising)]
        for i, top in _reported(candidates, log_p, rows):
            drawn[i] = drawn[i]._replace(top=top)
        return drawn

    def tokens(
        self, candidates: Sequence[Candidate], logits: torch.Tensor, rows: Sequence[int]
    ) -> tuple[torch.Tensor, Collection[int]]:
        """Return a token for each candidate, from its row of the logits, and the indices of those without a choice."""
        changed = [i for i, candidate in enumerate(candidates) if not candidate.context.sampler.plain]
        changed = [i for i in changed if self._penalties.concern(candidates[i])]
        if not changed:
            return self._plain(candidates, logits, rows)
        rest = sorted({*range(len(candidates))}.difference(changed))
        tokens, forced = torch.empty(len(candidates), dtype=torch.long, device=logits.device), []
        for members, choose in ((changed, self._changed), (rest, self._plain)):
            if members:
                own = [candidates[i] for i in members], logits, [rows[i] for i in members]
                tokens[members], without_choice = choose(*own)
                forced += [members[i] for i in without_choice]
        return tokens, forced

    def _plain(
        self, candidates: Sequence[Candidate], logits: torch.Tensor, rows: Sequence[int]
    ) -> tuple[torch.Tensor, Collection[int]]:
        bound = [i for i, candidate in enumerate(candidates) if candidate.matcher is not None]
        if not bound:
            return _drawn(candidates, logits, rows), ()
        allowed, forced = self._allowed(candidates, bound)
        masked = logits[[rows[i] for i in bound]].masked_fill(~allowed.to(logits.device), -torch.inf)
        own = dict(zip(bound, range(len(logits), len(logits) + len(bound)), strict=True))
        rows = [own.get(i, row) for i, row in enumerate(rows)]
        return _drawn(candidates, torch.cat([logits, masked]), rows), forced

    def _changed(
        self, candidates: Sequence[Candidate], logits: torch.Tensor, rows: Sequence[int]
    ) -> tuple[torch.Tensor, Collection[int]]:
        """Like `_plain`, for candidates whose samplers change the logits, so that each needs a row of its own."""
        own, forced = self._penalties.apply(candidates, logits[list(rows)]), list[int]()
        if bound := [i for i, candidate in enumerate(candidates) if candidate.matcher is not None]:
            allowed, forced = self._allowed(candidates, bound)
            own[bound] = own[bound].masked_fill(~allowed.to(logits.device), -torch.inf)
        own = self._penalties.without_ends(candidates, own)
        return _drawn(candidates, own, range(len(candidates))), forced

    def _allowed(self, candidates: Sequence[Candidate], bound: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """Return what the grammars allow, (bound, vocabulary) bool, and the indices of those without a choice."""
        grammars = self._grammars()
        drafted = [(c, c.matcher) for c in (candidates[i] for i in bound) if c.matcher is not None]
        allowed = grammars.allowed([matcher for _, matcher in drafted])
        for (candidate, matcher), row in zip(drafted, allowed, strict=True):
            if candidate.closing and grammars.close(row):
                matcher.closed = True
        return allowed, [i for i, n in zip(bound, allowed.sum(-1).tolist(), strict=True) if n == 1]


def _stacked(outputs: Sequence[Output]) -> tuple[torch.Tensor, list[int]]:
    """Return the distinct logits (n, vocabulary), and the row of each output among them."""
    batch, rows = outputs[0].batch, [output.last for output in outputs]
    if all(output.batch is batch for output in outputs) and 4 * len(set(rows)) >= 3 * len(batch):
        return batch, rows  # a few rows too many cost less than a copy of the others
    values = {(id(output.batch), output.last): output for output in outputs}  # siblings begin with the same logits
    places, rows = distinct([(id(output.batch), output.last) for output in outputs])
    return torch.stack([values[place].value for place in places]), rows


def _drawn(candidates: Sequence[Candidate], logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Return the tokens that the samplers draw or, for the first token of a candidate with a rank, that of the rank."""
    uniforms = [candidate.uniforms[len(candidate.ids)] for candidate in candidates]
    tokens = draw([candidate.context.sampler for candidate in candidates], logits, rows, uniforms)
    for i, candidate in enumerate(candidates):
        if candidate.rank is not None and not candidate.ids:
            allowed = int(logits[rows[i]].isfinite().sum())
            candidate.rank = min(candidate.rank, allowed - 1)
            tokens[i] = logits[rows[i]].topk(candidate.rank + 1).indices[-1]
    return tokens


def _reported(
    candidates: Sequence[Candidate], log_p: torch.Tensor, rows: Sequence[int]
) -> Iterator[tuple[int, list[tuple[int, float]]]]:
    """Yield the index of each candidate whose request reports the most probable tokens, and these."""
    counts = [candidate.context.logprobs for candidate in candidates]
    asked = [(i, count) for i, count in enumerate(counts) if count]
    if not asked:
        return
    most = min(max(count for _, count in asked), log_p.shape[-1])
    found = log_p[[rows[i] for i, _ in asked]].topk(most)
    for (i, count), ids, values in zip(asked, found.indices.tolist(), found.values.tolist(), strict=True):
        yield i, [*zip(ids, values, strict=True)][:count]


def _decisions(
    candidates: Sequence[Candidate],
    forced: Collection[int],
    logits: torch.Tensor,
    log_p: torch.Tensor,
    rows: Sequence[int],
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Ask each boundary once; yield indices of candidates, and whether their segments end before the token."""
    asked: dict[Boundary, list[int]] = {}
    for i, candidate in enumerate(candidates):
        if len(candidate.ids) >= candidate.boundary.min_tokens and i not in forced:
            asked.setdefault(candidate.boundary, []).append(i)
    for boundary, members in asked.items():
        rises = boundary.ends_before(logits, log_p, [rows[i] for i in members])
        if rises is not None and len(rises) != len(members):
            name = type(boundary).__name__
            raise ValueError(f"{name}.ends_before must return a bool for each of {len(members)} rows, not {len(rises)}")
        if rises is not None:
            yield members, rises
