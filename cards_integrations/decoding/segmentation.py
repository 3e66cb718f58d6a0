"""Where a segment ends: at a rise of predictive uncertainty, at a fixed length, at punctuation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, FiniteFloat, model_validator

from cards_integrations.models.base import Boundary
from cards_integrations.uncertainty import Measure, uncertainty

if TYPE_CHECKING:
    import torch


class _Between(Boundary):
    """A boundary that depends on the text, between a minimum and a maximum length."""

    min_length: Annotated[int, Field(ge=1)] = 4
    """Tokens before which a segment does not end, unless the answer does."""
    max_length: Annotated[int, Field(ge=1)] = 64
    """Tokens at which a segment ends in any case."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_length > self.max_length:
            raise ValueError(f"min_length={self.min_length} is more than max_length={self.max_length}")
        return self

    @property
    def min_tokens(self) -> int:
        return self.min_length

    @property
    def max_tokens(self) -> int:
        return self.max_length


class Uncertainty(_Between):
    """End *before* the first token whose predictive uncertainty reaches `threshold` (CARDS, section 3.2)."""

    kind: Literal["uncertainty"] = "uncertainty"
    """Names this boundary in settings files."""
    measure: Measure = "entropy"
    """"entropy" in nats, "max_probability" for 1 - max p, or "evidential" for V / sum(relu(logit) + 1); all of the
    raw logits, over the full vocabulary."""
    threshold: FiniteFloat = 3.0
    """The default is the paper's, for entropy; the other measures are at most 1 and need a threshold of their own."""

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.measure != "entropy" and self.threshold > 1:
            raise ValueError(f"threshold={self.threshold} is never reached: {self.measure!r} is at most 1")
        return self

    @property
    def served(self) -> dict[str, str | float]:
        return {"cards_measure": self.measure, "cards_threshold": self.threshold, "cards_min_length": self.min_length}

    def ends_before(self, logits: torch.Tensor, log_p: torch.Tensor, rows: list[int]) -> torch.Tensor:
        return uncertainty(self.measure, logits[rows], log_p[rows]) >= self.threshold


class Punctuation(_Between):
    """End after a token that closes with one of `marks`."""

    kind: Literal["punctuation"] = "punctuation"
    """Names this boundary in settings files."""
    marks: tuple[str, ...] = (".", "!", "?", "\n")
    """Texts that a segment can end with."""

    def ends_after(self, text: str) -> bool:
        return text.endswith(self.marks)


class FixedLength(Boundary):
    """End after `length` tokens."""

    kind: Literal["fixed_length"] = "fixed_length"
    """Names this boundary in settings files."""
    length: Annotated[int, Field(ge=1)] = 16
    """Tokens of a segment."""

    @property
    def min_tokens(self) -> int:
        return self.length

    @property
    def max_tokens(self) -> int:
        return self.length


def _by_name(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


AnyBoundary = Annotated[Uncertainty | FixedLength | Punctuation, Field(discriminator="kind"), BeforeValidator(_by_name)]
"""A boundary, its settings, or only its name."""
