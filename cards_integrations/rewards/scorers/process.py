"""The scores of an answer's steps, each read once, where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cards_integrations.errors import ModelError
from cards_integrations.rewards.base import Conversation, Response
from cards_integrations.rewards.scorers.conversation_row import ConversationRow, FittedText
from cards_integrations.rewards.scorers.head import Head
from cards_integrations.rewards.scorers.incremental import Incremental
from cards_integrations.rewards.scorers.input_format import InputFormat
from cards_integrations.rewards.scorers.step_ids import StepIds, TaggedIds
from cards_integrations.rewards.steps import Aggregate, Steps, aggregated
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.forward import scoring_head
from cards_integrations.transformer.kv_memory import KVMemory

StepKey = tuple[int, str]
"""How many tokens the window leaves out, and the tagged answer up to the end of a step."""


class Process(Incremental):
    """A decoder that reads an answer with tags behind its steps; a step that has ended is not scored again.

    Args:
        name: What errors call the reward.
        model: The transformers model.
        input_format: What is read around an answer.
        steps: How steps are marked.
        aggregate: What their scores are together.
        memory: For the KV caches of all models of the engine.
    """

    def __init__(
        self, name: str, model: Any, input_format: InputFormat, steps: Steps, aggregate: Aggregate,
        memory: KVMemory | None = None,
    ) -> None:  # fmt: skip
        super().__init__(name, model, input_format, False, memory)
        if self.transformer.recurrent:
            raise ModelError(f"reward {name!r}: process rewards of models with recurrent layers are not supported.")
        self.steps = steps
        self.aggregate = aggregate
        self._step_ids: dict[Conversation, StepIds] = {}
        self._known: dict[Conversation, dict[StepKey, float]] = {}
        self._ends: dict[Conversation, list[int]] = {}  # of the kept steps, in characters
        self._tagged: dict[Response, TaggedIds] = {}  # while they are scored
        self._keys: dict[Response, list[StepKey]] = {}  # of all steps, while they are scored

    def open(self, conversation: Conversation) -> None:
        form = self.input_format
        ids = StepIds(form.chat, form.around(conversation), form.adds_special_tokens, self.steps, self._one_by_one)
        tree = self.transformer.cache.open(self._columns(ids.before_ids))
        self.rows[conversation] = ConversationRow(tree, ids.before_ids, None)
        self._step_ids[conversation], self._known[conversation], self._ends[conversation] = ids, {}, []

    @property
    def _one_by_one(self) -> bool:
        """True if each step is encoded by itself."""
        return False

    def close(self, conversation: Conversation) -> None:
        super().close(conversation)
        for known in (self._step_ids, self._known, self._ends):
            known.pop(conversation, None)

    def keep(self, response: Response) -> None:
        if response.conversation in self.rows:
            self._ends[response.conversation] = self._ends_of(response)
        super().keep(response)

    async def score(self, responses: Sequence[Response]) -> list[float]:
        try:
            return await super().score(responses)
        finally:
            for response in responses:
                self._tagged.pop(response, None)
                self._keys.pop(response, None)

    def _ends_of(self, response: Response) -> list[int]:
        """Return where the segments of an answer end, those of what it continues included."""
        parent = response.parent
        before = self._ends[response.conversation] if parent is None else self._ends_of(parent)
        return [*before, len(response.text)]

    def _steps_of(self, response: Response) -> list[str]:
        return self.steps.split(response.text, self._ends_of(response)[:-1])

    def _ids(self, response: Response, row: ConversationRow) -> tuple[list[int], int]:
        tagged = self._tagged.get(response)
        if tagged is None:
            tagged = self._tagged[response] = self._step_ids[response.conversation](self._steps_of(response))
        ended = self.steps.separator is not None and response.text.endswith(self.steps.separator)
        return tagged.ids, 0 if ended else tagged.suffix

    def _unknown(self, response: Response, cut: int) -> tuple[list[StepKey], int]:
        """Return the keys of all steps, and how many of the first are known; the last one is always read."""
        keys, known = self._keys.get(response), self._known[response.conversation]
        if keys is None:
            steps = self._steps_of(response)
            keys = [(cut, self.steps.tagged(steps[: end + 1])) for end in range(len(steps))]
            self._keys[response] = keys
        first = next((i for i, key in enumerate(keys) if key not in known), len(keys))
        return keys, min(first, len(keys) - 1)

    def _known_before(self, response: Response, text: FittedText) -> int:
        return min(super()._known_before(response, text), self._first_tag(response, text))

    def _outputs(self, response: Response, text: FittedText) -> int:
        return len(text.ids) - self._first_tag(response, text)

    def _first_tag(self, response: Response, text: FittedText) -> int:
        """Return the position of the first tag whose score is not known."""
        _, first = self._unknown(response, text.reading.cut)
        return max(0, self._tagged[response].tags[first] - text.reading.cut)

    def _score_batch(self, batch: list[ForwardInput]) -> list[float]:
        with torch.inference_mode():
            read = self._read(batch)
            return [self._score(forward.owner, values) for forward, values in zip(batch, read, strict=True)]

    def _score(self, response: Response, values: torch.Tensor) -> float:
        """Return the score of an answer from the outputs (outputs, ...) from its first unknown tag on."""
        tags, known = self._tagged[response].tags, self._known[response.conversation]
        keys, first = self._unknown(response, self.rows[response.conversation].branches[response].cut)
        places = [tag - tags[-1] - 1 for tag in tags[first:]]
        known.update(zip(keys[first:], self._good(values[places]), strict=True))
        return aggregated([known[key] for key in keys], self.aggregate)

    def _read(self, batch: list[ForwardInput]) -> list[torch.Tensor]:
        return [output.values for output in self._counted(batch, self.transformer.hidden(batch))]

    def _good(self, values: torch.Tensor) -> list[float]:
        """Return the probability that each step is good, from the outputs (steps, ...) at their tags."""
        raise NotImplementedError


class TokenHead(Process):
    """A token classifier."""

    def __init__(self, head: Head, *settings: Any) -> None:
        super().__init__(*settings)
        self.head = head
        self.to_logits = scoring_head(self.model).float()

    @property
    def _one_by_one(self) -> bool:
        return self.steps.tag not in map(str, self.input_format.chat.added_tokens.values())

    def _good(self, values: torch.Tensor) -> list[float]:
        return self.head(self.to_logits(values.float()))


class CausalWords(Process):
    """A causal model that says one word behind good steps, and another behind bad ones."""

    def __init__(self, words: list[int], *settings: Any) -> None:
        super().__init__(*settings)
        self.words = words

    def _read(self, batch: list[ForwardInput]) -> list[torch.Tensor]:
        return [output.values for output in self._counted(batch, self.transformer.logits(batch))]

    def _good(self, values: torch.Tensor) -> list[float]:
        found: list[float] = values[:, self.words].float().softmax(-1)[:, 0].tolist()
        return found
