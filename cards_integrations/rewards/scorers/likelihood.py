"""log p of an answer under a causal model, read incrementally."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cards_integrations.chat.message import Message
from cards_integrations.rewards.base import CausalModel, Conversation, Response
from cards_integrations.rewards.scorers.composite import Composite
from cards_integrations.rewards.scorers.conversation_row import ConversationRow, FittedText, ScoredBranch
from cards_integrations.rewards.scorers.incremental import Incremental
from cards_integrations.rewards.scorers.input_format import InputFormat
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.forward import Output
from cards_integrations.transformer.kv_memory import CacheNeed
from cards_integrations.transformer.prefix_tree import common

OtherPrompt = Callable[[Conversation], tuple[str | list[Message], bool]]
"""Returns another prompt for a conversation, and whether that prompt has the context."""


class Likelihood(Incremental):
    """sum_t log p(y_t | prompt, y_<t) in nats, full vocabulary, temperature 1; 0 for an empty answer."""

    def open(self, conversation: Conversation) -> None:
        _, ids = self.input_format.chat.prompt(conversation.prompt)
        tree = self.transformer.cache.open(self._columns(ids))
        self.rows[conversation] = ConversationRow(tree, ids, None)

    def keep(self, response: Response) -> None:
        row = self.rows.get(response.conversation)
        if row is not None and (scored := row.branches.get(response)) is not None:
            row.log_p = scored.log_p
        super().keep(response)

    def answer_ids(self, response: Response) -> list[int]:
        """Return the tokens of the answer alone."""
        if self.same_vocabulary and response.ids is not None:
            return response.ids
        return self.input_format.chat.encode_answer(response.text)

    def _ids(self, response: Response, row: ConversationRow) -> tuple[list[int], int]:
        return [*row.before_ids, *self.answer_ids(response)], 0

    def _forward_input(self, response: Response, text: FittedText) -> ForwardInput:
        row, (ids, _, reading) = self.rows[response.conversation], text
        prompt = len(row.before_ids) - reading.cut
        if not row.tree.ids:
            self._recall(row, ids[:prompt], reading)
        shared = min(common(ids, row.tree.ids), len(ids) - 1) if reading == row.reading else 0
        known = max(0, shared - prompt)
        # The output of the first token says how probable the first unknown one is.
        root, start, branch = row.leave(text, prompt + known - 1)
        row.branches[response] = ScoredBranch(branch, reading.cut, root, len(ids) - start, ids, row.log_p[:known])
        return ForwardInput(branch, ids[start:], response, outputs=len(ids) - prompt - known + 1)

    def _score_batch(self, batch: list[ForwardInput]) -> list[float]:
        outputs = self._counted(batch, self.transformer.logits(batch))
        with torch.inference_mode():
            return [self._sum(forward, output) for forward, output in zip(batch, outputs, strict=True)]

    def _sum(self, forward: ForwardInput, output: Output) -> float:
        """Return the log p of an answer, given the output for its new tokens."""
        new = torch.tensor(forward.ids[len(forward.ids) + 1 - forward.outputs :], device=output.batch.device)
        log_p = output.values[:-1].float().log_softmax(-1).gather(-1, new[:, None])[:, 0]
        scored = self.rows[forward.owner.conversation].branches[forward.owner]
        scored.log_p = scored.log_p + log_p.tolist()
        return sum(scored.log_p)


class OwnLikelihood(Likelihood):
    """Likelihood under the language model that drafts: known for drafts, and only read for other texts."""

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self.unread: set[Conversation] = set()  # open, but without a row, as nothing had to be read

    def cache_needs(self, conversation: Conversation, tokens: int) -> list[CacheNeed]:
        return []

    def growth(self, responses: Sequence[Response]) -> int:
        others = [response for response in responses if response.log_likelihood is None]
        cache, chat = self.transformer.cache, self.input_format.chat
        opened = {response: response.conversation for response in others if response.conversation in self.unread}
        return super().growth(others) + sum(
            cache.row_bytes(len(chat.prompt(conversation.prompt)[1]) + len(self.answer_ids(response)) + 1)
            for response, conversation in opened.items()
        )

    def open(self, conversation: Conversation) -> None:
        self.unread.add(conversation)

    def close(self, conversation: Conversation) -> None:
        self.unread.discard(conversation)
        super().close(conversation)

    @property
    def step_times(self) -> None:  # type: ignore[override]
        return None

    async def score(self, responses: Sequence[Response]) -> list[float]:
        others = [r for r in responses if r.log_likelihood is None and self._is_open(r.conversation)]
        for response in others:
            self._open_row(response.conversation)
        found = dict(zip(others, await super().score(others), strict=True))
        return [found.get(response, response.log_likelihood or 0.0) for response in responses]

    def _is_open(self, conversation: Conversation) -> bool:
        return conversation in self.unread or conversation in self.rows

    def _open_row(self, conversation: Conversation) -> None:
        if conversation in self.unread:
            super().open(conversation)
            self.unread.remove(conversation)


def likelihood(causal: CausalModel, name: str, from_drafting: bool = True) -> Likelihood:
    """Make a model of log p.

    Args:
        causal: The causal model under which answers are read.
        name: What errors call the reward.
        from_drafting: Whether the language model's own log p is taken from the drafting where it is known; False to
            read answers after another prompt than the one it drafts from.
    """
    family = OwnLikelihood if causal.is_language_model and from_drafting else Likelihood
    return family(name, causal.model, InputFormat(causal.chat), causal.same_vocabulary, causal.memory)


class MutualInformation(Composite):
    """(log p(answer | prompt with context) - log p(answer | prompt without it)) / tokens, in nats.

    Args:
        name: What errors call the reward.
        causal: The model that reads the answer after both prompts.
        other_prompt: Makes the second prompt, with or without context, from the first.
    """

    owns_parts = True

    def __init__(self, name: str, causal: CausalModel, other_prompt: OtherPrompt) -> None:
        self.own = likelihood(causal, "log p")
        super().__init__(name, [self.own, likelihood(causal, "log p, other prompt", from_drafting=False)])
        self.other_prompt = other_prompt

    def conversation_view(self, part: int, conversation: Conversation) -> Conversation:
        if part == 0:
            return Conversation(conversation.prompt, conversation.usage)
        prompt, with_context = self.other_prompt(conversation)
        return Conversation(prompt, conversation.usage, conversation.context if with_context else ())

    async def score(self, responses: Sequence[Response]) -> list[float]:
        own, other = await self.score_parts(responses)
        return [self._gain(*each) for each in zip(responses, own, other, strict=True)]

    def _gain(self, response: Response, own: float, other: float) -> float:
        """Return the gain by the context, in nats per token."""
        _, other_conversation = self.views[response.conversation].conversations
        gain = other - own if other_conversation.context else own - other
        return gain / max(1, len(self.own.answer_ids(response)))
