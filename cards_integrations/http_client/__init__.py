"""Models behind HTTP: replicas, retries where they are safe, bounded replies and connections, keys that stay hidden."""

from cards_integrations.http_client.connections import MAX_IDLE_CONNECTIONS, exchange
from cards_integrations.http_client.gather import gathered
from cards_integrations.http_client.replies import REPLY_BYTES, Reply, ReplyError, excerpt, shortened
from cards_integrations.http_client.service import Replica, ServiceClient, TransientError
from cards_integrations.http_client.settings import HIDDEN, Keyed, ServerUrl, usable_key

__all__ = [
    "HIDDEN",
    "MAX_IDLE_CONNECTIONS",
    "REPLY_BYTES",
    "Keyed",
    "Replica",
    "Reply",
    "ReplyError",
    "ServerUrl",
    "ServiceClient",
    "TransientError",
    "excerpt",
    "exchange",
    "gathered",
    "shortened",
    "usable_key",
]
