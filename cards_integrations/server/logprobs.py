"""The log-probabilities of an answer's tokens, as OpenAI's older API writes them."""

from __future__ import annotations

from typing import Any

from cards_integrations.trace import Alignment


def text_logprobs(answer: Alignment) -> dict[str, Any] | None:
    """Return the `logprobs` of a choice of /v1/completions; None if they were not asked for."""
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
