"""A classifier without a KV cache (an encoder): whole texts, or pairs of texts, batched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cards_integrations.chat.answer_frame import AnswerFrame
from cards_integrations.chat.template import as_text
from cards_integrations.models.local.resolve import readable_positions
from cards_integrations.rewards.base import Conversation, Response, RewardModel, count_forward
from cards_integrations.rewards.scorers.head import Head
from cards_integrations.rewards.scorers.input_format import InputFormat
from cards_integrations.rewards.scorers.pairs import PairEncoder
from cards_integrations.rewards.scorers.portions import padded, portions
from cards_integrations.transformer.exact import reads_padded
from cards_integrations.transformer.rope import rope_switch


class RescoringClassifier(RewardModel):
    """Reads the whole text of every answer; beyond the window it leaves out the beginning, of a pair the prompt's."""

    across_requests = True

    def __init__(self, name: str, model: Any, input_format: InputFormat, head: Head) -> None:
        self.name = name
        self.model = model
        self.input_format = input_format
        self.head = head
        self.tokenizer = input_format.chat.tokenizer
        self.switch = rope_switch(model.config.get_text_config())
        self.window = min(readable_positions(model), self.tokenizer.model_max_length)
        self.encode_pairs = PairEncoder(name, self.tokenizer, self.window, "left", "prompt", "answer")
        self.together = reads_padded(model, self.tokenizer, self.window)
        self.frames: dict[Conversation, AnswerFrame] = {}  # of open conversations

    def open(self, conversation: Conversation) -> None:
        if not self.input_format.is_pair:
            self.frames[conversation] = self.input_format.around(conversation)

    def close(self, conversation: Conversation) -> None:
        self.frames.pop(conversation, None)

    async def score(self, responses: Sequence[Response]) -> list[float]:
        encoded = self._encoded(responses)
        self.input_format.chat.check_ids([token for ids in encoded["input_ids"] for token in ids])
        found: dict[int, float] = {}
        for group in self._groups(list(map(len, encoded["input_ids"]))):
            async for rows in portions([len(encoded["input_ids"][row]) for row in group]):
                chosen = [group[row] for row in rows]
                inputs = padded(self.tokenizer, encoded, chosen)
                found |= zip(chosen, self._scores([responses[row] for row in chosen], inputs), strict=True)
        return [found[row] for row in range(len(responses))]

    def _groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Group the rows that may be read together; some models need each alone, or long texts apart."""
        rows = list(range(len(lengths)))
        if not self.together:
            return [[row] for row in rows]
        kinds = ([row for row in rows if (lengths[row] > self.switch) == kind] for kind in (False, True))
        return [kind for kind in kinds if kind] if self.switch else [rows]

    def _encoded(self, responses: Sequence[Response]) -> Any:
        if self.input_format.is_pair:
            prompts = [as_text(response.conversation.prompt) for response in responses]
            return self.encode_pairs(prompts, [response.text for response in responses])
        self.tokenizer.truncation_side = "left"
        return self.tokenizer(
            [self._text(response) for response in responses],
            add_special_tokens=self.input_format.adds_special_tokens,
            truncation=True,
            max_length=self.window,
        )

    def _scores(self, responses: Sequence[Response], inputs: Any) -> list[float]:
        with torch.inference_mode():
            logits = self.model(**inputs.to(self.model.device)).logits
        read = inputs["attention_mask"].sum(-1).tolist()
        count_forward((response.conversation, tokens) for response, tokens in zip(responses, read, strict=True))
        return self.head.score(responses, logits)

    def _text(self, response: Response) -> str:
        """Return all that is read: the answer and the text around it."""
        known = self.frames.get(response.conversation)
        frame = known or self.input_format.around(response.conversation)  # it may have been closed meanwhile
        return frame.whole(response.text)


def reads_pairs(model: Any, tokenizer: Any) -> bool:
    """Return True for an encoder whose tokenizer has tokens of its own to join two texts."""
    joined = tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False)
    return joined and not hasattr(model, "score")
