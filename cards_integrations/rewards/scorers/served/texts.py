"""Protocols that send prompt and answer as one text: vLLM's `/classify`, text-embeddings-inference's `/predict`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, FiniteFloat, TypeAdapter

from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.http_client import shortened
from cards_integrations.rewards.base import Response
from cards_integrations.rewards.scorers.input_format import InputFormat, around_response, without_final_padding
from cards_integrations.rewards.scorers.served.client import Entries, IndexedEntry, RemoteModel, in_order, named


class JoinedText(RemoteModel):
    """Sends prompt and answer as one text, those of several requests together."""

    across_requests = True
    input_format: InputFormat | None = None
    """Set if token ids are sent."""
    padding: int | None = None
    """The token that the served model's config calls padding, if token ids are sent."""

    def use_tokenizer(self, chat: ChatTokenizer, padding: int | None) -> None:
        self.input_format, self.padding = InputFormat(chat, self.settings.prompt_format), padding

    def text(self, response: Response) -> str:
        """Return the text that is scored."""
        if self.input_format is not None:
            return self.input_format.around(response.conversation).whole(self.answer(response))
        prompt_format = self.settings.prompt_format or "{prompt}{response}"
        before, after = around_response(prompt_format, response.conversation.prompt)
        return before + self.answer(response) + after

    def answer(self, response: Response) -> str:
        """Return the answer as it is part of the text."""
        return response.text

    def input(self, responses: Sequence[Response]) -> list[str] | list[list[int]]:
        """Return the texts, or their token ids."""
        texts, form = [self.text(response) for response in responses], self.input_format
        if form is None:
            return texts
        return [form.chat.encode(text, special=form.adds_special_tokens) for text in texts]


class ClassScores(IndexedEntry):
    probs: Entries[FiniteFloat]  # raw scores, without the activation


class Classifications(BaseModel):
    data: Entries[ClassScores]


class Classify(JoinedText):
    """vLLM's `/classify`."""

    path = "/classify"

    def body(self, responses: Sequence[Response]) -> dict[str, Any]:
        return {**named(self.settings.model), "input": self.input(responses), "use_activation": False}

    def input(self, responses: Sequence[Response]) -> list[str] | list[list[int]]:
        found = super().input(responses)
        return [each if isinstance(each, str) else without_final_padding(each, self.padding) for each in found]  # type: ignore[return-value]

    def read(self, content: bytes, body: dict[str, Any], responses: Sequence[Response]) -> list[float]:
        data = Classifications.model_validate_json(content, strict=True).data
        return [self._chosen(entry.probs) for entry in in_order(data)]

    def _chosen(self, probs: list[float]) -> float:
        label = self.settings.label
        if label is None and len(probs) == 1:
            return probs[0]
        if not isinstance(label, int) or label >= len(probs):
            raise ValueError(f"reward.label={label!r}: choose one of {shortened(str(list(range(len(probs)))))}.")
        return probs[label]


class LabelScore(BaseModel):
    label: str
    score: FiniteFloat


Predictions = TypeAdapter(Entries[Entries[LabelScore]])


class Predict(JoinedText):
    """text-embeddings-inference's `/predict`."""

    path = "/predict"

    def body(self, responses: Sequence[Response]) -> dict[str, Any]:
        # [text], for two bare strings would be a pair
        return {"inputs": [[self.text(response)] for response in responses], "raw_scores": True, "truncate": True}

    def read(self, content: bytes, body: dict[str, Any], responses: Sequence[Response]) -> list[float]:
        return [self._chosen(labels) for labels in Predictions.validate_json(content, strict=True)]

    def _chosen(self, labels: list[LabelScore]) -> float:
        """Return the score of the label by its name, as the server puts the highest score first."""
        if self.settings.label is None and len(labels) == 1:
            return labels[0].score
        same = [label.score for label in labels if label.label == self.settings.label]
        if len(same) != 1:
            names = shortened(str(sorted(label.label for label in labels)))
            raise ValueError(f"reward.label={self.settings.label!r}: choose one of {names}.")
        return same[0]
