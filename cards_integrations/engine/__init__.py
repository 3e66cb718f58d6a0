"""The engine: every request of a process in one batch, from any thread and any event loop."""

from cards_integrations.engine.engine import Engine
from cards_integrations.engine.worker import EngineSettings, Request

__all__ = ["Engine", "EngineSettings", "Request"]
