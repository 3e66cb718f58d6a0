"""What a decision model reads of an answer."""

from __future__ import annotations

from typing import Any

from cards_integrations.chat.template import as_text
from cards_integrations.rewards.base import Response
from cards_integrations.rewards.scorers.input_format import around_response


def as_state(response: Response, form: str | None = None) -> str | dict[str, Any]:
    """Return what the question is about: message, answer and context as JSON, or a text.

    Args:
        response: The answer.
        form: A text with `{response}` and usually `{prompt}`, which are filled in.
    """
    if form is not None:
        before, after = around_response(form, response.conversation.prompt)
        return before + response.text + after
    state: dict[str, Any] = {"message": as_text(response.conversation.prompt), "answer": response.text}
    if response.conversation.context:
        state["context"] = list(response.conversation.context)
    return state
