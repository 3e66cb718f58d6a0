"""One draw for all candidates of a step: a handful of tensor operations, and one transfer to the host."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from cards_integrations.chat.grammar import GrammarTokenizer
from cards_integrations.models.base import Boundary, Candidate
from cards_integrations.models.sampling import distinct, draw
from cards_integrations.transformer.forward import Output

ON_HOST = {"mps"}  # devices without float64; their logits are drawn from on the host


class Drawn(NamedTuple):
    """A token that was drawn for a candidate.

    Attributes:
        token: Its id.
        log_p: Its log-probability in nats, full vocabulary, temperature 1.
        rises: True if the segment ends before it.
    """

    token: int
    log_p: float
    rises: bool


class TokenDrawer:
    """Draws the next tokens of candidates, each with the sampler, the grammar and the boundary of its own.

    Args:
        grammars: Returns the vocabulary as grammars see it; called when a candidate has one.
    """

    def __init__(self, grammars: Callable[[], GrammarTokenizer]) -> None:
        self._grammars = grammars

    @torch.inference_mode()
    def draw(self, candidates: Sequence[Candidate], outputs: Sequence[Output]) -> list[Drawn]:
        """A token for each candidate, from the logits after its last one."""
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
        return [*map(Drawn, map(int, numbers[:n]), numbers[n : 2 * n], rising)]

    def tokens(
        self, candidates: Sequence[Candidate], logits: torch.Tensor, rows: Sequence[int]
    ) -> tuple[torch.Tensor, Collection[int]]:
        """The token of each candidate, from its row of the logits, and which of them had no choice."""
        bound = [i for i, candidate in enumerate(candidates) if candidate.matcher is not None]
        if not bound:
            return _drawn(candidates, logits, rows), ()
        allowed = self._allowed([candidates[i] for i in bound])
        forced = [i for i, n in zip(bound, allowed.sum(-1).tolist(), strict=True) if n == 1]
        masked = logits[[rows[i] for i in bound]].masked_fill(~allowed.to(logits.device), -torch.inf)
        own = dict(zip(bound, range(len(logits), len(logits) + len(bound)), strict=True))
        rows = [own.get(i, row) for i, row in enumerate(rows)]
        return _drawn(candidates, torch.cat([logits, masked]), rows), forced

    def _allowed(self, candidates: Sequence[Candidate]) -> torch.Tensor:
        """What the grammars of these candidates let through, (candidates, vocabulary) bool."""
        grammars, matchers = self._grammars(), [c.matcher for c in candidates if c.matcher is not None]
        allowed = grammars.allowed(matchers)
        for candidate, matcher, row in zip(candidates, matchers, allowed, strict=True):
            if candidate.closing and grammars.close(row):
                matcher.closed = True
        return allowed


def _stacked(outputs: Sequence[Output]) -> tuple[torch.Tensor, list[int]]:
    """Distinct logits (n, vocabulary), and where each of the given ones is among them."""
    batch, rows = outputs[0].batch, [output.last for output in outputs]
    if all(output.batch is batch for output in outputs) and 4 * len(set(rows)) >= 3 * len(batch):
        return batch, rows  # a few rows too many cost less than a copy of the others
    values = {(id(output.batch), output.last): output for output in outputs}  # siblings begin from the same ones
    places, rows = distinct([(id(output.batch), output.last) for output in outputs])
    return torch.stack([values[place].value for place in places]), rows


def _drawn(candidates: Sequence[Candidate], logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """The samplers' tokens, but for those that begin with the token of a rank."""
    uniforms = [candidate.uniforms[len(candidate.ids)] for candidate in candidates]
    tokens = draw([candidate.context.sampler for candidate in candidates], logits, rows, uniforms)
    for i, candidate in enumerate(candidates):
        if candidate.rank is not None and not candidate.ids:
            allowed = int(logits[rows[i]].isfinite().sum())
            candidate.rank = min(candidate.rank, allowed - 1)
            tokens[i] = logits[rows[i]].topk(candidate.rank + 1).indices[-1]
    return tokens


def _decisions(
    candidates: Sequence[Candidate],
    forced: Collection[int],
    logits: torch.Tensor,
    log_p: torch.Tensor,
    rows: Sequence[int],
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Ask each boundary once; yields indices of candidates, and whether the segment of each ends before its token."""
    asked: dict[Boundary, list[int]] = {}
    for i, candidate in enumerate(candidates):
        if len(candidate.ids) >= candidate.boundary.min_tokens and i not in forced:
            asked.setdefault(candidate.boundary, []).append(i)
    for boundary, members in asked.items():
        rises = boundary.ends_before(logits, log_p, [rows[i] for i in members])
        if rises is not None and len(rises) != len(members):
            raise ValueError(f"{type(boundary).__name__}.ends_before: {len(rises)} answers for {len(members)} rows")
        if rises is not None:
            yield members, rises
