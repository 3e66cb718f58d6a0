"""log p of an answer under a causal model, read incrementally."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cards_integrations.chat.message import Message
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.rewards.base import Conversation, Response, RewardLoader
from cards_integrations.rewards.composite import Composite
from cards_integrations.rewards.scorers.incremental import ConversationRow, Incremental, ScoredBranch
from cards_integrations.rewards.scorers.layout import Layout
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.kv_memory import CacheNeed, common

OtherPrompt = Callable[[Conversation], tuple[str | list[Message], bool]]


class Likelihood(Incremental):
    """sum_t log p(y_t | prompt, y_<t) in nats, full vocabulary, temperature 1; an empty answer has 0."""

    def open(self, conversation: Conversation) -> None:
        text, ids = self.layout.chat.prompt(conversation.prompt)
        self.rows[conversation] = ConversationRow(self.transformer.cache.open(), text, "", ids, [])

    def keep(self, response: Response) -> None:
        row = self.rows.get(response.conversation)
        if row is not None and (branch := row.branches.get(response)) is not None:
            row.log_p = branch.log_p
        super().keep(response)

    def tokens(self, response: Response) -> list[int]:
        """The answer's own."""
        if self.same_vocabulary and response.ids is not None:
            return response.ids
        return self.layout.chat.encode(response.text)

    def _feed(self, response: Response) -> ForwardInput:
        read = self.rows[response.conversation]
        whole = [*read.before_ids, *self.tokens(response)]
        ids, _ = self._fitting(whole, 0, response)
        lost = len(whole) - len(ids)
        prompt = len(read.before_ids) - lost
        if not read.tree.ids:
            self.transformer.memory.recall(read.tree, read.before_ids)
        shared = common(ids, read.tree.ids)
        known = 0 if lost else max(0, min(shared, len(ids) - 1) - prompt)
        start = min(shared, prompt + known - 1)  # its output says how probable the first unknown token is
        branch = read.tree.branch(start)
        read.branches[response] = ScoredBranch(branch, len(ids) - start, ids, read.log_p[:known])
        return ForwardInput(branch, ids[start:], response, outputs=len(ids) - prompt - known + 1)

    def _run(self, batch: list[ForwardInput]) -> list[float]:
        found = []
        with torch.inference_mode():
            for feed, row in zip(batch, self._read(batch, self.transformer.logits(batch)), strict=True):
                new = torch.tensor(feed.ids[len(feed.ids) + 1 - feed.outputs :], device=row.batch.device)
                log_p = row.values[:-1].float().log_softmax(-1).gather(-1, new[:, None])[:, 0]
                scored = self.rows[feed.owner.conversation].branches[feed.owner]
                scored.log_p = scored.log_p + log_p.tolist()
                found.append(sum(scored.log_p))
        return found


class OwnLikelihood(Likelihood):
    """That of the language model which drafts: it is known from the drafting, and read only for other texts."""

    def cache_needs(self, conversation: Conversation, tokens: int) -> list[CacheNeed]:
        return []

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self.unread: set[Conversation] = set()

    def open(self, conversation: Conversation) -> None:
        """Nothing is read yet, and perhaps never."""
        self.unread.add(conversation)

    def close(self, conversation: Conversation) -> None:
        self.unread.discard(conversation)
        super().close(conversation)

    @property
    def step_times(self) -> None:  # type: ignore[override]
        return None

    async def score(self, responses: Sequence[Response]) -> list[float]:
        others = [r for r in responses if r.log_likelihood is None and self._is_open(r.conversation)]
        for conversation in [response.conversation for response in others]:
            if conversation in self.unread:
                self.unread.remove(conversation)
                super().open(conversation)
        read = iter(await super().score(others))
        found = {id(response): next(read) for response in others}
        return [found.get(id(r), r.log_likelihood or 0.0) for r in responses]

    def _is_open(self, conversation: Conversation) -> bool:
        return conversation in self.unread or conversation in self.rows


def likelihood(loader: RewardLoader, spec: LocalModel | None, name: str, anew: bool = False) -> Likelihood:
    """Of the language model itself (None), or of another causal model.

    `anew`: after another prompt than the one it drafts from, so that nothing is known from the drafting.
    """
    reader = loader.causal(spec, name)
    family = OwnLikelihood if reader.own and not anew else Likelihood
    return family(name, reader.model, Layout(reader.chat), reader.same_vocabulary, loader.models.memory)


class MutualInformation(Composite):
    """(log p(answer | prompt with context) - log p(answer | prompt without it)) / tokens, in nats.

    The first part is the prompt as it is; `other_prompt` makes the second, and says which has the context.
    """

    def __init__(self, name: str, loader: RewardLoader, other_prompt: OtherPrompt) -> None:
        self.own = likelihood(loader, None, "log p")
        super().__init__(name, [self.own, likelihood(loader, None, "log p, other prompt", anew=True)])
        self.other_prompt = other_prompt

    def view(self, which: int, conversation: Conversation) -> Conversation:
        if which == 0:
            return Conversation(conversation.prompt, conversation.usage)
        prompt, with_context = self.other_prompt(conversation)
        return Conversation(prompt, conversation.usage, conversation.context if with_context else ())

    async def score(self, responses: Sequence[Response]) -> list[float]:
        found = []
        for response, own, other in zip(responses, *await self.every_part(responses), strict=True):
            gain = other - own if self.views[response.conversation].conversations[1].context else own - other
            found.append(gain / max(1, len(self.own.tokens(response))))
        return found
