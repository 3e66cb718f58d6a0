"""The engine: every request of a process in one batch, from any thread and any event loop."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cards_integrations.engine.engine import Engine
    from cards_integrations.engine.inspection import EngineState
    from cards_integrations.engine.request import Chunk, EngineSettings, Request

__all__ = ["Chunk", "Engine", "EngineSettings", "EngineState", "Request"]

_HOMES = {
    "Chunk": "request",
    "Engine": "engine",
    "EngineSettings": "request",
    "EngineState": "inspection",
    "Request": "request",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the settings do not need torch, the engine does."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
