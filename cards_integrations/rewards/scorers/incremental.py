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

from cards_integrations.errors import OutOfMemory, RewardError
from cards_integrations.models.local.resolve import max_positions
from cards_integrations.rewards.base import Conversation, Response, RewardModel, count_forward
from cards_integrations.rewards.classifier import Head
from cards_integrations.rewards.scorers.layout import Layout, scored
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.forward import Output, Transformer
from cards_integrations.transformer.kv_cache import Branch, Tree
from cards_integrations.transformer.kv_memory import CacheNeed, KVMemory, common
from cards_integrations.transformer.step_times import StepTimes, step_times

log = logging.getLogger("cards_integrations")


@dataclass
class ScoredBranch:
    """A scored response in the cache."""

    branch: Branch
    kept: int  # of the branch's own tokens; so many of the first go into the trunk if the response is kept
    path: list[int]  # all tokens up to the end of those
    log_p: list[float] = field(default_factory=list)  # of each of the answer's tokens, where a likelihood is read


@dataclass
class ConversationRow:
    """An open conversation in the cache, and the text and ids around its answer."""

    tree: Tree
    before: str
    after: str
    before_ids: list[int]
    after_ids: list[int]
    log_p: list[float] = field(default_factory=list)  # of each token of the kept answer, where a likelihood is read
    branches: dict[Response, ScoredBranch] = field(default_factory=dict)
    warned_about_window: bool = False


