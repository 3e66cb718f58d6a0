"""Where the language model is: on this machine, or behind a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from cards_integrations.errors import SettingsError, short_repr
from cards_integrations.models.local.settings import LocalModel, as_local_model
from cards_integrations.models.vllm.language_model import VllmModel

ModelSource = LocalModel | VllmModel
KINDS: dict[str, type[LocalModel] | type[VllmModel]] = {"local": LocalModel, "vllm": VllmModel}


def as_model(value: Any) -> Any:
    """A model from a name, a path, JSON, its settings as a dict (local, if they name no kind), or itself."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise SettingsError(f"model is not JSON: {error}") from None
    if isinstance(value, (str, Path)):
        return as_local_model(value)
    if isinstance(value, dict):
        kind = value.get("kind", "local")
        if not isinstance(kind, str) or kind not in KINDS:
            raise SettingsError(f"model.kind={short_repr(kind)}: one of {', '.join(KINDS)}.")
        return KINDS[kind].model_validate(value)
    return value


AnyModel = Annotated[ModelSource, BeforeValidator(as_model)]
