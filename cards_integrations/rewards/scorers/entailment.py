"""Whether a context entails a sentence, by a classifier of pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.errors import SettingsError
from cards_integrations.models.local.checks import embedding_rows
from cards_integrations.models.local.resolve import readable_positions
from cards_integrations.rewards.base import Conversation, Response, RewardModel, count_forward
from cards_integrations.rewards.scorers.pairs import PairEncoder
from cards_integrations.rewards.scorers.portions import padded, portions
from cards_integrations.rewards.scorers.sentences import split_sentences
from cards_integrations.rewards.scorers.support import support
from cards_integrations.transformer.exact import reads_padded
from cards_integrations.transformer.forward import PREFILL_CHUNK


class Entailment(RewardModel):
    """The mean over an answer's sentences of the highest probability of `label` over its contexts.

    The classifier reads pairs (context, sentence); of a context that is too long it reads the beginning.

    Args:
        name: What errors call the reward.
        model: An `AutoModelForSequenceClassification`.
        tokenizer: Its tokenizer.
        label: Index or name of the label that means support.
        context: Finds the contexts of a conversation.
    """

    across_requests = True

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        label: int | str,
        context: Callable[[Conversation], Sequence[str]],
    ) -> None:
        self.name = name
        self.context = context
        self.model, self.tokenizer = model, tokenizer
        self.chat = ChatTokenizer(tokenizer, rows=embedding_rows(model))
        window = min(readable_positions(model), tokenizer.model_max_length)
        self.encode = PairEncoder(name, tokenizer, window, "right", "context", "sentence")
        self.together = reads_padded(model, tokenizer, window)
        self.index = self._index(label, self.model.config.id2label)
        self.contexts: dict[Conversation, Sequence[str]] = {}  # of open conversations

    def _index(self, label: int | str, labels: dict[int, str]) -> int:
        """Return the index of the label that means support; a cross-encoder has only one."""
        found = [index for index, name in labels.items() if label == index or str(label).lower() == name.lower()]
        if not found and len(labels) > 1:
            raise SettingsError(f"reward.label={label!r}: choose one of {labels} for the reward {self.name!r}.")
        return found[0] if found else 0

    def open(self, conversation: Conversation) -> None:
        self.contexts[conversation] = self.context(conversation)

    def close(self, conversation: Conversation) -> None:
        self.contexts.pop(conversation, None)

    async def score(self, responses: Sequence[Response]) -> list[float]:
        contexts = {r.conversation: self._contexts(r.conversation) for r in responses}
        asked = [
            (response.conversation, sentence) for response in responses for sentence in split_sentences(response.text)
        ]
        pairs = [(context, sentence) for conversation, sentence in asked for context in contexts[conversation]]
        read = iter(await self._probabilities(pairs) if pairs else ())
        by_sentence, counted = [], []
        for conversation, _ in asked:
            own = [next(read) for _ in contexts[conversation]]
            by_sentence.append([p for p, _ in own])
            counted.append((conversation, sum(tokens for _, tokens in own)))
        count_forward(counted)
        rows = iter(by_sentence)
        return [support(response, [next(rows) for _ in split_sentences(response.text)]) for response in responses]

    def _contexts(self, conversation: Conversation) -> Sequence[str]:
        known = self.contexts.get(conversation)
        return self.context(conversation) if known is None else known  # it may have been closed meanwhile

    async def _probabilities(self, pairs: list[tuple[str, str]]) -> list[tuple[float, int]]:
        """Return the probability of support for each pair, and how many tokens it has."""
        contexts, texts = zip(*pairs, strict=True)
        encoded = self.encode(contexts, texts)
        self.chat.check_ids([token for ids in encoded["input_ids"] for token in ids])
        lengths, found = list(map(len, encoded["input_ids"])), dict[int, float]()
        async for rows in portions(lengths, PREFILL_CHUNK if self.together else 0):
            with torch.inference_mode():
                logits = self.model(**padded(self.tokenizer, encoded, rows).to(self.model.device)).logits.float()
            p = logits[:, 0].sigmoid() if logits.shape[-1] == 1 else logits.softmax(-1)[:, self.index]
            found |= zip(rows, p.tolist(), strict=True)
        return [(found[row], lengths[row]) for row in range(len(pairs))]
