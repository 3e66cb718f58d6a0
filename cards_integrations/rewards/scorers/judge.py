"""A language model as judge: what it could reply to questions about an answer, which it reads once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch

from cards_integrations.rewards.base import CausalModel, Conversation, Response
from cards_integrations.rewards.scorers.conversation_row import ConversationRow, FittedText, Reading
from cards_integrations.rewards.scorers.incremental import Incremental
from cards_integrations.rewards.scorers.rubric import Rubric, RubricIds
from cards_integrations.rewards.scorers.verdict import Tokens, Verdict
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.forward import Output


class IncrementalJudge(Incremental):
    """Reads an answer and what all questions share, and then the rest of each question on a branch of its own.

    Args:
        name: What errors call the reward.
        causal: The judge.
        rubric: What is read around an answer.
        verdict: What is made of the judge's next tokens.
        shows_parts: Whether the scores of the criteria are parts of an answer's score.
    """

    def __init__(self, name: str, causal: CausalModel, rubric: Rubric, verdict: Verdict, shows_parts: bool) -> None:
        super().__init__(name, causal.model, rubric, causal.same_vocabulary, causal.memory)
        self.rubric = rubric
        self.verdict = verdict
        self.shows_parts = shows_parts
        self.single = len(rubric.questions) == len(verdict.beginnings) == 1
        self._rests: WeakKeyDictionary[Response, list[list[int]]] = WeakKeyDictionary()  # of what is to be scored

    def open(self, conversation: Conversation) -> None:
        ids = self.rubric.ids(conversation, self.same_vocabulary, self.verdict.beginnings)
        if not self.single or self.verdict.beginnings[0]:
            ids.check(self.name)
        tree = self.transformer.cache.open(self._columns(ids.before_ids))
        self.rows[conversation] = ConversationRow(tree, ids.before_ids, ids)

    def growth(self, responses: Sequence[Response]) -> int:
        paths = len(self.rubric.questions) * len(self.verdict.beginnings) if self.transformer.recurrent else 1
        return super().growth([*responses] * paths)  # each path has a state

    def _fitted(self, response: Response) -> FittedText:
        """As for the longest question alone: those beside it are on branches of their own."""
        ids = self.rows[response.conversation].answer_ids
        assert isinstance(ids, RubricIds)
        text = ids.apart(response)
        if not self.single:
            self._rests[response] = text.rests
        cut, whole = self._cut(text.longest, response), text.whole
        reading = Reading(cut, self.transformer.is_long(text.longest - cut))
        return FittedText(whole[cut:], len(whole) - text.answered, reading)

    def _score_batch(self, batch: list[ForwardInput]) -> list[float]:
        outputs = self._read_whole(batch) if self.single else self._read_apart(batch)
        with torch.inference_mode():
            found = self.verdict.read([output.values for output in outputs])
        questions = len(found) // len(batch)
        return [
            self.rubric.rate(each.owner, found[i * questions :][:questions], self.shows_parts)
            for i, each in enumerate(batch)
        ]

    def _read_whole(self, batch: list[ForwardInput]) -> list[Output]:
        """A single question with a single beginning of replies: one forward reads it with the answer."""
        outputs = len(self.verdict.beginnings[0]) + 1
        inputs = [ForwardInput(each.branch, each.ids, each.owner, outputs) for each in batch]
        return self._counted(inputs, self.transformer.logits(inputs))

    def _read_apart(self, batch: list[ForwardInput]) -> list[Output]:
        """A forward of the answers and what all questions share, and one of the rest of each question."""
        rests = [self._rests.pop(each.owner) for each in batch]
        shared = [
            ForwardInput(each.branch, each.ids[: len(each.ids) - sum(map(len, own))], each.owner)
            for each, own in zip(batch, rests, strict=True)
        ]
        if shared := [each for each in shared if each.ids]:
            self._counted(shared, self.transformer.hidden(shared))
        begun: Sequence[Tokens] = [*self.verdict.beginnings] * len(self.rubric.questions)
        inputs = [
            ForwardInput(each.branch.branch(), rest, each.owner, len(reply) + 1)
            for each, own in zip(batch, rests, strict=True)
            for rest, reply in zip(own, begun, strict=True)
        ]
        try:
            return self._counted(inputs, self.transformer.logits(inputs))
        finally:
            for each in inputs:
                each.branch.tree.drop(each.branch)
