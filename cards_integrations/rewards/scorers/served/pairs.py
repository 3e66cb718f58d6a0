"""Protocols that send one prompt and its answers: vLLM's `/score`, and plain JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, FiniteFloat

from cards_integrations.chat.template import as_text
from cards_integrations.rewards.base import Response
from cards_integrations.rewards.scorers.served.client import Entries, IndexedEntry, RemoteModel, in_order, named


class PairScore(IndexedEntry):
    score: FiniteFloat


class PairScores(BaseModel):
    data: Entries[PairScore]


class Score(RemoteModel):
    """vLLM's `/score`: the logit of a cross-encoder, for which its activation has to be switched off."""

    path = "/score"

    def body(self, responses: Sequence[Response]) -> dict[str, Any]:
        prompt, texts = as_text(responses[0].conversation.prompt), [response.text for response in responses]
        asked = {**named(self.settings.model), "text_1": prompt, "text_2": texts}
        return {**asked, "use_activation": self.settings.use_activation}

    def read(self, content: bytes, body: dict[str, Any], responses: Sequence[Response]) -> list[float]:
        return [entry.score for entry in in_order(PairScores.model_validate_json(content, strict=True).data)]


class ScoreList(BaseModel):
    scores: Entries[FiniteFloat]


class Json(RemoteModel):
    """A server of one's own."""

    path = ""
    health = None

    def body(self, responses: Sequence[Response]) -> dict[str, Any]:
        asked = responses[0].conversation
        texts = [response.text for response in responses]
        return {"prompt": as_text(asked.prompt), "context": list(asked.context), "responses": texts}

    def read(self, content: bytes, body: dict[str, Any], responses: Sequence[Response]) -> list[float]:
        return ScoreList.model_validate_json(content, strict=True).scores
