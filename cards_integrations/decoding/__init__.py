"""Decoding methods, and where a segment ends. To add one, write one file and import it here."""

from __future__ import annotations

from cards_integrations.decoding.acceptance import Acceptance, Threshold
from cards_integrations.decoding.ada_search import AdaSearch
from cards_integrations.decoding.args import Args
from cards_integrations.decoding.base import Decoding, Draft, Session
from cards_integrations.decoding.best_of_n import BestOfN
from cards_integrations.decoding.cards import Cards
from cards_integrations.decoding.cascade import Cascade
from cards_integrations.decoding.particles import Particles
from cards_integrations.decoding.rain import Rain
from cards_integrations.decoding.registry import METHODS, AnyDecoding, as_decoding, known_methods, register_method
from cards_integrations.decoding.rejection import RejectionSampling
from cards_integrations.decoding.sampling import Sampling
from cards_integrations.decoding.segment_best_of_n import SegmentBestOfN
from cards_integrations.decoding.segmentation import FixedLength, Punctuation, Uncertainty
from cards_integrations.decoding.speculative_rejection import SpeculativeRejection
from cards_integrations.decoding.stopping import OptimalStopping
from cards_integrations.decoding.tree_bon import TreeBoN
from cards_integrations.models.base import Boundary

__all__ = [
    "METHODS",
    "Acceptance",
    "AdaSearch",
    "AnyDecoding",
    "Args",
    "BestOfN",
    "Boundary",
    "Cards",
    "Cascade",
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
    "known_methods",
    "register_method",
]
