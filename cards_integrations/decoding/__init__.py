"""Decoding methods and where a segment ends."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from cards_integrations.decoding.acceptance import Acceptance, Threshold
from cards_integrations.decoding.base import Decoding, Draft, Session
from cards_integrations.decoding.best_of_n import BestOfN
from cards_integrations.decoding.cards import Cards
from cards_integrations.decoding.sampling import Sampling
from cards_integrations.decoding.segmentation import FixedLength, Punctuation, Uncertainty
from cards_integrations.decoding.stopping import OptimalStopping
from cards_integrations.errors import SettingsError, unknown
from cards_integrations.models.base import Boundary

METHODS: dict[str, type[Decoding]] = {"cards": Cards, "best_of_n": BestOfN, "sampling": Sampling}


def as_decoding(value: Any) -> Decoding:
    """A decoding method from its name, its settings as a dict, or itself."""
    if isinstance(value, Decoding):
        return value
    if isinstance(value, str):
        value = json.loads(value) if value.startswith("{") else {"method": value}
    if not isinstance(value, dict):
        raise SettingsError(f"decoding={value!r}: pass a name, a dict with 'method', or a settings object.")
    method = value.get("method", "cards")
    if method not in METHODS:
        raise unknown("decoding", str(method), METHODS)
    return METHODS[method].model_validate(value)


AnyDecoding = Annotated[SerializeAsAny[Decoding], BeforeValidator(as_decoding)]

__all__ = [
    "METHODS",
    "Acceptance",
    "AnyDecoding",
    "BestOfN",
    "Boundary",
    "Cards",
    "Decoding",
    "Draft",
    "FixedLength",
    "OptimalStopping",
    "Punctuation",
    "Sampling",
    "Session",
    "Threshold",
    "Uncertainty",
    "as_decoding",
]