class Incremental(RewardModel):
    """A decoder that reads an answer in its layout; a candidate costs its own tokens and the layout's suffix.

    With the language model's own vocabulary the candidate's ids are read as they are. Otherwise its
    text is tokenized again, and what it shares with the kept tokens is not read again, even where
    the last of them has merged with the first of the candidate. What is longer than the window
    loses the beginning of the prompt.
    """

    across_requests = True

    def __init__(
        self, name: str, model: Any, layout: Layout, same_vocabulary: bool, memory: KVMemory | None = None
    ) -> None:
        self.name = name
        self.model = model
        self.layout = layout
        self.same_vocabulary = same_vocabulary
        self.transformer = Transformer(model, memory)
        self.window = max_positions(model.config)
        self.rows: dict[Conversation, ConversationRow] = {}

    @cached_property
    def step_times(self) -> StepTimes:
        return step_times(self.name, self.model, self.transformer.time)

    def cache_needs(self, conversation: Conversation, tokens: int) -> list[CacheNeed]:
        return [CacheNeed(self.transformer.cache, 1, tokens)]

    def open(self, conversation: Conversation) -> None:
        chat = self.layout.chat
        before, after = self.layout.around(conversation)
        before_ids, after_ids = chat.encode(before, special=self.layout.special), chat.encode(after)
        self.rows[conversation] = ConversationRow(self.transformer.cache.open(), before, after, before_ids, after_ids)

    def close(self, conversation: Conversation) -> None:
        if (row := self.rows.pop(conversation, None)) is not None:
            self.transformer.memory.keep(row.tree)
            self.transformer.cache.close(row.tree)

    async def score(self, responses: Sequence[Response]) -> list[float]:
        self._begin(responses)
        feeds = [self._feed(response) for response in responses]
        found: dict[int, float] = {}
        try:
            for batch in self.transformer.batches(feeds):
                for feed, score in zip(batch, self._run(batch), strict=True):
                    found[id(feed)] = score
        except Exception:
            for feed in feeds:
                feed.branch.tree.drop(feed.branch)
            raise
        return [found[id(feed)] for feed in feeds]

    def _begin(self, responses: Sequence[Response]) -> None:
        """Read the prompts of new answers, so that not each of them reads it again."""
        several = Counter(r.conversation for r in responses if not self.rows[r.conversation].tree.ids)
        answered = {r.conversation for r in responses if r.text}  # others may follow before anything is kept
        feeds = []
        for conversation, n in several.items():
            read = self.rows[conversation]
            prompt = read.before_ids[: self.window - 1]
            if (n > 1 or conversation in answered) and len(prompt) > 1:
                self.transformer.memory.recall(read.tree, prompt)
                if unread := prompt[len(read.tree.ids) :]:
                    feeds.append(ForwardInput(read.tree.branch(), unread, conversation))
        for batch in self.transformer.batches(feeds):
            self._read(batch, self.transformer.hidden(batch))
            for feed in batch:
                feed.branch.tree.keep(feed.branch, len(feed.ids))
                feed.branch.tree.drop(feed.branch)

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

    def _feed(self, response: Response) -> ForwardInput:
        read = self.rows[response.conversation]
        ids, suffix = self._fitting(*self._ids(response, read), response)
        if not read.tree.ids:
            self.transformer.memory.recall(read.tree, ids[: len(ids) - suffix])
        most = len(ids) - max(1, suffix)  # the score is read at the last token
        above = read.branches.get(response.parent) if response.parent else None
        again = 0 if above is None else max(0, len(above.path) - most)  # nothing new, and the last is read again
        if above is not None and again <= above.kept and common(ids, above.path) == len(above.path):
            shared, branch = len(above.path) - again, above.branch.branch(above.kept - again)
        else:
            shared = min(common(ids, read.tree.ids), most)
            branch = read.tree.branch(shared)
        read.branches[response] = ScoredBranch(branch, len(ids) - suffix - shared, ids[: len(ids) - suffix])
        return ForwardInput(branch, ids[shared:], response)

    def _fitting(self, ids: list[int], suffix: int, response: Response) -> tuple[list[int], int]:
        """As much of the end as the window holds: of the prompt's beginning nothing, of the answer all."""
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

    def _ids(self, response: Response, read: ConversationRow) -> tuple[list[int], int]:
        """All ids of the conversation with this answer, and how many of them come after the answer."""
        chat = self.layout.chat
        if self.same_vocabulary and response.ids is not None:
            ids = [*read.before_ids, *response.ids]
        else:
            ids = chat.encode(read.before + response.text, special=self.layout.special)
        whole = [*ids, *read.after_ids] or [chat.tokenizer.pad_token_id]  # something must be read
        return whole, len(whole) - len(ids)

    @abstractmethod
    def _run(self, batch: list[ForwardInput]) -> list[float]:
        """One forward, and the scores of the feeds' owners."""

    def _read(self, batch: list[ForwardInput], rows: list[Output | OutOfMemory]) -> list[Output]:
        """What a forward gave, counted."""
        found = []
        for row in rows:
            if isinstance(row, OutOfMemory):
                raise row
            found.append(row)
        count_forward((_conversation(feed.owner), len(feed.ids)) for feed in batch)
        return found


def _conversation(owner: Response | Conversation) -> Conversation:
    """Whose feed it is: a response's, or that of a prompt which many responses follow."""
    return owner.conversation if isinstance(owner, Response) else owner


class IncrementalClassifier(Incremental):
    """A decoder with a classification head, read at the last token."""

    def __init__(
        self, name: str, model: Any, layout: Layout, head: Head, same_vocabulary: bool, memory: KVMemory | None = None
    ) -> None:
        super().__init__(name, model, layout, same_vocabulary, memory)
        self.head = head
        self.to_logits = model.score.float()  # the last step in full precision: bf16 has three digits
        self.pad = self.transformer.config.pad_token_id

    def _ids(self, response: Response, read: ConversationRow) -> tuple[list[int], int]:
        whole, suffix = super()._ids(response, read)
        read_ids = scored(whole, self.pad)
        return read_ids, max(0, suffix - (len(whole) - len(read_ids)))

    def _run(self, batch: list[ForwardInput]) -> list[float]:
        hidden = self._read(batch, self.transformer.hidden(batch))
        with torch.inference_mode():
            return self.head(self.to_logits(torch.stack([row.value for row in hidden]).float()))
