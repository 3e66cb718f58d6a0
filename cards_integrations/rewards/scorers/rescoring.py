"""A classifier without a KV cache (an encoder): whole texts, or pairs of texts, batched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cards_integrations.chat.answer_frame import AnswerFrame
from cards_integrations.chat.template import as_text
from cards_integrations.errors import RewardError
from cards_integrations.models.local.resolve import readable_positions
from cards_integrations.rewards.base import Conversation, Response, RewardModel, count_forward
from cards_integrations.rewards.scorers.head import Head
from cards_integrations.rewards.scorers.input_format import InputFormat
from cards_integrations.transformer.exact import reads_padded
from cards_integrations.transformer.rope import rope_switch


class RescoringClassifier(RewardModel):
    """Reads the whole text of every answer; a text longer than the window loses its beginning, a pair its prompt's."""

    across_requests = True

    def __init__(self, name: str, model: Any, input_format: InputFormat, head: Head) -> None:
        self.name = name
        self.model = model
        self.input_format = input_format
        self.head = head
        self.tokenizer = input_format.chat.tokenizer
        self.switch = rope_switch(model.config.get_text_config())
        self.window = min(readable_positions(model), self.tokenizer.model_max_length)
        self.together = reads_padded(model, self.tokenizer, self.window)
        self.frames: dict[Conversation, AnswerFrame] = {}  # of open conversations

    def open(self, conversation: Conversation) -> None:
        if not self.input_format.is_pair:
            self.frames[conversation] = self.input_format.around(conversation)

    def close(self, conversation: Conversation) -> None:
        self.frames.pop(conversation, None)

    async def score(self, responses: Sequence[Response]) -> list[float]:
        found: dict[Response, float] = {}
        for batch in self._batches(responses):
            found |= zip(batch, self._scores(batch), strict=True)
        return [found[response] for response in responses]

    def _batches(self, responses: Sequence[Response]) -> list[list[Response]]:
        """What is read at once: short texts, and long ones where the model reads these in another way."""
        if not self.together:
            return [[response] for response in responses]
        if not self.switch:
            return [[*responses]]
        lengths = map(len, self._encoded(responses)["input_ids"])
        long = {response: length > self.switch for response, length in zip(responses, lengths, strict=True)}
        kinds = ([response for response in responses if long[response] == kind] for kind in (False, True))
        return [kind for kind in kinds if kind]

    def _encoded(self, responses: Sequence[Response], **options: Any) -> Any:
        self.tokenizer.truncation_side = "left"
        if self.input_format.is_pair:
            return self._encoded_pairs(responses, **options)
        return self.tokenizer(
            [self._text(response) for response in responses],
            add_special_tokens=self.input_format.adds_special_tokens,
            truncation=True,
            max_length=self.window,
            **options,
        )

    def _encoded_pairs(self, responses: Sequence[Response], **options: Any) -> Any:
        answers = [response.text for response in responses]
        around = self.tokenizer.num_special_tokens_to_add(pair=True)
        longest = max(map(len, self.tokenizer(answers, add_special_tokens=False)["input_ids"]))
        if longest + around >= self.window:
            raise RewardError(
                f"reward {self.name!r}: the answer takes {longest} tokens, and the prompt has no room in the "
                f"{self.window} of its window; use a smaller max_tokens."
            )
        prompts = [as_text(response.conversation.prompt) for response in responses]
        return self.tokenizer(prompts, answers, truncation="only_first", max_length=self.window, **options)

    def _scores(self, responses: Sequence[Response]) -> list[float]:
        inputs = self._encoded(responses, padding=True, return_tensors="pt")
        self.input_format.chat.check_ids(inputs["input_ids"].flatten().tolist())
        with torch.inference_mode():
            logits = self.model(**inputs.to(self.model.device)).logits
        read = inputs["attention_mask"].sum(-1).tolist()
        count_forward((response.conversation, tokens) for response, tokens in zip(responses, read, strict=True))
        return self.head.score(responses, logits)

    def _text(self, response: Response) -> str:
        """All that is read: the answer and what is around it."""
        known = self.frames.get(response.conversation)
        frame = known or self.input_format.around(response.conversation)  # it may have been closed meanwhile
        return frame.whole(response.text)


def reads_pairs(model: Any, tokenizer: Any) -> bool:
    """Return True for an encoder whose tokenizer has tokens of its own to join two texts."""
    joined = tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False)
    return joined and not hasattr(model, "score")
