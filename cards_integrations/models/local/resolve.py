"""From a model's name to what transformers can load, and what its config says."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from cards_integrations.errors import unknown_name
from cards_integrations.models.local.embedded import MINILM, SMOLLM2, embedded_model
from cards_integrations.models.local.load_lock import load_errors
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.paths import is_directory

UNLIMITED = 2**31


def resolve_model(name: str) -> str:
    """Return the directory or the hub id that transformers can load.

    Args:
        name: An embedded name, a directory or a hub id.

    Raises:
        SettingsError: The name is none of them.
        ModelError: The wheel of an embedded model is not installed.
    """
    embedded = embedded_model(name)
    if embedded is not None:
        return str(embedded)
    if is_directory(name) or "/" in name:
        return name
    raise unknown_name("model", name, [SMOLLM2, MINILM], " Or pass a hub id (owner/name) or a local directory.")


@lru_cache
def read_config(spec: LocalModel) -> Any:
    """Return the transformers config of a model.

    Raises:
        ModelError: It cannot be read.
    """
    from transformers import AutoConfig

    with load_errors(spec.model):
        return AutoConfig.from_pretrained(
            resolve_model(spec.model), revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )


def max_positions(config: Any) -> int:
    """Return how many positions a model's config allows; practically unlimited if it names no number."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or UNLIMITED)
