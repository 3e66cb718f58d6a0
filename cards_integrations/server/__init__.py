"""`cards serve`: an OpenAI-compatible server on the engine. Needs the extra `server`."""

from cards_integrations.server.settings import ServerSettings

__all__ = ["ServerSettings"]
