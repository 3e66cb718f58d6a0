"""Changes to logits before a token is drawn: biases, and penalties for tokens that were written.

The order is that of transformers' `generate`, and of vLLM: bias, repetition, frequency and presence, minimum length.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import chain
from weakref import WeakKeyDictionary

import numpy as np
import torch

from cards_integrations.models.base import Candidate, Context
from cards_integrations.models.sampling import Sampler


class Penalties:
    """Changes the logits of candidates by the settings of their samplers.

    Args:
        eos: The ids of end-of-sequence.
    """

    def __init__(self, eos: Collection[int]) -> None:
        self.eos = eos
        self._prompts: WeakKeyDictionary[Context, np.ndarray] = WeakKeyDictionary()  # their distinct ids

    @staticmethod
    def concern(candidate: Candidate) -> bool:
        """True if the logits of a candidate have to be changed."""
        sampler = candidate.context.sampler
        return sampler.penalizes or candidate.end < sampler.min_tokens

    def apply(self, candidates: Sequence[Candidate], logits: torch.Tensor) -> torch.Tensor:
        """Return changed logits in double precision, given a row for each candidate, (n, vocabulary)."""
        samplers = [candidate.context.sampler for candidate in candidates]
        logits = _biased(logits.double(), samplers)
        if any(sampler.repetition_penalty != 1 for sampler in samplers):
            written = [chain(self._prompt(c.context), c.before, c.ids) for c in candidates]
            logits = _less_repeated(logits, samplers, _counts([[*ids] for ids in written], logits))
        if any(sampler.presence_penalty or sampler.frequency_penalty for sampler in samplers):
            logits = _less_frequent(logits, samplers, _counts([c.before + c.ids for c in candidates], logits))
        return logits

    def without_ends(self, candidates: Sequence[Candidate], logits: torch.Tensor) -> torch.Tensor:
        """Return the logits without tokens that would end a text too early, unless nothing else is allowed."""
        short = [i for i, each in enumerate(candidates) if each.end < each.context.sampler.min_tokens]
        if not short:
            return logits
        ends = [[*self.eos, *candidates[i].context.sampler.stop_token_ids] for i in short]
        masked = logits.masked_fill(_counts(ends, logits, short) > 0, -torch.inf)
        return torch.where((masked > -torch.inf).any(-1, keepdim=True), masked, logits)

    def _prompt(self, context: Context) -> np.ndarray:
        found = self._prompts.get(context)
        if found is None:
            found = self._prompts[context] = np.unique(np.array(context.prompt_ids, dtype=np.int64))
        return found


def _counts(ids: Sequence[Sequence[int]], logits: torch.Tensor, rows: Sequence[int] | None = None) -> torch.Tensor:
    """Return how often each row has each token, (n, vocabulary); tokens without a logit are left out."""
    at = np.repeat(np.arange(len(ids)) if rows is None else np.array(rows), [len(each) for each in ids])
    tokens = np.fromiter(chain.from_iterable(ids), np.int64)
    known = tokens < logits.shape[-1]
    places = (torch.from_numpy(each[known]).to(logits.device) for each in (at, tokens))
    ones = torch.ones(int(known.sum()), dtype=logits.dtype, device=logits.device)
    return torch.zeros_like(logits).index_put_((*places,), ones, accumulate=True)


def _column(samplers: Sequence[Sampler], value: Callable[[Sampler], float], like: torch.Tensor) -> torch.Tensor:
    """Return a setting of each row, (n, 1)."""
    return torch.tensor([[value(sampler)] for sampler in samplers], dtype=like.dtype, device=like.device)


def _biased(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    biases = [
        (row, token, bias)
        for row, sampler in enumerate(samplers)
        for token, bias in sampler.logit_bias
        if token < logits.shape[-1]
    ]
    if not biases:
        return logits
    rows, tokens, values = (torch.tensor(each, device=logits.device) for each in zip(*biases, strict=True))
    return logits.index_put((rows, tokens), values.to(logits.dtype), accumulate=True)


def _less_repeated(logits: torch.Tensor, samplers: Sequence[Sampler], counts: torch.Tensor) -> torch.Tensor:
    penalty = _column(samplers, lambda sampler: sampler.repetition_penalty, logits)
    return torch.where(counts > 0, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def _less_frequent(logits: torch.Tensor, samplers: Sequence[Sampler], counts: torch.Tensor) -> torch.Tensor:
    frequency = _column(samplers, lambda sampler: sampler.frequency_penalty, logits)
    presence = _column(samplers, lambda sampler: sampler.presence_penalty, logits)
    return logits - frequency * counts - presence * (counts > 0)
