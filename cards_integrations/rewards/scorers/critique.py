"""A judge that writes before it grades: critiques of finished answers, sampled in a batch of their own.

Each answer has a row of its own, and each critique is a branch of it. Rows are opened and closed within one call; the
text before the answers is copied from row to row, and kept for the next call like any finished text.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from cards_integrations.errors import RewardError
from cards_integrations.models.local.appending import end_of_sequence
from cards_integrations.models.local.drawing import ON_HOST
from cards_integrations.models.local.resolve import max_positions
from cards_integrations.models.randomness import Uniforms
from cards_integrations.models.sampling import Sampler, draw
from cards_integrations.rewards.base import CausalModel, Conversation, Response, RewardModel, count_forward
from cards_integrations.rewards.scorers.rubric import AskedText, Rubric, RubricIds
from cards_integrations.rewards.scorers.verdict import Verdict
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.forward import PREFILL_CHUNK, Output, Transformer, checked
from cards_integrations.transformer.kv_cache import Branch, Tree
from cards_integrations.transformer.kv_memory import CacheNeed
from cards_integrations.transformer.prefix_tree import common

log = logging.getLogger("cards_integrations")


class Critic(NamedTuple):
    """How critiques are sampled."""

    sampler: Sampler
    max_tokens: int
    critiques: int
    """How many of each answer, for each question."""
    seed: int


@dataclass(eq=False)
class Answer:
    """An answer while it is judged, in a row of its own; `before` are the tokens before it."""

    response: Response
    before: list[int]
    text: AskedText
    tree: Tree


@dataclass(eq=False)
class Critique:
    """A critique while it is written, on a branch after its question. `output` belongs to the last token read."""

    response: Response
    branch: Branch
    uniforms: Uniforms
    output: Output
    ids: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def unread(self) -> list[int]:
        """Its tokens that the judge has not read: at most the last one."""
        return self.ids[len(self.branch.ids) :]


class CritiqueJudge(RewardModel):
    """Grades finished answers after critiques that it writes.

    Args:
        name: What errors call the reward.
        causal: The judge.
        rubric: The text around an answer.
        critic: How critiques are sampled.
        lead: The tokens between a critique and the grade.
        verdict: Turns the logits after these into a grade.
        shows_parts: Whether the scores of the criteria are parts of an answer's score.
    """

    across_requests = True

    def __init__(
        self, name: str, causal: CausalModel, rubric: Rubric, critic: Critic, lead: list[int], verdict: Verdict,
        shows_parts: bool,
    ) -> None:  # fmt: skip
        self.name = name
        self.chat = causal.chat
        self.same_vocabulary = causal.same_vocabulary
        self.rubric = rubric
        self.critic = critic
        self.verdict = verdict
        self.shows_parts = shows_parts
        self.replies = [[*lead, *begun] for begun in verdict.beginnings]
        self.transformer = Transformer(causal.model, causal.memory)
        self.window = max_positions(causal.model.config)
        self.eos = end_of_sequence(causal.model, causal.chat.tokenizer)
        self.ids: dict[Conversation, RubricIds] = {}  # of open conversations

    # --- conversations and memory ---

    @property
    def cache_bytes(self) -> int:
        return self.transformer.cache.bytes

    def release(self) -> None:
        self.transformer.release()

    def open(self, conversation: Conversation) -> None:
        ids = self.rubric.ids(conversation, self.same_vocabulary)
        ids.check(self.name)
        self.ids[conversation] = ids

    def close(self, conversation: Conversation) -> None:
        self.ids.pop(conversation, None)

    def cache_needs(self, conversation: Conversation, tokens: int) -> list[CacheNeed]:
        return [CacheNeed(self.transformer.cache, 1, tokens + self._own_columns)]

    def growth(self, responses: Sequence[Response]) -> int:
        cache = self.transformer.cache
        read = [len(self.ids[each.conversation](each)[0]) for each in responses if each.conversation in self.ids]
        columns = sum(cache.row_bytes(tokens + self._own_columns) for tokens in read)
        return columns + (cache.pool.growth(len(responses) * 3 * self._branches) if cache.pool else 0)

    @property
    def _branches(self) -> int:
        """The number of critiques of an answer, times that of the beginnings of grades that are read after each."""
        return len(self.rubric.questions) * self.critic.critiques * len(self.replies)

    @property
    def _own_columns(self) -> int:
        """The most columns of what is read after the questions about an answer."""
        return self._branches * (self.critic.max_tokens + 1 + max(map(len, self.replies))) + 2

    # --- scores ---

    async def score(self, responses: Sequence[Response]) -> list[float]:
        self._check_finished(responses)
        answers: list[Answer] = []
        try:
            for response in responses:
                if (ids := self.ids.get(response.conversation)) is not None:
                    answers.append(self._answer(response, ids))
            critiques = await self._begin(answers)
            await self._write(critiques)
            grades = await self._grades(critiques)
        finally:
            for answer in answers:
                self.transformer.memory.keep(answer.tree)
                self.transformer.cache.close(answer.tree)
        found = dict(zip([answer.response for answer in answers], self._rated(answers, grades), strict=True))
        return [found.get(response, 0.0) for response in responses]  # 0 for those that were given up meanwhile

    def _check_finished(self, responses: Sequence[Response]) -> None:
        if not all(response.finished for response in responses):
            raise RewardError(
                f"reward {self.name!r} writes critiques of finished answers, and this method asks for scores of "
                "unfinished ones: use decoding=BestOfN(...), or guide by another reward and score what was written."
            )

    def _answer(self, response: Response, ids: RubricIds) -> Answer:
        """Open a row for an answer, if the judge's context has room for it and a critique."""
        text = ids.apart(response)
        most = text.longest + self.critic.max_tokens + max(map(len, self.replies))
        long = self.transformer.is_long(len(text.ids))
        window = self.window if long else self.transformer.switch or self.window  # a text is read in one way only
        if most > window:
            raise RewardError(
                f"reward {self.name!r}: the prompt, the answer and a critique of "
                f"max_critique_tokens={self.critic.max_tokens} take {most} tokens, more than the {window} of the "
                "judge's context; use a smaller max_critique_tokens or max_tokens."
            )
        return Answer(response, ids.before_ids, text, self.transformer.cache.open(len(text.ids) + 1, long))

    # --- reading ---

    async def _begin(self, answers: Sequence[Answer]) -> list[Critique]:
        """Read answers and questions, and return the critiques to be written, by answer and then by question."""
        await self._read_prompts(answers)
        texts = [self._unread(answer) for answer in answers]
        await self._read([text for text in texts if text.ids])
        questions = [
            ForwardInput(text.branch.branch(), rest, answer.response)
            for text, answer in zip(texts, answers, strict=True)
            for rest in answer.text.rests
        ]
        numbers = [*range(len(self.rubric.questions))] * len(answers)
        return [
            Critique(asked.owner, asked.branch.branch(), Uniforms(self.critic.seed, number, critique), output)
            for asked, number, output in zip(questions, numbers, await self._read(questions), strict=True)
            for critique in range(self.critic.critiques)
        ]

    async def _read_prompts(self, answers: Sequence[Answer]) -> None:
        """Read the text before the answers, once for each conversation."""
        first: dict[tuple[Conversation, bool], Tree] = {}
        for answer in answers:
            tree, before = answer.tree, answer.before
            known = first.setdefault((answer.response.conversation, tree.long), tree)
            if known is not tree:
                self.transformer.cache.copy(known, tree)
                continue
            self.transformer.memory.recall(tree, before)
            for start in range(len(tree.ids), len(before), PREFILL_CHUNK):
                branch = tree.branch()
                await self._read([ForwardInput(branch, before[start : start + PREFILL_CHUNK], answer.response)])
                tree.keep(branch)
                tree.drop(branch)

    @staticmethod
    def _unread(answer: Answer) -> ForwardInput:
        """Return what is left to read of an answer, whose first token may have merged with the last one before it."""
        tree, ids = answer.tree, answer.text.ids
        known = tree.known(max(0, min(common(ids, tree.ids), len(ids) - 1)))
        return ForwardInput(tree.branch(known), ids[known:], answer.response)

    async def _read(self, inputs: Sequence[ForwardInput]) -> list[Output]:
        """Return the outputs of all inputs; other requests go on between two forwards."""
        found: list[Output] = []
        for batch in self.transformer.batches(inputs):
            found += checked(self.transformer.logits(batch))
            count_forward((each.owner.conversation, len(each.ids)) for each in batch)
            await asyncio.sleep(0)
        return found

    # --- writing ---

    async def _write(self, critiques: Sequence[Critique]) -> None:
        """Sample all critiques, one token of each in a step."""
        writing = [*critiques]
        while writing:
            for critique, token in zip(writing, self._drawn(writing), strict=True):
                critique.ended = token in self.eos
                critique.ids += [] if critique.ended else [token]
            writing = [each for each in writing if not each.ended and len(each.ids) < self.critic.max_tokens]
            inputs = [ForwardInput(each.branch, each.unread, each.response) for each in writing]
            for critique, output in zip(writing, await self._read(inputs), strict=True):
                critique.output = output
        for each in critiques:
            log.debug("reward %r: %r on %r", self.name, self.chat.decode(each.ids), each.response.text)

    @torch.inference_mode()
    def _drawn(self, critiques: Sequence[Critique]) -> list[int]:
        """Draw the next token of each critique."""
        logits = torch.stack([each.output.value for each in critiques])
        logits = logits.cpu() if logits.device.type in ON_HOST else logits
        uniforms = [each.uniforms[len(each.ids)] for each in critiques]
        samplers = [self.critic.sampler] * len(critiques)
        tokens: list[int] = draw(samplers, logits, range(len(critiques)), uniforms).tolist()
        return tokens

    async def _grades(self, critiques: Sequence[Critique]) -> list[float]:
        """Return the grade after each critique."""
        inputs = [
            ForwardInput(each.branch.branch(), [*each.unread, *reply], each.response, outputs=len(begun) + 1)
            for each in critiques
            for reply, begun in zip(self.replies, self.verdict.beginnings, strict=True)
        ]
        outputs = await self._read(inputs)
        with torch.inference_mode():
            return self.verdict.read([output.values for output in outputs])

    def _rated(self, answers: Sequence[Answer], grades: Sequence[float]) -> list[float]:
        """Return the scores of answers from the grades of all their critiques."""
        several, questions = self.critic.critiques, len(self.rubric.questions)
        means = [sum(grades[i : i + several]) / several for i in range(0, len(grades), several)]
        found = []
        for i, answer in enumerate(answers):
            found.append(self.rubric.rate(answer.response, means[i * questions :][:questions], self.shows_parts))
        return found
