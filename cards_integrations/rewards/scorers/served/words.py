"""vLLM's `/generative_scoring`: how much more a language model would say one word than another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.rewards.base import Response
from cards_integrations.rewards.criterion import HELPFUL, RUBRIC, Criterion
from cards_integrations.rewards.question import Probability, log_odds
from cards_integrations.rewards.scorers.served.client import Entries, IndexedEntry, in_order, named
from cards_integrations.rewards.scorers.served.texts import JoinedText


class WordScore(IndexedEntry):
    score: Probability


class TokensRead(BaseModel):
    prompt_tokens: int


class WordScores(BaseModel):
    data: Entries[WordScore]
    usage: TokensRead


class WordMargin(JoinedText):
    """log p(first word) - log p(second word) after a rubric, as `JudgeReward` has it of a model on this machine.

    vLLM joins a query and each of the items, without anything between them: the query is the tokens that all texts
    begin with.
    """

    path = "/generative_scoring"
    labels: list[int]

    def use_tokenizer(self, chat: ChatTokenizer, padding: int | None) -> None:
        from cards_integrations.rewards.scorers.rubric import Rubric
        from cards_integrations.rewards.scorers.verdict import Margin  # needs torch, which settings do not

        self.input_format = Rubric(chat, self.settings.prompt_format or RUBRIC, [Criterion(question=HELPFUL)])
        self.labels = Margin.of(self.settings.words, chat).words

    def body(self, responses: Sequence[Response]) -> dict[str, Any]:
        texts = [list(each) for each in self.input(responses)]
        shortest = min(map(len, texts))
        others = (at for at, tokens in enumerate(zip(*texts, strict=False)) if len({*tokens}) > 1)
        common = min(next(others, shortest), shortest - 1)  # an item has one token at least
        asked = {**named(self.settings.model), "query": texts[0][:common], "items": [ids[common:] for ids in texts]}
        return {**asked, "label_token_ids": self.labels, "apply_softmax": True, "add_special_tokens": False}

    def read(self, content: bytes, body: dict[str, Any], responses: Sequence[Response]) -> list[float]:
        found = WordScores.model_validate_json(content, strict=True)
        sent = sum(len(body["query"]) + len(item) for item in body["items"])
        if found.usage.prompt_tokens != sent:  # vLLM cuts texts that are longer than its window, and says no more
            raise ValueError(f"it read {found.usage.prompt_tokens} of {sent} tokens. Use a larger --max-model-len.")
        return [log_odds(entry.score) for entry in in_order(found.data)]
