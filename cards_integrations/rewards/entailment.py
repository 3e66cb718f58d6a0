"""Does a context entail a sentence? By a classifier of pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cards_integrations.errors import SettingsError
from cards_integrations.models.loading import LocalModel
from cards_integrations.rewards.base import Conversation, Response, RewardLoader, RewardModel
from cards_integrations.rewards.sentences import sentences


class Entailment(RewardModel):
    """The mean over an answer's sentences of the highest probability of `label` over its contexts.

    The classifier reads pairs (context, sentence); of a context that is too long it reads the beginning.
    """

    across_requests = True

    def __init__(
        self,
        name: str,
        loader: RewardLoader,
        spec: LocalModel,
        label: int | str,
        context: Callable[[Conversation], Sequence[str]],
    ) -> None:
        self.name = name
        self.context = context
        self.model, self.tokenizer = loader.models.classifier(spec)
        self.index = self._index(label, self.model.config.id2label)

    def _index(self, label: int | str, labels: dict[int, str]) -> int:
        """The class that means support; a cross-encoder has only one."""
        found = [index for index, name in labels.items() if label == index or str(label).lower() == name.lower()]
        if not found and len(labels) > 1:
            raise SettingsError(f"reward.label={label!r}: choose one of {labels} for the reward {self.name!r}.")
        return found[0] if found else 0

    def open(self, conversation: Conversation) -> None:
        conversation.state = self.context(conversation)

    async def score(self, responses: Sequence[Response]) -> list[float]:
        asked = [(response.conversation, sentence) for response in responses for sentence in sentences(response.text)]
        pairs = [(context, sentence) for conversation, sentence in asked for context in conversation.state]
        p = iter(self._probabilities(pairs) if pairs else ())
        support = iter([max(next(p) for _ in conversation.state) for conversation, _ in asked])
        scores = []
        for response in responses:
            own = [next(support) for _ in sentences(response.text)]
            scores.append(sum(own) / max(1, len(own)))
            response.conversation.usage.rm_forwards += 1
        return scores

    def _probabilities(self, pairs: list[tuple[str, str]]) -> list[float]:
        contexts, texts = map(list, zip(*pairs, strict=True))
        inputs = self.tokenizer(contexts, texts, padding=True, truncation="only_first", return_tensors="pt")
        with torch.inference_mode():
            logits = self.model(**inputs.to(self.model.device)).logits.float()
        single = logits.shape[-1] == 1
        found: list[float] = (logits[:, 0].sigmoid() if single else logits.softmax(-1)[:, self.index]).tolist()
        return found
