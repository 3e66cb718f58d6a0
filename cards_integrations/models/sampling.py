"""From logits to a token: temperature, top-k, top-p, min-p, and inverse transform sampling with one uniform.

What changes the logits before that (biases and penalties) is in `penalties`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

import numpy as np
from pydantic import BeforeValidator, ConfigDict, Field, FiniteFloat, PlainSerializer

from cards_integrations.settings_model import SettingsModel

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
BLOCK = 128  # logits that are searched together
NEVER = -1e9  # a bias with which a token is never drawn
TokenId = Annotated[int, Field(ge=0)]


def _as_pairs(value: Any) -> Any:
    """Return a mapping as pairs, which have a hash. In JSON its keys are texts."""
    if not isinstance(value, Mapping):
        return value or ()
    return tuple((int(key) if isinstance(key, str) else key, bias) for key, bias in value.items())


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, int) else value or ()


LogitBias = Annotated[
    tuple[tuple[TokenId, FiniteFloat], ...],
    BeforeValidator(_as_pairs, json_schema_input_type=dict[int, float]),
    PlainSerializer(dict, return_type=dict[int, float]),
]
"""What is added to the logits of some tokens, by id: given as a mapping, held as pairs."""
TokenIds = Annotated[tuple[TokenId, ...], BeforeValidator(_as_tuple)]
"""Token ids: one or several."""


class Sampler(SettingsModel):
    """Samples from softmax(logits / temperature), restricted to probable tokens.

    The meaning of the settings, and their order, are those of transformers: `logit_bias`, `repetition_penalty`,
    `presence_penalty` and `frequency_penalty`, `min_tokens`, grammars; then temperature, `top_k`, `top_p`, `min_p`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.7
    """Divides the logits; 0 takes the most probable token."""

    top_k: Annotated[int, Field(ge=0)] = 40
    """How many of the most probable tokens may be drawn; 0 for all."""

    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Only the most probable tokens that together have this probability may be drawn; 1 for all."""

    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Only tokens with this share of the largest probability may be drawn; 0 for all."""

    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Divides the positive logits of the tokens of prompt and answer, and multiplies the negative ones."""

    presence_penalty: FiniteFloat = 0.0
    """Is subtracted from the logits of the answer's tokens."""

    frequency_penalty: FiniteFloat = 0.0
    """Is subtracted from the logit of a token once for each time it occurs in the answer."""

    logit_bias: LogitBias = ()
    """Is added to the logits of these tokens."""

    min_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens of an answer before which neither end-of-sequence nor `stop_token_ids` can end it."""

    stop_token_ids: TokenIds = ()
    """Tokens that end an answer as end-of-sequence does."""

    @property
    def greedy(self) -> bool:
        """True if the most probable token is taken."""
        return self.temperature == 0

    @cached_property
    def kind(self) -> tuple[int, bool] | None:
        """What samplers that draw together share: `top_k`, and whether `top_p` or `min_p` is used; None if greedy."""
        return None if self.greedy else (self.top_k, self.top_p < 1 or self.min_p > 0)

    @cached_property
    def penalizes(self) -> bool:
        """True if logits are changed by what was written, or by a bias."""
        penalties = self.repetition_penalty != 1, self.presence_penalty != 0, self.frequency_penalty != 0
        return any(penalties) or bool(self.logit_bias)

    @cached_property
    def plain(self) -> bool:
        """True if logits are never changed before they are drawn from."""
        return not (self.penalizes or self.min_tokens)

    def __copy__(self) -> Self:
        """Return a copy that may be given other settings: without cached properties that follow from these."""
        copied = super().__copy__()
        for name in ("kind", "penalizes", "plain"):
            copied.__dict__.pop(name, None)
        return copied


def draw(
    samplers: Sequence[Sampler], logits: torch.Tensor, rows: Sequence[int], uniforms: Sequence[float]
) -> torch.Tensor:
    """Draw one token with each sampler, those of one `kind` together.

    Token i is drawn from logits[rows[i]] with uniforms[i]: it is the first token at which the cumulative probability,
    in order of token ids, exceeds the uniform. The order is that of ids and not of probabilities, so that two almost
    equal logits that change places under another batch shape do not change the outcome. Nor do other candidates of the
    step: which of several equal logits are among the k largest depends on k, so each `top_k` is searched for by itself.
    `top_p` and `min_p` may differ from row to row.

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
    kinds = [sampler.kind for sampler in samplers]
    alike = set(kinds)
    limits = _limits(samplers, logits, rows) if any(kind and kind[1] for kind in alike) else None
    if len(alike) == 1:
        return _draw(kinds[0], logits, at, random, temperatures, limits)
    tokens = torch.empty_like(at)
    for kind in alike:
        members = [i for i, each in enumerate(kinds) if each == kind]
        own, places = distinct([rows[i] for i in members])
        where = torch.tensor(places, device=logits.device)
        tokens[members] = _draw(
            kind, logits[own], where, random[members], temperatures[own], None if limits is None else limits[:, own]
        )
    return tokens


