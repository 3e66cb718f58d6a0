"""Decoders that score a candidate by its new tokens only: the kept answer stays in a KV cache."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from cards_integrations.errors import CardsError, ModelError, RewardError
from cards_integrations.models.local.resolve import max_positions
from cards_integrations.rewards.base import Conversation, Response, RewardModel, count_forward
from cards_integrations.rewards.scorers.head import Head
from cards_integrations.rewards.scorers.input_format import InputFormat, without_final_padding
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.forward import Output, Transformer
from cards_integrations.transformer.kv_cache import Branch, Tree
from cards_integrations.transformer.kv_memory import CacheNeed, KVMemory
from cards_integrations.transformer.prefix_tree import common
from cards_integrations.transformer.step_times import StepTimes, step_times

log = logging.getLogger("cards_integrations")


@dataclass
class ScoredBranch:
    """A scored response in the cache."""

    branch: Branch
    kept: int
    """How many of the branch's own tokens, from its first on, go into the trunk if the response is kept."""
    path: list[int]
    """All tokens up to the end of those."""
    log_p: list[float] = field(default_factory=list)
    """In nats, of each token of the answer, where a likelihood is read."""


@dataclass
class ConversationRow:
    """An open conversation in the cache, and the text and ids around its answer."""

    tree: Tree
    before: str
    after: str
    before_ids: list[int]
    after_ids: list[int]
    log_p: list[float] = field(default_factory=list)
    """In nats, of each token of the kept answer, where a likelihood is read."""
    branches: dict[Response, ScoredBranch] = field(default_factory=dict)
    warned_about_window: bool = False


