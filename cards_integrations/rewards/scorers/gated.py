"""A decoder that scores several objectives, which the prompt weighs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from cards_integrations.errors import RewardError
from cards_integrations.models.local.gating import TURNS, Gate
from cards_integrations.rewards.base import Conversation, Response
from cards_integrations.rewards.scorers.conversation_row import FittedText
from cards_integrations.rewards.scorers.head import Head
from cards_integrations.rewards.scorers.incremental import IncrementalClassifier
from cards_integrations.rewards.scorers.input_format import InputFormat
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.forward import PREFILL_CHUNK
from cards_integrations.transformer.kv_memory import KVMemory


class GatedClassifier(IncrementalClassifier):
    """A classifier whose score is the sum of its labels' logits, with the weights that its gate gives them.

    The gate reads the hidden state where the last turn of the prompt ends, once for a conversation.

    Args:
        name: What errors call the reward.
        model: The transformers model, with its `gate`.
        input_format: What is read around an answer.
        same_vocabulary: Whether its token ids are the language model's.
        memory: For the KV caches of all models of the engine.
    """

    def __init__(
        self, name: str, model: Any, input_format: InputFormat, same_vocabulary: bool, memory: KVMemory | None = None
    ) -> None:
        labels: dict[int, str] = model.config.id2label
        every = Head(None, "logit", labels, dict.fromkeys(labels.values(), 1.0))
        super().__init__(name, model, input_format, every, same_vocabulary, memory)
        self.gate: Gate = model.gate
        self.weights = WeakKeyDictionary[Conversation, torch.Tensor]()  # of the objectives, (objectives,)
        chat = input_format.chat
        self.turns = [ids for ids in map(chat.encode, TURNS) if ids]

    def growth(self, responses: Sequence[Response]) -> int:
        new = {response.conversation for response in responses} - set(self.weights)
        prompts = [self.rows[each].before_ids for each in new if each in self.rows]
        return super().growth(responses) + sum(self.transformer.cache.row_bytes(len(ids)) for ids in prompts)

    async def _read_prompts(self, texts: Mapping[Response, FittedText]) -> None:
        prompts = {each: self.rows[each].before_ids for each in dict.fromkeys(r.conversation for r in texts)}
        for conversation, ids in prompts.items():
            if conversation not in self.weights:
                self.weights[conversation] = await self._weigh(conversation, ids)
        await super()._read_prompts({r: text for r, text in texts.items() if r.conversation in self.rows})

    async def _weigh(self, conversation: Conversation, before_ids: list[int]) -> torch.Tensor:
        """What the gate makes of a prompt; what was read of it is kept for the answers."""
        ids = self._gated(before_ids)[-self.window :]
        cache, memory = self.transformer.cache, self.transformer.memory
        tree = cache.open(long=self.transformer.is_long(len(ids)))
        try:
            memory.recall(tree, ids)
            for start in range(len(tree.ids), len(ids), PREFILL_CHUNK):
                piece = ForwardInput(tree.branch(), ids[start : start + PREFILL_CHUNK], conversation)
                [output] = self._counted([piece], self.transformer.hidden([piece]))
                tree.keep(piece.branch)
                tree.drop(piece.branch)
                await asyncio.sleep(0)  # others take a step
            memory.keep(tree)
        finally:
            cache.close(tree)
        with torch.inference_mode():
            weights: torch.Tensor = self.gate(output.value[None])[0]
        return weights

    def _gated(self, ids: list[int]) -> list[int]:
        """The ids of a prompt up to where the gate is read."""
        for last in reversed(range(len(ids))):
            if any(ids[last : last + len(turn)] == turn for turn in self.turns):
                return ids[: last + 1]
        raise RewardError(
            f"reward {self.name!r} weighs its objectives where the answer's turn begins, and its prompt has no such "
            "place: prompt_format= must write the turns of its own chat template, or name a label= or weights=."
        )

    def _combined(self, responses: Sequence[Response], logits: torch.Tensor) -> list[float]:
        self.head.score(responses, logits)  # leaves each objective in the responses' parts
        weights = torch.stack([self.weights[response.conversation] for response in responses])
        found: list[float] = (logits * weights).sum(-1).tolist()
        return found
