"""Decoding methods and where a segment ends."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from cards_integrations.decoding.acceptance import Acceptance, Threshold
from cards_integrations.decoding.args import Args
from cards_integrations.decoding.base import Decoding, Draft, Session
from cards_integrations.decoding.best_of_n import BestOfN
from cards_integrations.decoding.cards import Cards
from cards_integrations.decoding.particles import Particles
from cards_integrations.decoding.rain import Rain
from cards_integrations.decoding.rejection import RejectionSampling
from cards_integrations.decoding.sampling import Sampling
from cards_integrations.decoding.segment_best_of_n import SegmentBestOfN
from cards_integrations.decoding.segmentation import FixedLength, Punctuation, Uncertainty
from cards_integrations.decoding.speculative_rejection import SpeculativeRejection
from cards_integrations.decoding.stopping import OptimalStopping
from cards_integrations.decoding.tree_bon import TreeBoN
from cards_integrations.errors import SettingsError, short_repr, unknown_name
from cards_integrations.models.base import Boundary

METHODS: dict[str, type[Decoding]] = {
    "cards": Cards,
    "sampling": Sampling,
    "best_of_n": BestOfN,
    "rejection": RejectionSampling,
    "segment_best_of_n": SegmentBestOfN,
    "args": Args,
    "speculative_rejection": SpeculativeRejection,
    "tree_bon": TreeBoN,
    "particles": Particles,
    "rain": Rain,
}


def as_decoding(value: Any) -> Decoding:
    """A decoding method from its name, its settings as a dict, or itself."""
    if isinstance(value, Decoding):
        return value
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.startswith("{") else {"method": value}
        except (ValueError, RecursionError) as error:
            raise SettingsError(f"decoding is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise SettingsError(f"decoding={short_repr(value)}: pass a name, a dict with 'method', or a settings object.")
    method = value.get("method", "cards")
    if not isinstance(method, str) or method not in METHODS:
        raise unknown_name("decoding", method if isinstance(method, str) else short_repr(method), METHODS)
    return METHODS[method].model_validate(value)


AnyDecoding = Annotated[SerializeAsAny[Decoding], BeforeValidator(as_decoding)]

__all__ = [
    "METHODS",
    "Acceptance",
    "AnyDecoding",
    "Args",
    "BestOfN",
    "Boundary",
    "Cards",
    "Decoding",
    "Draft",
    "FixedLength",
    "OptimalStopping",
    "Particles",
    "Punctuation",
    "Rain",
    "RejectionSampling",
    "Sampling",
    "SegmentBestOfN",
    "Session",
    "SpeculativeRejection",
    "Threshold",
    "TreeBoN",
    "Uncertainty",
    "as_decoding",
]
