"""What a drawn token does to its candidate: it is appended, or it ends the candidate."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from cards_integrations.chat.detokenizer import Detokenizer
from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.errors import ModelError
from cards_integrations.models.base import Candidate
from cards_integrations.models.local.drawing import Drawn
from cards_integrations.models.local.frontier import Frontier


class TokenAppender:
    """Appends drawn tokens to candidates, and decides which candidates end with them.

    Args:
        name: What errors call the model.
        dtype: The model's data type, for errors.
        chat: Its tokenizer.
        eos: The ids of end-of-sequence.
    """

    def __init__(self, name: str, dtype: object, chat: ChatTokenizer, eos: Collection[int]) -> None:
        self.name = name
        self.dtype = dtype
        self.chat = chat
        self.eos = eos

    def append(self, candidate: Candidate, frontier: Frontier, drawn: Drawn) -> bool:
        """Append a token to a candidate, unless the candidate ends before it.

        A candidate that goes on is added to the frontier's `waiting`.

        Returns:
            True if the candidate has ended.

        Raises:
            ModelError: The model gave NaN.
        """
        if drawn.rises:
            self._decode(candidate, frontier)  # the logits stay, for the candidate that follows
            return True
        candidate.context.usage.drafted_tokens += 1
        if math.isnan(drawn.log_p):
            raise self._not_a_number()
        if drawn.token in self.eos or (
            drawn.token in candidate.context.sampler.stop_token_ids and candidate.matcher is None
        ):
            candidate.finish = "length" if candidate.matcher is not None and candidate.matcher.closed else "stop"
            candidate.end_log_p = drawn.log_p
            self._decode(candidate, frontier)
            return True
        candidate.log_likelihood += drawn.log_p
        candidate.log_p.append(drawn.log_p)
        if candidate.context.logprobs:
            candidate.top.append(drawn.top)
        candidate.ids.append(drawn.token)
        frontier.logits, frontier.unread = None, [drawn.token]
        if self._ends_after(candidate, frontier):
            return True
        frontier.waiting.append(candidate)
        return False

    def _not_a_number(self) -> ModelError:
        dtype = str(self.dtype).removeprefix("torch.")
        return ModelError(
            f"model {self.name!r} gave NaN in place of logits, in {dtype}: a number in it was too large. "
            "Use EngineSettings(dtype='bfloat16') or dtype='float32'."
        )

    def _ends_after(self, candidate: Candidate, frontier: Frontier) -> bool:
        """True if a grammar, the length limit, a stop string or the boundary ends a candidate after its last token."""
        matcher = candidate.matcher
        if matcher is not None:
            matcher.take(candidate.ids[-1])
            if matcher.complete:
                candidate.finish = "length" if matcher.closed else "stop"
                self._decode(candidate, frontier)
                return True
        if not candidate.watched and len(candidate.ids) < candidate.limit:
            return False
        self._decode(candidate, frontier)
        return _ends_by_text(candidate)

    def _decode(self, candidate: Candidate, frontier: Frontier) -> None:
        """Bring the candidate's text up to date with its tokens."""
        text = frontier.detokenizer
        if text is None:
            text = frontier.detokenizer = Detokenizer(
                self.chat, candidate.before, candidate.response, candidate.context.start
            )
        candidate.response = text.push(candidate.ids[len(text.ids) - len(candidate.before) :])


def _ends_by_text(candidate: Candidate) -> bool:
    """True if the length limit, a stop string or the boundary ends a candidate, whose text is up to date.

    A stop string, and what follows it, is cut off the text.
    """
    context, boundary, full = candidate.context, candidate.boundary, candidate.remaining_tokens <= 0
    at = context.stop.find(candidate.response, len(candidate.before_text)) if context.stop else None
    if at is not None:
        candidate.response, candidate.whole, candidate.finish = candidate.response[:at], False, "stop"
        return True
    if full and candidate.end >= context.max_tokens:
        candidate.finish = "length"
    asked = boundary.reads_text and len(candidate.ids) >= boundary.min_tokens
    own = candidate.response[len(candidate.before_text) :]  # unlike `text`, with half a character at its end
    return full or (asked and boundary.ends_after(own))


def end_of_sequence(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a text of this model."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = ids if isinstance(ids, list) else [ids, tokenizer.eos_token_id]
    return {int(i) for i in ids if i is not None}