class Incremental(RewardModel):
    """A decoder that reads prompt and answer as one text; a candidate costs its own tokens and what follows it.

    With the language model's own vocabulary the candidate's ids are read as they are. Otherwise its
    text is tokenized again, and what it shares with the kept tokens is not read again, even where
    the last of them has merged with the first of the candidate. A text longer than the window loses
    the beginning of the prompt.

    Args:
        name: What errors call the reward.
        model: The transformers model.
        input_format: What is read around an answer.
        same_vocabulary: Whether its token ids are the language model's.
        memory: For the KV caches of all models of the engine.
    """

    across_requests = True

    def __init__(
        self, name: str, model: Any, input_format: InputFormat, same_vocabulary: bool, memory: KVMemory | None = None
    ) -> None:
        self.name = name
        self.model = model
        self.input_format = input_format
        self.same_vocabulary = same_vocabulary
        self.transformer = Transformer(model, memory)
        self.window = max_positions(model.config)
        self.rows: dict[Conversation, ConversationRow] = {}

    @cached_property
    def step_times(self) -> StepTimes:
        return step_times(self.name, self.model, self.transformer.time)

    @property
    def cache_bytes(self) -> int:
        return self.transformer.cache.bytes

    def release(self) -> None:
        self.transformer.release()

    def cache_needs(self, conversation: Conversation, tokens: int) -> list[CacheNeed]:
        return [CacheNeed(self.transformer.cache, 1, tokens)]

    def open(self, conversation: Conversation) -> None:
        chat, special = self.input_format.chat, self.input_format.adds_special_tokens
        before, after = self.input_format.around(conversation)
        before_ids, after_ids = chat.encode(before, special=special), chat.encode(after)
        self.rows[conversation] = ConversationRow(self.transformer.cache.open(), before, after, before_ids, after_ids)

    def close(self, conversation: Conversation) -> None:
        if (row := self.rows.pop(conversation, None)) is not None:
            self.transformer.memory.keep(row.tree)
            self.transformer.cache.close(row.tree)

    async def score(self, responses: Sequence[Response]) -> list[float]:
        self._read_prompts(responses)
        inputs = [self._forward_input(response) for response in responses]
        try:
            return [score for batch in self.transformer.batches(inputs) for score in self._score_batch(batch)]
        except Exception:
            for each in inputs:
                each.branch.tree.drop(each.branch)
            raise

    def _read_prompts(self, responses: Sequence[Response]) -> None:
        """Read the prompts of new answers first, so that not each of the answers reads them again."""
        answers = Counter(r.conversation for r in responses if not self.rows[r.conversation].tree.ids)
        answered = {r.conversation for r in responses if r.text}  # others may follow before anything is kept
        inputs = []
        for conversation, n in answers.items():
            row = self.rows[conversation]
            prompt = row.before_ids[: self.window - 1]
            if (n > 1 or conversation in answered) and len(prompt) > 1:
                self.transformer.memory.recall(row.tree, prompt)
                if unread := prompt[len(row.tree.ids) :]:
                    inputs.append(ForwardInput(row.tree.branch(), unread, conversation))
        for batch in self.transformer.batches(inputs):
            self._counted(batch, self.transformer.hidden(batch))
            for each in batch:
                each.branch.tree.keep(each.branch, len(each.ids))
                each.branch.tree.drop(each.branch)

    def keep(self, response: Response) -> None:
        if (scored := self._forget(response)) is not None:
            tree = scored.branch.tree
            tree.keep(scored.branch, scored.kept)
            tree.drop(scored.branch)

    def drop(self, response: Response) -> None:
        if (scored := self._forget(response)) is not None:
            scored.branch.tree.drop(scored.branch)

    def _forget(self, response: Response) -> ScoredBranch | None:
        row = self.rows.get(response.conversation)
        return row.branches.pop(response, None) if row else None

    def _forward_input(self, response: Response) -> ForwardInput:
        """What has to be read to score a response, on a new branch."""
        row = self.rows[response.conversation]
        ids, suffix = self._fitting(*self._ids(response, row), response)
        if not row.tree.ids:
            self.transformer.memory.recall(row.tree, ids[: len(ids) - suffix])
        most = len(ids) - max(1, suffix)  # the score is read at the last token
        parent = row.branches.get(response.parent) if response.parent else None
        again = 0 if parent is None else max(0, len(parent.path) - most)  # nothing new: the last token is read again
        if parent is not None and again <= parent.kept and common(ids, parent.path) == len(parent.path):
            shared, branch = len(parent.path) - again, parent.branch.branch(parent.kept - again)
        else:
            shared = min(common(ids, row.tree.ids), most)
            branch = row.tree.branch(shared)
        row.branches[response] = ScoredBranch(branch, len(ids) - suffix - shared, ids[: len(ids) - suffix])
        return ForwardInput(branch, ids[shared:], response)

    def _fitting(self, ids: list[int], suffix: int, response: Response) -> tuple[list[int], int]:
        """As many of the last ids as the window holds: the prompt may lose its beginning, the answer nothing."""
        surplus = len(ids) - self.window
        if surplus <= 0:
            return ids, suffix
        row = self.rows[response.conversation]
        prompt = len(row.before_ids)
        if surplus >= prompt:
            raise RewardError(
                f"reward {self.name!r}: the answer takes {len(ids) - prompt} tokens, more than the {self.window} of "
                "its window; use a smaller max_tokens."
            )
        if not row.warned_about_window:
            log.warning("reward %r does not read the first tokens of a prompt: its window is full", self.name)
            row.warned_about_window = True
        return ids[surplus:], suffix

    def _ids(self, response: Response, row: ConversationRow) -> tuple[list[int], int]:
        """All ids of the conversation with this answer, and how many of them come after the answer."""
        chat = self.input_format.chat
        if self.same_vocabulary and response.ids is not None:
            ids = [*row.before_ids, *response.ids]
        else:
            ids = chat.encode(row.before + response.text, special=self.input_format.adds_special_tokens)
        whole = [*ids, *row.after_ids] or [chat.tokenizer.pad_token_id]  # something must be read
        return whole, len(whole) - len(ids)

    @abstractmethod
    def _score_batch(self, batch: list[ForwardInput]) -> list[float]:
        """One forward, and the scores of the responses in it."""

    def _counted(self, batch: list[ForwardInput], outputs: list[Output | CardsError]) -> list[Output]:
        """The outputs of a forward, which is counted; the first error of its inputs."""
        found = []
        for output in outputs:
            if isinstance(output, CardsError):
                raise output
            found.append(output)
        count_forward((_conversation(each.owner), len(each.ids)) for each in batch)
        return found


def _conversation(owner: Response | Conversation) -> Conversation:
    """Whose input it is: a response's, or that of a prompt which many responses follow."""
    return owner.conversation if isinstance(owner, Response) else owner


class IncrementalClassifier(Incremental):
    """A decoder with a classification head, read at the last token."""

    def __init__(
        self, name: str, model: Any, input_format: InputFormat, head: Head, same_vocabulary: bool,
        memory: KVMemory | None = None,
    ) -> None:  # fmt: skip
        super().__init__(name, model, input_format, same_vocabulary, memory)
        self.head = head
        self.to_logits = model.score.float()  # the last step in full precision: bf16 has three digits
        self.padding = self.transformer.config.pad_token_id

    def _ids(self, response: Response, row: ConversationRow) -> tuple[list[int], int]:
        whole, suffix = super()._ids(response, row)
        ids = without_final_padding(whole, self.padding)
        return ids, max(0, suffix - (len(whole) - len(ids)))

    def _score_batch(self, batch: list[ForwardInput]) -> list[float]:
        outputs = self._counted(batch, self.transformer.hidden(batch))
        with torch.inference_mode():
            return self.head(self.to_logits(torch.stack([output.value for output in outputs]).float()))


def reads_incrementally(model: Any) -> bool:
    """Return True for a decoder with a head whose attention can be given a tree mask."""
    if not hasattr(model, "score"):
        return False
    try:
        Transformer.check(model)
    except ModelError:
        return False
    return True
