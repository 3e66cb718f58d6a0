"""A classifier without a KV cache (an encoder): whole texts, batched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cards_integrations.models.local.resolve import max_positions
from cards_integrations.rewards.base import Conversation, Response, RewardModel, count_forward
from cards_integrations.rewards.scorers.head import Head
from cards_integrations.rewards.scorers.input_format import InputFormat


class RescoringClassifier(RewardModel):
    """Reads the whole text of every answer; a text longer than the window loses its beginning."""

    across_requests = True

    def __init__(self, name: str, model: Any, input_format: InputFormat, head: Head) -> None:
        self.name = name
        self.model = model
        self.input_format = input_format
        self.head = head
        self.tokenizer = input_format.chat.tokenizer
        self.window = min(max_positions(model.config), self.tokenizer.model_max_length)
        config = model.config.get_text_config()
        if config.pad_token_id is None:
            config.pad_token_id = self.tokenizer.pad_token_id
        self.surroundings: dict[Conversation, tuple[str, str]] = {}  # of open conversations

    def open(self, conversation: Conversation) -> None:
        self.surroundings[conversation] = self.input_format.around(conversation)

    def close(self, conversation: Conversation) -> None:
        self.surroundings.pop(conversation, None)

    async def score(self, responses: Sequence[Response]) -> list[float]:
        texts = [self._text(response) for response in responses]
        self.tokenizer.truncation_side = "left"
        inputs = self.tokenizer(
            texts,
            add_special_tokens=self.input_format.adds_special_tokens,
            padding=True,
            truncation=True,
            max_length=self.window,
            return_tensors="pt",
        )
        self.input_format.chat.check_ids(inputs["input_ids"].flatten().tolist())
        with torch.inference_mode():
            logits = self.model(**inputs.to(self.model.device)).logits
        read = inputs["attention_mask"].sum(-1).tolist()
        count_forward((response.conversation, tokens) for response, tokens in zip(responses, read, strict=True))
        return self.head(logits)

    def _text(self, response: Response) -> str:
        """All that is read: the answer and what is around it."""
        known = self.surroundings.get(response.conversation)
        before, after = known or self.input_format.around(response.conversation)  # it may have been closed meanwhile
        return before + response.text + after
