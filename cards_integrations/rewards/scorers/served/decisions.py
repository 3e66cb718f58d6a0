"""vLLM's `/v1/systemone`: a decision model's answer to a question about an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from cards_integrations.rewards.base import Response
from cards_integrations.rewards.scorers.served.client import RemoteModel, named
from cards_integrations.rewards.scorers.state import as_state

ID = "answer"


class Answers(BaseModel):
    answers: dict[str, dict[str, Any]]


class Decision(RemoteModel):
    """A request for each answer, since a request has one state."""

    path = "/v1/systemone"
    across_requests = True

    @property
    def batch_size(self) -> int:
        return 1

    def body(self, responses: Sequence[Response]) -> dict[str, Any]:
        [response] = responses
        state = as_state(response, self.settings.prompt_format)
        return {**named(self.settings.model), "state": state, "questions": {ID: self.settings.question.sent}}

    def read(self, content: bytes, body: dict[str, Any], responses: Sequence[Response]) -> list[float]:
        found = Answers.model_validate_json(content, strict=True).answers
        if ID not in found:
            raise ValueError("the question has no answer. Check reward.protocol.")
        return [self.settings.question.score(found[ID])]
