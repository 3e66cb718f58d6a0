"""A classifier without a KV cache (an encoder): whole texts, batched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cards_integrations.models.local.resolve import max_positions
from cards_integrations.rewards.base import Conversation, Response, RewardModel, count_forward
from cards_integrations.rewards.classifier import Head
from cards_integrations.rewards.scorers.layout import Layout


class RescoringClassifier(RewardModel):
    """Reads the whole text of every answer; a text that is too long loses its beginning."""

    across_requests = True

    def __init__(self, name: str, model: Any, layout: Layout, head: Head) -> None:
        self.name = name
        self.model = model
        self.layout = layout
        self.head = head
        self.tokenizer = layout.chat.tokenizer
        self.window = min(max_positions(model.config), self.tokenizer.model_max_length)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        self.surroundings: dict[Conversation, tuple[str, str]] = {}  # of open conversations

    def open(self, conversation: Conversation) -> None:
        self.surroundings[conversation] = self.layout.around(conversation)

    def close(self, conversation: Conversation) -> None:
        self.surroundings.pop(conversation, None)

    def _text(self, response: Response) -> str:
        """All that is read: the answer and what is around it."""
        known = self.surroundings.get(response.conversation)
        before, after = known or self.layout.around(response.conversation)  # it may have been closed meanwhile
        return before + response.text + after

    async def score(self, responses: Sequence[Response]) -> list[float]:
        texts = [self._text(response) for response in responses]
        self.tokenizer.truncation_side = "left"
        inputs = self.tokenizer(
            texts,
            add_special_tokens=self.layout.special,
            padding=True,
            truncation=True,
            max_length=self.window,
            return_tensors="pt",
        ).to(self.model.device)
        with torch.inference_mode():
            logits = self.model(**inputs).logits
        read = inputs["attention_mask"].sum(-1).tolist()
        count_forward((response.conversation, tokens) for response, tokens in zip(responses, read, strict=True))
        return self.head(logits)
