"""From logits to a token: temperature, top-k, and inverse transform sampling with one uniform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
BLOCK = 128  # logits that are searched together


class Sampler(BaseModel):
    """Samples from softmax(logits / temperature), restricted to the `top_k` most probable tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.7
    """Divides the logits; 0 takes the most probable token."""

    top_k: Annotated[int, Field(ge=0)] = 40
    """How many of the most probable tokens may be drawn; 0 for all."""

    @property
    def greedy(self) -> bool:
        """True if the most probable token is taken."""
        return self.temperature == 0


def draw(
    samplers: Sequence[Sampler], logits: torch.Tensor, rows: Sequence[int], uniforms: Sequence[float]
) -> torch.Tensor:
    """Draw one token with each sampler, those of one `top_k` together.

    Token i is drawn from logits[rows[i]] with uniforms[i]: it is the first one at which the cumulative
    probability, in order of token ids, exceeds the uniform. The order is that of the ids and not of the
    probabilities, so that two almost equal logits that change places under another batch shape do not
    change the outcome. Nor does the company: which of several equal logits are among the k largest depends
    on k, so each `top_k` has a search of its own.

    Args:
        samplers: One for each token; those of one row are equal.
        logits: (n, vocabulary).
        rows: The row for each token.
        uniforms: One in [0, 1) for each token.

    Returns:
        Token ids (m,).
    """
    import torch

    divisors = np.ones((len(logits), 1))
    divisors[rows, 0] = [sampler.temperature or 1.0 for sampler in samplers]
    arrays = np.array(rows), np.array(uniforms), divisors
    at, random, temperatures = (torch.from_numpy(array).to(logits.device) for array in arrays)
    kinds = [sampler.top_k if sampler.temperature else None for sampler in samplers]
    if len(alike := set(kinds)) == 1:
        return _draw(kinds[0], logits, at, random, temperatures)
    tokens = torch.empty_like(at)
    for top_k in alike:
        members = [i for i, kind in enumerate(kinds) if kind == top_k]
        own, places = distinct([rows[i] for i in members])
        where = torch.tensor(places, device=logits.device)
        tokens[members] = _draw(top_k, logits[own], where, random[members], temperatures[own])
    return tokens


def _draw(
    top_k: int | None, logits: torch.Tensor, rows: torch.Tensor, uniforms: torch.Tensor, temperatures: torch.Tensor
) -> torch.Tensor:
    """Draw tokens (m,) among the `top_k` largest logits of their rows, 0 for all; None for the largest one.

    `temperatures` (n, 1) are those of the rows.
    """
    if top_k is None:
        return logits.argmax(-1)[rows]
    ids = None
    if 0 < top_k < logits.shape[-1]:
        ids = _largest(logits, top_k).sort(-1).values
        logits = logits.gather(-1, ids)
    cumulative = (logits.double() / temperatures).softmax(-1).cumsum(-1)[rows]
    drawn = (cumulative <= (uniforms * cumulative[:, -1]).unsqueeze(-1)).sum(-1).clamp(max=logits.shape[-1] - 1)
    return drawn if ids is None else ids[rows, drawn]


def distinct(items: Sequence[T]) -> tuple[list[T], list[int]]:
    """Return the distinct ones of some items, and where each of all is among them."""
    places = {item: place for place, item in enumerate(dict.fromkeys(items))}
    return [*places], [places[item] for item in items]


def _largest(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Ids of the k largest logits in any order, (n, vocabulary) -> (n, k).

    They are in the k blocks with the largest maxima, and searching those is several times faster than
    searching the whole vocabulary.
    """
    blocks, rest = divmod(logits.shape[-1], BLOCK)
    if rest or blocks <= k:
        return logits.topk(k, sorted=False).indices
    blocked = logits.view(-1, blocks, BLOCK)
    best = blocked.amax(-1).topk(k, sorted=False).indices
    found = blocked.gather(1, best.unsqueeze(-1).expand(-1, -1, BLOCK)).flatten(1).topk(k, sorted=False).indices
    ids: torch.Tensor = best.gather(1, found // BLOCK) * BLOCK + found % BLOCK
    return ids
