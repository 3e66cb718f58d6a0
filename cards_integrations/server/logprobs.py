"""The log-probabilities of an answer's tokens, as OpenAI's two APIs write them."""

from __future__ import annotations

from typing import Any

from cards_integrations.chat.message import PARTIAL_CHARACTER
from cards_integrations.trace import Alignment, TokenLogprob


def chat_logprobs(answer: Alignment) -> dict[str, Any] | None:
    """As /v1/chat/completions has them; None if nobody asked."""
    if not answer.logprobs:
        return None
    content = [{**_token(token), "top_logprobs": [*map(_token, token.top)]} for token in answer.logprobs]
    return {"content": content, "refusal": None}


def text_logprobs(answer: Alignment) -> dict[str, Any] | None:
    """As /v1/completions has them; None if nobody asked."""
    if not answer.logprobs:
        return None
    offsets, length = [], 0
    for token in answer.logprobs:
        offsets.append(length)
        length += len(token.token)
    return {
        "tokens": [token.token for token in answer.logprobs],
        "token_logprobs": [token.logprob for token in answer.logprobs],
        "top_logprobs": [{each.token: each.logprob for each in token.top} for token in answer.logprobs],
        "text_offset": offsets,
    }


def _token(token: TokenLogprob) -> dict[str, Any]:
    whole = PARTIAL_CHARACTER not in token.token
    return {"token": token.token, "bytes": [*token.token.encode()] if whole else None, "logprob": token.logprob}
