"""The log-probabilities of an answer's tokens in the form of OpenAI's chat API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cards_integrations.chat.message import PARTIAL_CHARACTER
from cards_integrations.trace import TokenLogprob


def openai_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    """Return the `logprobs` of a choice; None if they were not asked for."""
    if not tokens:
        return None
    content = [{**_token(token), "top_logprobs": [*map(_token, token.top)]} for token in tokens]
    return {"content": content, "refusal": None}


def _token(token: TokenLogprob) -> dict[str, Any]:
    whole = PARTIAL_CHARACTER not in token.token
    return {"token": token.token, "bytes": [*token.token.encode()] if whole else None, "logprob": token.logprob}
