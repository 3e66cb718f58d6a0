"""Decoders that score a candidate by its new tokens only: the kept answer stays in a KV cache."""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from cards_integrations.errors import CardsError, ModelError, RewardError
from cards_integrations.models.local.resolve import max_positions
from cards_integrations.rewards.base import Conversation, Response, RewardModel, count_forward
from cards_integrations.rewards.scorers.answer_ids import AnswerIds
from cards_integrations.rewards.scorers.conversation_row import ConversationRow, FittedText, Reading, ScoredBranch
from cards_integrations.rewards.scorers.head import Head
from cards_integrations.rewards.scorers.input_format import InputFormat, without_final_padding
from cards_integrations.transformer.exact import check_exact
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.forward import PREFILL_CHUNK, Output, Transformer, checked
from cards_integrations.transformer.kv_cache import Branch, Tree
from cards_integrations.transformer.kv_memory import CacheNeed, KVMemory, first_to_read
from cards_integrations.transformer.prefix_tree import common
from cards_integrations.transformer.step_times import StepTimes, step_times

log = logging.getLogger("cards_integrations")


class Incremental(RewardModel):
    """A decoder that reads prompt and answer as one text; a candidate costs its own tokens and what follows it.

    With the language model's own vocabulary, the ids of an unfinished candidate are read as they are. Otherwise its
    text is tokenized again, and only what differs from the kept tokens is read: the last of these may merge with the
    first of the candidate. Of a text that is longer than the window, the beginning of the prompt is not read.

    Args:
        name: What errors call the reward.
        model: The transformers model.
        input_format: The text around an answer.
        same_vocabulary: Whether its token ids are the language model's.
        memory: The budget of the KV caches of all models of the engine.
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
        self._preempted: dict[Conversation, ConversationRow] = {}
        self._turn = asyncio.Lock()  # one call of `score` at a time

    @cached_property
    def step_times(self) -> StepTimes:
        return step_times(self.name, self.model, self.transformer.time)

    @property
    def cache_bytes(self) -> int:
        return self.transformer.cache.bytes

    def release(self) -> None:
        self.transformer.release()

    def cache_needs(self, conversation: Conversation, tokens: int) -> list[CacheNeed]:
        row = self.rows.get(conversation)
        outgrows = self.transformer.is_long(tokens) and not (row and row.tree.long)
        return [CacheNeed(self.transformer.cache, 1, tokens + (self.transformer.switch if outgrows else 0))]

    def open(self, conversation: Conversation) -> None:
        form = self.input_format
        ids = AnswerIds(form.chat, form.around(conversation), form.adds_special_tokens, self.same_vocabulary)
        tree = self.transformer.cache.open(self._columns(ids.before_ids))
        self.rows[conversation] = ConversationRow(tree, ids.before_ids, ids)

    def _columns(self, ids: Sequence[int]) -> int:
        """Return the columns of a row in which these tokens are read first."""
        return min(len(ids), self.window) + 1

    def growth(self, responses: Sequence[Response]) -> int:
        more: dict[Tree, int] = {}
        reread: list[ConversationRow] = []
        for response in responses:
            if (row := self.rows.get(response.conversation)) is None:
                continue
            ids, _ = self._ids(response, row)
            known = max(len(row.tree.ids), len(row.before_ids) if row.tree in more else 0)
            new = len(ids) - known if len(ids) <= self.window else self.window
            if self.transformer.is_long(len(ids)) != row.tree.long and row not in reread:
                reread.append(row)
                new += len(row.tree.ids)
            more[row.tree] = more.get(row.tree, 0) + max(0, new) + 1  # the last known one may be read again
        return self.transformer.cache.growth(more, 2 * len(responses))

    def preempt(self, conversation: Conversation) -> None:
        if (row := self.rows.pop(conversation, None)) is not None:
            self.transformer.cache.close(row.tree)
            self._preempted[conversation] = row

    def resume(self, conversation: Conversation) -> None:
        if (row := self._preempted.pop(conversation, None)) is not None:
            known = row.tree.ids or row.known_ids
            self.rows[conversation] = row.again(self.transformer.cache.open(self._columns(known)), known)

    def close(self, conversation: Conversation) -> None:
        self._preempted.pop(conversation, None)
        if (row := self.rows.pop(conversation, None)) is not None:
            self.transformer.memory.keep(row.tree)
            self.transformer.cache.close(row.tree)

    async def score(self, responses: Sequence[Response]) -> list[float]:
        async with self._turn:  # other requests go on between two forwards, and may ask for scores, too
            texts = {response: self._fitted(response) for response in responses if response.conversation in self.rows}
            await self._read_prompts(texts)
            await self._read_again(texts)
            inputs = [self._forward_input(r, text) for r, text in texts.items() if r.conversation in self.rows]
            found: dict[Response, float] = {}
            try:
                inputs = [await self._shortened(each) for each in inputs]
                for number, batch in enumerate(self.transformer.batches(inputs)):
                    if number:
                        await asyncio.sleep(0)
                    if asked := [each for each in batch if self._is_asked(each.owner)]:
                        found |= zip((each.owner for each in asked), self._scores(asked, texts), strict=True)
            except Exception:
                for each in inputs:
                    each.branch.tree.drop(each.branch)
                raise
            return [found.get(response, 0.0) for response in responses]  # 0 for those that were given up meanwhile

    async def _shortened(self, item: ForwardInput) -> ForwardInput:
        """Read a long answer up to its last piece, which is returned; other requests go on in between."""
        while len(item.ids) - item.outputs > PREFILL_CHUNK and self._is_asked(item.owner):
            piece = ForwardInput(item.branch, item.ids[:PREFILL_CHUNK], item.owner)
            self._counted([piece], self.transformer.hidden([piece]))
            item = replace(item, ids=item.ids[PREFILL_CHUNK:])
            await asyncio.sleep(0)
        return item

    def _scores(self, batch: list[ForwardInput], texts: Mapping[Response, FittedText]) -> list[float]:
        """Score a batch. With recurrent layers, read the suffixes after answers on branches that are dropped again."""
        if not self.transformer.recurrent:
            return self._score_batch(batch)
        suffixes = [texts[each.owner].suffix for each in batch]
        answers = [
            ForwardInput(each.branch, each.ids[: len(each.ids) - suffix], each.owner)
            for each, suffix in zip(batch, suffixes, strict=True)
            if len(each.ids) > suffix > 0
        ]
        self._counted(answers, self.transformer.hidden(answers))
        tails = [
            ForwardInput(each.branch.branch(), each.ids[-suffix:], each.owner) if suffix else each
            for each, suffix in zip(batch, suffixes, strict=True)
        ]
        try:
            return self._score_batch(tails)
        finally:
            for tail in tails:
                if tail not in batch:
                    tail.branch.tree.drop(tail.branch)

    def _is_asked(self, response: Response) -> bool:
        """False if a response has been given up meanwhile."""
        row = self.rows.get(response.conversation)
        return row is not None and response in row.branches

    async def _read_prompts(self, texts: Mapping[Response, FittedText]) -> None:
        """Read prompts of new conversations first, so that not every answer reads them again."""
        waiting = self._new_prompts(texts)
        while waiting:
            chosen = self._recalled(waiting)
            known = {each: len(self.rows[each].tree.ids) for each in chosen}
            await self._read_in_pieces({each: waiting[each][known[each] :] for each in chosen})
            waiting = {each: ids for each, ids in waiting.items() if each in self.rows and each not in known}

    def _new_prompts(self, texts: Mapping[Response, FittedText]) -> dict[Conversation, list[int]]:
        """Return the prompts to be read first, as far as they fit, of conversations of which nothing was read."""
        answers = Counter(r.conversation for r in texts if not self.rows[r.conversation].tree.ids)
        answered = {r.conversation for r in texts if r.text}  # more answers may follow before one is kept
        prompts = {}
        for conversation in answers:
            row = self.rows[conversation]
            row.begin(min(text.reading for response, text in texts.items() if response.conversation is conversation))
            prompts[conversation] = (row.known_ids or row.before_ids[row.cut :])[: self.window - 1]
        several = {each for each, n in answers.items() if n > 1} | answered | self._shared(prompts)
        long = {each for each, prompt in prompts.items() if len(prompt) > PREFILL_CHUNK}
        return {each: prompt for each, prompt in prompts.items() if each in several | long and len(prompt) > 1}

    def _shared(self, prompts: Mapping[Conversation, list[int]]) -> set[Conversation]:
        """Return the first conversation of each group whose common prefix is long enough to be shared."""
        alike: dict[tuple[int, ...], list[Conversation]] = {}
        least = self.transformer.cache.min_shared
        for conversation, prompt in prompts.items():
            if least is not None and len(prompt) > least:
                alike.setdefault(tuple(prompt[:least]), []).append(conversation)
        return {conversations[0] for conversations in alike.values() if len(conversations) > 1}

    def _recalled(self, prompts: Mapping[Conversation, list[int]]) -> list[Conversation]:
        """Fill rows with what is known of their prompts, and return those to read now; others can soon reuse these."""
        for conversation, prompt in prompts.items():
            self.transformer.memory.recall(self.rows[conversation].tree, prompt)
        if self.transformer.recurrent:
            return [*prompts]  # a prompt can be reused only as a whole
        unknown = [each for each in prompts if not self.rows[each].tree.ids]
        first = {unknown[index] for index in first_to_read([prompts[each] for each in unknown])}
        return [each for each in prompts if each in first or each not in unknown]

    async def _read_in_pieces(self, unread: dict[Conversation, list[int]]) -> None:
        unread = {each: rest for each, rest in unread.items() if rest}
        while unread:
            self._read_pieces(unread)
            unread = {each: rest for each, rest in unread.items() if rest}
            if unread:
                await asyncio.sleep(0)
                unread = {each: rest for each, rest in unread.items() if each in self.rows}

    def _read_pieces(self, unread: dict[Conversation, list[int]]) -> None:
        """Run one forward over as much of these prompts, in their order, as fits into it."""
        inputs, left = [], PREFILL_CHUNK
        for conversation, rest in unread.items():
            if left:
                inputs.append(ForwardInput(self.rows[conversation].tree.branch(), rest[:left], conversation))
                del rest[:left]
                left -= len(inputs[-1].ids)
        self._counted(inputs, self.transformer.hidden(inputs))
        for each in inputs:
            each.branch.tree.keep(each.branch, len(each.ids))
            each.branch.tree.drop(each.branch)

    async def _read_again(self, texts: Mapping[Response, FittedText]) -> None:
        """Read the kept text again for answers that need it cut or read otherwise, as they are too long."""
        for response, text in texts.items():
            row, reading = self.rows.get(response.conversation), text.reading
            if row is None or reading in row.reread or reading.cut < row.cut or reading == row.reading:
                continue
            if kept := row.tree.ids[reading.cut - row.cut :]:
                branch = row.reread[reading] = row.tree.branch(0, reading.long)
                batch = [ForwardInput(branch, kept, response.conversation)]
                self._counted(batch, self.transformer.hidden(batch))
                await asyncio.sleep(0)

    def _recall(self, row: ConversationRow, ids: list[int], reading: Reading) -> None:
        """Fill an empty row with the longest known prefix of a text."""
        row.cut, row.tree.long = reading
        self.transformer.memory.recall(row.tree, ids)

    def keep(self, response: Response) -> None:
        if (scored := self._forget(response)) is not None:
            self.rows[response.conversation].keep(scored)

    def drop(self, response: Response) -> None:
        if (scored := self._forget(response)) is not None:
            scored.branch.tree.drop(scored.branch)
            self.rows[response.conversation].drop_outdated()

    def _forget(self, response: Response) -> ScoredBranch | None:
        row = self.rows.get(response.conversation)
        return row.branches.pop(response, None) if row else None

    def _forward_input(self, response: Response, text: FittedText) -> ForwardInput:
        """Return what must be read to score a response, on a new branch."""
        row, (ids, suffix, reading) = self.rows[response.conversation], text
        if not row.tree.ids:
            self._recall(row, ids[: len(ids) - suffix], reading)
        root, known, branch = self._start(row, response, text)
        path = ids[: len(ids) - suffix]
        row.branches[response] = ScoredBranch(branch, reading.cut, root, len(path) - known, path)
        return ForwardInput(branch, ids[known:], response, self._outputs(response, text))

    def _start(self, row: ConversationRow, response: Response, text: FittedText) -> tuple[Branch | None, int, Branch]:
        """Make a branch for a response, from the response that it continues if that can be, or else from the trunk.

        Returns:
            See `ConversationRow.leave`.
        """
        most = self._known_before(response, text)
        parent = row.branches.get(response.parent) if response.parent else None
        if parent is not None and common(text.ids, parent.path) == len(parent.path):
            again = max(0, len(parent.path) - most)  # with nothing new, its last token is read again
            if parent.branch.long == text.reading.long and parent.can_go_on(again):
                return parent.root, len(parent.path) - again, parent.branch.branch(parent.kept - again)
        return row.leave(text, most)

    def _known_before(self, response: Response, text: FittedText) -> int:
        """Return how many ids at most may be known already: the last must be read, as the score is computed there."""
        return len(text.ids) - max(1, text.suffix)

    def _outputs(self, response: Response, text: FittedText) -> int:
        """Return how many of the last tokens need an output."""
        return 1

    def _fitted(self, response: Response) -> FittedText:
        """Return what is read of a conversation with this answer."""
        ids, suffix = self._ids(response, self.rows[response.conversation])
        cut = self._cut(len(ids), response)
        return FittedText(ids[cut:], suffix, Reading(cut, self.transformer.is_long(len(ids) - cut)))

    def _cut(self, length: int, response: Response) -> int:
        """Return how many of the first ids are left out: only the prompt may lose its beginning.

        They are a multiple of a quarter of the window, so that what was read can be used for a while. They depend on
        the length alone, so that a text has one score, however it was written.

        Raises:
            RewardError: The answer alone exceeds the window.
        """
        surplus = length - self.window
        if surplus <= 0:
            return 0
        row = self.rows[response.conversation]
        prompt, step = len(row.before_ids), max(1, self.window // 4)
        if surplus >= prompt:
            raise RewardError(
                f"reward {self.name!r}: the answer takes {length - prompt} tokens, more than the {self.window} of "
                "its window; use a smaller max_tokens."
            )
        if not row.warned_about_window:
            log.warning("reward %r does not read the first tokens of a prompt: its window is full", self.name)
            row.warned_about_window = True
        return min(-(-surplus // step) * step, prompt - 1)

    def _ids(self, response: Response, row: ConversationRow) -> tuple[list[int], int]:
        """Return all ids of the conversation with this answer, and how many of them come after the answer."""
        assert row.answer_ids is not None
        return row.answer_ids(response)

    @abstractmethod
    def _score_batch(self, batch: list[ForwardInput]) -> list[float]:
        """Run one forward, and return the scores of the responses in it."""

    def _counted(self, batch: list[ForwardInput], outputs: list[Output | CardsError]) -> list[Output]:
        """Count a forward, and return its outputs or raise the first error among them."""
        found = checked(outputs)
        count_forward((_conversation(each.owner), len(each.ids)) for each in batch)
        return found


def _conversation(owner: Response | Conversation) -> Conversation:
    """Return the conversation of an input, which belongs to one response or to a prompt."""
    return owner.conversation if isinstance(owner, Response) else owner


class IncrementalClassifier(Incremental):
    """A decoder with a classification head, read at the last token."""

    def __init__(
        self, name: str, model: Any, input_format: InputFormat, head: Head, same_vocabulary: bool,
        memory: KVMemory | None = None,
    ) -> None:  # fmt: skip
        super().__init__(name, model, input_format, same_vocabulary, memory)
        self.head = head
        self.to_logits = model.score.float()  # full precision for the last step: bfloat16 has three digits
        self.padding = self.transformer.config.pad_token_id

    def _ids(self, response: Response, row: ConversationRow) -> tuple[list[int], int]:
        whole, suffix = super()._ids(response, row)
        ids = without_final_padding(whole, self.padding)
        return ids, max(0, suffix - (len(whole) - len(ids)))

    def _score_batch(self, batch: list[ForwardInput]) -> list[float]:
        outputs = self._counted(batch, self.transformer.hidden(batch))
        with torch.inference_mode():
            logits = self.to_logits(torch.stack([output.value for output in outputs]).float())
            return self._combined([each.owner for each in batch], logits)

    def _combined(self, responses: Sequence[Response], logits: torch.Tensor) -> list[float]:
        """The scores of responses, from logits (responses, labels)."""
        return self.head.score(responses, logits)


def reads_incrementally(model: Any) -> bool:
    """Return True for a decoder with a head whose hidden states over trees are those of plain forwards."""
    if not hasattr(model, "score"):
        return False
    try:
        check_exact(model)
    except ModelError:
        return False
    return True
