"""vLLM's `/pooling` of a process reward model: the scores of an answer's steps, made one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, FiniteFloat

from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.errors import SettingsError
from cards_integrations.http_client import REPLY_BYTES
from cards_integrations.rewards.base import Response
from cards_integrations.rewards.scorers.served.client import Entries, IndexedEntry, in_order, named
from cards_integrations.rewards.scorers.served.texts import JoinedText
from cards_integrations.rewards.steps import Steps, aggregated

LARGE = 700.0  # whose exponential is still a number
ROW_BYTES = 256  # of a reply for each token at most: the numbers of ten labels


class TokenScores(IndexedEntry):
    data: Entries[Entries[FiniteFloat]]  # (tokens or steps, labels)


class Pooled(BaseModel):
    data: Entries[TokenScores]


class StepScores(JoinedText):
    """Writes the tag after each step, and takes the probability of the label there.

    A server that pools by steps (vLLM's default for Qwen's models, `step_tag_id` of its pooler config) returns a row
    for each tag; another one a row for each token, of which those at the tags are taken: then token ids have to be
    sent, so that it is known where they are.
    """

    path = "/pooling"
    tag: int | None = None
    """The tag's token, if token ids are sent."""

    def use_tokenizer(self, chat: ChatTokenizer, padding: int | None) -> None:
        super().use_tokenizer(chat, padding)
        ids = chat.encode(self.settings.step_tag)
        if len(ids) != 1:
            raise SettingsError(f"reward.step_tag={self.settings.step_tag!r} is {len(ids)} tokens of this tokenizer.")
        self.tag = ids[0]

    @property
    def steps(self) -> Steps:
        """How an answer is taken apart."""
        return Steps(self.settings.separator, self.settings.step_tag, self.settings.after_tag)

    def answer(self, response: Response) -> str:
        return self.steps.tagged(self.steps.split(response.text))

    def body(self, responses: Sequence[Response]) -> dict[str, Any]:
        asked = {**named(self.settings.model), "input": self.input(responses)}
        return {**asked, "task": "token_classify", "use_activation": False}

    def limit(self, body: dict[str, Any], texts: int) -> int:
        return REPLY_BYTES + ROW_BYTES * sum(map(len, body["input"]))

    def read(self, content: bytes, body: dict[str, Any], responses: Sequence[Response]) -> list[float]:
        data = in_order(Pooled.model_validate_json(content, strict=True).data)
        if len(data) != len(responses):
            raise ValueError(f"{len(data)} scores for {len(responses)} texts. Check reward.protocol.")
        given = zip(data, body["input"], responses, strict=True)
        return [self._score(entry.data, text, len(self.steps.split(response.text))) for entry, text, response in given]

    def _score(self, rows: list[list[float]], text: str | list[int], steps: int) -> float:
        if isinstance(text, list) and len(rows) == len(text):
            rows = [row for row, token in zip(rows, text, strict=True) if token == self.tag]
        if len(rows) != steps:
            raise ValueError(
                f"there are {len(rows)} scores for {steps} steps. Start vLLM with the step tag, --pooler-config "
                "'{\"step_tag_id\": ...}', or give reward.tokenizer; the tag must be in no prompt and no answer."
            )
        return aggregated([self._probability(row) for row in rows], self.settings.aggregate)

    def _probability(self, logits: list[float]) -> float:
        """Of the label: the only one by a sigmoid, one of several by their softmax (the last by default)."""
        label = len(logits) - 1 if self.settings.label is None else self.settings.label
        if not isinstance(label, int) or label >= len(logits):
            raise ValueError(f"reward.label={label!r}: there are {len(logits)} labels.")
        against = [*logits, 0.0] if len(logits) == 1 else logits
        return 1 / sum(math.exp(min(value - logits[label], LARGE)) for value in against)
