"""A linear head on hidden states of the language model, which drafting computes anyway."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch

from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.errors import ModelError, RewardError
from cards_integrations.models.local.resolve import max_positions
from cards_integrations.rewards.base import CausalModel, Conversation, Response, RewardModel, count_forward
from cards_integrations.rewards.value_head import PROBE, ValueHead, pooled
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.forward import PREFILL_CHUNK, Output, Transformer, checked
from cards_integrations.transformer.kv_cache import Tree

SAME = 0.15  # share of the states' norm: 4 bits instead of 32 change them by 0.05, a low-rank adapter by 0.5
EXACT, ROUNDED = 1e-3, 0.05  # how far states from drafting may differ from those of a text that is read


class Value(RewardModel):
    """A head on the last hidden state after an answer, and on the mean of those after its tokens.

    Drafts come with these states. Other texts are read, in rows that each call opens for itself: first the prompt,
    then the answers.

    Args:
        name: What errors call the reward.
        causal: The language model that drafts.
        head: The head, trained on its hidden states.
    """

    across_requests = True

    def __init__(self, name: str, causal: CausalModel, head: ValueHead) -> None:
        self.name = name
        self.model = causal.model
        self.chat: ChatTokenizer = causal.chat
        self.transformer = Transformer(causal.model, causal.memory)
        self.window = max_positions(causal.model.config)
        self.head = head
        self.weight = head.weight.to(self.transformer.device)

    @property
    def reads_states(self) -> bool:
        return True

    @property
    def cache_bytes(self) -> int:
        return self.transformer.cache.bytes

    def release(self) -> None:
        self.transformer.release()

    def growth(self, responses: Sequence[Response]) -> int:
        others = [response for response in responses if response.states is None]
        prompts = {r.conversation: len(self.chat.prompt(r.conversation.prompt)[1]) for r in others}
        return sum(self.transformer.cache.row_bytes(prompts[r.conversation] + len(self._ids(r)) + 1) for r in others)

    async def score(self, responses: Sequence[Response]) -> list[float]:
        others: dict[Conversation, list[Response]] = {}
        for response in responses:
            if response.states is None:
                others.setdefault(response.conversation, []).append(response)
        read: dict[Response, torch.Tensor] = {}
        for conversation, group in others.items():
            read |= await self._read(conversation, group)
        states = [response.states if response.states is not None else read[response] for response in responses]
        with torch.inference_mode():
            found = torch.stack([*states]).flatten(1) @ self.weight.flatten() + self.head.bias
        values: list[float] = found.tolist()
        return values

    # --- texts that were not drafted ---

    async def _read(self, conversation: Conversation, responses: Sequence[Response]) -> dict[Response, torch.Tensor]:
        """Read answers to one prompt, and return what the head reads of each, (2, hidden size)."""
        _, prompt = self.chat.prompt(conversation.prompt)
        alike: dict[bool, dict[Response, list[int]]] = {}  # long texts may have other rotary frequencies
        for response in responses:
            answer = self._ids(response)
            if len(prompt) + len(answer) > self.window:
                raise RewardError(f"reward {self.name!r}: prompt and answer are longer than {self.window} tokens.")
            alike.setdefault(self.transformer.is_long(len(prompt) + len(answer)), {})[response] = answer
        found: dict[Response, torch.Tensor] = {}
        for long, answers in alike.items():
            tree = self.transformer.cache.open(long=long)
            try:
                found |= await self._read_answers(tree, conversation, prompt, answers)
            finally:
                self.transformer.cache.close(tree)
        return found

    async def _read_answers(
        self, tree: Tree, conversation: Conversation, prompt: list[int], answers: dict[Response, list[int]]
    ) -> dict[Response, torch.Tensor]:
        """Read the prompt in pieces, and then the answers after it."""
        trunk = tree.branch()
        for start in range(0, len(prompt), PREFILL_CHUNK):
            [output] = self._forward(conversation, [ForwardInput(trunk, prompt[start : start + PREFILL_CHUNK])])
            await asyncio.sleep(0)  # others take a step
        tree.keep(trunk)
        after = output.value[None].float()
        found = dict.fromkeys(answers, pooled(after))
        inputs = [ForwardInput(tree.branch(), ids, each, outputs=len(ids)) for each, ids in answers.items() if ids]
        for batch in self.transformer.batches(inputs):
            for item, output in zip(batch, self._forward(conversation, batch), strict=True):
                found[item.owner] = pooled(torch.cat([after, output.values.float()]))
            await asyncio.sleep(0)
        return found

    def _forward(self, conversation: Conversation, inputs: Sequence[ForwardInput]) -> list[Output]:
        """Run one forward, and count it."""
        outputs = checked(self.transformer.hidden(inputs))
        count_forward((conversation, len(item.ids)) for item in inputs)
        return outputs

    def _ids(self, response: Response) -> list[int]:
        """Return the tokens of the answer."""
        return response.ids if response.ids is not None else self.chat.encode_answer(response.text)

    # --- the model that it was trained on ---

    def check(self) -> None:
        """Check that the head was trained on this model, and that drafting gives the states of a text that is read.

        Raises:
            RewardError: The head was trained on another model.
            ModelError: Drafting gives other states.
        """
        ids = self.chat.encode(PROBE) or [0]
        if ids != self.head.card.probe_ids:
            raise self._is_anothers("has another tokenizer")
        read, drafted = self._probe(ids, drafted=False), self._probe(ids, drafted=True)
        if read.shape != self.head.probe.shape:
            needed = self.head.probe.shape[1]
            raise self._is_anothers(f"has hidden states of {read.shape[1]} numbers in place of {needed}")
        error = float((read.cpu() - self.head.probe).norm() / self.head.probe.norm())
        if not error <= SAME:
            raise self._is_anothers(f"has other weights: its hidden states are {error:.0%} off")
        off, rounded = float((drafted - read).norm() / read.norm()), self.model.dtype != torch.float32
        if not off <= (ROUNDED if rounded else EXACT):
            raise ModelError(
                f"model type {self.model.config.model_type!r} cannot have a value head: what its drafting shows is "
                f"{off:.1%} off from its last hidden state."
            )

    def _is_anothers(self, found: str) -> RewardError:
        return RewardError(
            f"reward {self.name!r} was trained on {self.head.card.trained_on}, and the language model {found}. "
            "Draft with that model, or train a head for this one: cards train-value."
        )

    def _probe(self, ids: list[int], drafted: bool) -> torch.Tensor:
        """Return the hidden states of a text as it is read, or as drafting gives them, (tokens, hidden size)."""
        run = self.transformer.logits_and_states if drafted else self.transformer.hidden
        tree = self.transformer.cache.open()
        try:
            [output] = checked(run([ForwardInput(tree.branch(), ids, outputs=len(ids))]))
        finally:
            self.transformer.cache.close(tree)
        states = output.states if drafted else output.values
        assert states is not None
        return states.float()