def _limits(samplers: Sequence[Sampler], logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """`top_p` and `min_p` of each row, (2, n, 1)."""
    import torch

    limits = np.ones((2, len(logits), 1))
    limits[0, rows, 0] = [sampler.top_p for sampler in samplers]
    limits[1, rows, 0] = [sampler.min_p for sampler in samplers]
    return torch.from_numpy(limits).to(logits.device)


def _draw(
    kind: tuple[int, bool] | None,
    logits: torch.Tensor,
    rows: torch.Tensor,
    uniforms: torch.Tensor,
    temperatures: torch.Tensor,
    limits: torch.Tensor | None,
) -> torch.Tensor:
    """Draw tokens (m,) by samplers of one kind (see `Sampler.kind`), given the temperatures of the rows, (n, 1)."""
    if kind is None:
        return logits.argmax(-1)[rows]
    top_k, filtered = kind
    ids = None
    if 0 < top_k < logits.shape[-1]:
        ids = _largest(logits, top_k).sort(-1).values
        logits = logits.gather(-1, ids)
    p = (logits.double() / temperatures).softmax(-1)
    if filtered and limits is not None:
        p = _probable(p, *limits)
    cumulative = p.cumsum(-1)[rows]
    drawn = (cumulative <= (uniforms * cumulative[:, -1]).unsqueeze(-1)).sum(-1).clamp(max=logits.shape[-1] - 1)
    return drawn if ids is None else ids[rows, drawn]


def _probable(p: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Set probabilities (n, tokens) to 0 that `top_p` and then `min_p`, (n, 1) each, exclude.

    Of equal ones, those with the lowest ids are excluded first.
    """
    ordered, places = p.sort(stable=True, dim=-1)
    out = ordered.cumsum(-1) <= 1 - top_p
    out[:, -1] = False
    out |= ordered < min_p * ordered[:, -1:]
    return p.masked_fill(out.scatter(-1, places, out), 0.0)


def distinct(items: Sequence[T]) -> tuple[list[T], list[int]]:
    """Return the distinct items, and the place of each item among them."""
    places = {item: place for place, item in enumerate(dict.fromkeys(items))}
    return [*places], [places[item] for item in items]


def _largest(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Ids of the k largest logits in any order, (n, vocabulary) -> (n, k).

    They are in the k blocks with the largest maxima. Searching only these is several times faster than searching the
    whole vocabulary.
    """
    blocks, rest = divmod(logits.shape[-1], BLOCK)
    if rest or blocks <= k:
        return logits.topk(k, sorted=False).indices
    blocked = logits.view(-1, blocks, BLOCK)
    best = blocked.amax(-1).topk(k, sorted=False).indices
    found = blocked.gather(1, best.unsqueeze(-1).expand(-1, -1, BLOCK)).flatten(1).topk(k, sorted=False).indices
    ids: torch.Tensor = best.gather(1, found // BLOCK) * BLOCK + found % BLOCK
    return ids
