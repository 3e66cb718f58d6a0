"""The local language model: all candidates of all live requests in one running batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from cards_integrations.chat.grammar import Grammar, GrammarTokenizer, Matcher
from cards_integrations.chat.stop_strings import StopStrings
from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.errors import CardsError, OutOfMemory
from cards_integrations.models.base import Boundary, Candidate, Context
from cards_integrations.models.local.resolve import max_positions
from cards_integrations.models.randomness import Uniforms
from cards_integrations.models.sampling import Sampler
from cards_integrations.trace import Usage
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.forward import PREFILL_CHUNK, Output, Transformer
from cards_integrations.transformer.kv_cache import Branch, Tree
from cards_integrations.transformer.kv_memory import CacheNeed, KVMemory, first_to_read
from cards_integrations.transformer.step_times import StepTimes, least_seconds, step_times

LONG = 96  # tokens from which on a candidate does not share a row


@dataclass(eq=False)
class _Tip:
    """Where a path ends, the kept text's or a candidate's.

    `unread` are its last tokens, which the model has not seen yet; once it has, `logits` follow, and
    the candidates that are `waiting` go on from here.
    """

    branch: Branch
    owner: Candidate | None = None
    own_row: bool = False
    unread: list[int] = field(default_factory=list)
    logits: Output | None = None
    waiting: list[Candidate] = field(default_factory=list)


class LocalLanguageModel:
    """A transformers causal model behind the `LanguageModel` protocol."""

    def __init__(self, model: Any, chat: ChatTokenizer, name: str, memory: KVMemory | None = None) -> None:
        self.name = name
        self.model = model
        self.chat = chat
        self.transformer = Transformer(model, memory)
        self.memory = self.transformer.memory
        self.context_window = max_positions(model.config)
        self.eos = _end_of_sequence(model, chat.tokenizer)
        self.contexts: list[Context] = []
        self.ready: list[Candidate] = []  # have logits
        self.failed: dict[Context, CardsError] = {}
        self.steps = 0  # forwards that carried at least one candidate

    def cache_needs(self, tokens: int) -> list[CacheNeed]:
        return [CacheNeed(self.transformer.cache, 1, tokens)]

    def open(self, context: Context) -> None:
        """Give a context a row; its prompt is read when a candidate needs it."""
        context.state = _Tip(self.transformer.cache.open().branch(), unread=list(context.prompt_ids))
        self.contexts.append(context)

    def close(self, context: Context) -> None:
        """Free the row. Its candidates have been given up."""
        if context.state is not None:
            self.contexts.remove(context)
            self.memory.keep(context.state.branch.tree)
            self.transformer.cache.close(context.state.branch.tree)
            context.state = None

    @cached_property
    def grammars(self) -> GrammarTokenizer:
        return GrammarTokenizer(self.chat.tokenizer, self.model.get_output_embeddings().weight.shape[0], self.eos)

    def matcher(self, grammar: Grammar) -> Matcher:
        return self.grammars.matcher(grammar)

    def begin(self, candidate: Candidate) -> None:
        origin = candidate.parent or candidate.context
        candidate.state = origin.state
        candidate.matcher = origin.matcher and origin.matcher.fork()
        self._go_on(candidate)

    def _go_on(self, candidate: Candidate) -> None:
        """Let a candidate have its next token, as soon as there are logits for it."""
        tip: _Tip = candidate.state
        if tip.unread:
            tip.waiting.append(candidate)
            return
        if tip.owner is not candidate:
            branch = self._branch(tip.branch, candidate)
            own_row = branch.tree is not tip.branch.tree
            candidate.state = _Tip(branch, candidate, own_row, logits=tip.logits)
        self.ready.append(candidate)

    def _branch(self, origin: Branch, candidate: Candidate) -> Branch:
        """A long candidate gets a row of its own: in a shared one it would read its siblings' columns, masked."""
        cache, columns = self.transformer.cache, origin.length + candidate.remaining_tokens
        short = candidate.remaining_tokens <= LONG or candidate.index == 0 or candidate.parent is not None
        if short or not self.memory.admits([CacheNeed(cache, 1, columns)]):
            return origin.branch()
        row = cache.open()
        cache.copy(origin.tree, row)
        return row.branch()

    def vacancies(self, context: Context, boundary: Boundary) -> int:
        """For how many more candidates there is memory."""
        tree: Tree = context.state.branch.tree
        cache = self.transformer.cache
        longest = min(boundary.max_tokens, context.max_tokens)
        if longest > LONG:
            row = cache.bytes_with(0, len(tree.ids) + longest) // cache.rows
            return self.memory.spare // max(1, row)
        return (cache.columns_within(self.memory.spare_columns) - tree.taken) // longest

    def drop(self, candidate: Candidate) -> None:
        """Give up a candidate, finished or not."""
        tip: _Tip | None = candidate.state
        candidate.state = None
        if tip is None or candidate.context.state is None:
            return
        if candidate in tip.waiting:
            tip.waiting.remove(candidate)
        if tip.owner is candidate:
            self._free(tip, row=tip.own_row)

    def _free(self, tip: _Tip, row: bool) -> None:
        """Free a branch, or the row that was opened for it."""
        if row:
            self.transformer.cache.close(tip.branch.tree)
        else:
            tip.branch.tree.drop(tip.branch)

    def keep(self, candidate: Candidate) -> None:
        """Make a finished candidate part of its context; the logits after it are carried over."""
        context, old, tip = candidate.context, candidate.context.state, candidate.state
        tip.branch.tree.keep(tip.branch)
        if tip.logits is not None:
            tip.logits = Output(tip.logits.value[None].clone(), 0)  # or those of its whole batch stay as long
        context.state, tip.own_row = tip, False
        self._free(old, row=old.branch.tree is not tip.branch.tree)
        context.matcher = candidate.matcher
        context.ids += candidate.ids
        context.text = candidate.response

    def sample(self) -> list[Candidate]:
        """Give each candidate with logits its next token, or end it; returns those that ended."""
        groups: dict[tuple[Boundary, Sampler], list[Candidate]] = {}  # alike in sampler and boundary
        for candidate in self.ready:
            if candidate.state is not None:
                groups.setdefault((candidate.boundary, candidate.context.sampler), []).append(candidate)
        self.ready = []
        ended: list[Candidate] = []
        for (boundary, sampler), group in groups.items():
            ended += self._sample(boundary, sampler, group)
        return ended

    @torch.inference_mode()
    def _sample(self, boundary: Boundary, sampler: Sampler, group: list[Candidate]) -> list[Candidate]:
        logits, rows = _stacked([c.state.logits for c in group])
        uniforms = torch.tensor([c.uniforms[len(c.ids)] for c in group], dtype=torch.float64, device=logits.device)
        at = torch.tensor(rows, device=logits.device)
        tokens, forced = self._tokens(sampler, group, logits, at, uniforms)
        log_p = logits.float().log_softmax(-1)
        asked = [i for i, c in enumerate(group) if len(c.ids) >= boundary.min_tokens and i not in forced]
        which = [rows[i] for i in asked]
        rises = boundary.ends_before(logits, log_p, which) if asked else None
        log_p = log_p[at, tokens]
        drawn = [tokens.double(), log_p.double(), *([] if rises is None else [rises.double()])]
        numbers, n = torch.cat(drawn).tolist(), len(group)  # the one transfer of a step
        ids, gains = map(int, numbers[:n]), numbers[n : 2 * n]
        risen = {i for i, rise in zip(asked, numbers[2 * n :], strict=False) if rise}
        ended = []
        for i, (candidate, token, gain) in enumerate(zip(group, ids, gains, strict=True)):
            if i in risen:
                self._read(candidate)  # ends before this token; its logits stay for whoever comes next
                ended.append(candidate)
                continue
            candidate.context.usage.drafted_tokens += 1
            if token in self.eos:
                candidate.finish = "length" if candidate.matcher is not None and candidate.matcher.closed else "stop"
                candidate.end_log_p = gain
                self._read(candidate)
                ended.append(candidate)
                continue
            candidate.log_likelihood += gain
            candidate.ids.append(token)
            candidate.state.logits, candidate.state.unread = None, [token]
            if self._ends_after(candidate):
                ended.append(candidate)
            else:
                candidate.state.waiting.append(candidate)
        return ended

    def _tokens(
        self, sampler: Sampler, group: list[Candidate], logits: torch.Tensor, at: torch.Tensor, uniforms: torch.Tensor
    ) -> tuple[torch.Tensor, set[int]]:
        """A token for each candidate, and which of them had no choice."""
        bound = {i: c.matcher for i, c in enumerate(group) if c.matcher is not None}
        if not bound:
            return self._drawn(sampler, group, logits, at, uniforms), set()
        allowed = self.grammars.allowed(list(bound.values()))
        for (i, matcher), row in zip(bound.items(), allowed, strict=True):
            if group[i].closing and self.grammars.close(row):
                matcher.closed = True
        forced = {i for i, n in zip(bound, allowed.sum(-1).tolist(), strict=True) if n == 1}
        which = torch.tensor(list(bound), device=logits.device)
        masked = logits[at[which]].masked_fill(~allowed.to(logits.device), -torch.inf)
        at = at.clone()
        at[which] = len(logits) + torch.arange(len(which), device=logits.device)
        return self._drawn(sampler, group, torch.cat([logits, masked]), at, uniforms), forced

    @staticmethod
    def _drawn(
        sampler: Sampler, group: list[Candidate], logits: torch.Tensor, at: torch.Tensor, uniforms: torch.Tensor
    ) -> torch.Tensor:
        """The sampler's tokens, but for those that begin with the token of a rank."""
        tokens = sampler(logits, at, uniforms)
        for i, candidate in enumerate(group):
            if candidate.rank is not None and not candidate.ids:
                allowed = int(logits[at[i]].isfinite().sum())
                candidate.rank = min(candidate.rank, allowed - 1)
                tokens[i] = logits[at[i]].topk(candidate.rank + 1).indices[-1]
        return tokens

    def _ends_after(self, candidate: Candidate) -> bool:
        context, boundary, matcher = candidate.context, candidate.boundary, candidate.matcher
        if matcher is not None:
            matcher.take(candidate.ids[-1])
            if matcher.complete:
                candidate.finish = "length" if matcher.closed else "stop"
                self._read(candidate)
                return True
        full = candidate.remaining_tokens <= 0
        if full or context.stop or boundary.reads_text:
            self._read(candidate)
        if context.stop:
            at = context.stop.find(candidate.response, len(candidate.before_text))
            if at is not None:
                candidate.response, candidate.whole, candidate.finish = candidate.response[:at], False, "stop"
                return True
        if full and candidate.end >= context.max_tokens:
            candidate.finish = "length"
        asked = boundary.reads_text and len(candidate.ids) >= boundary.min_tokens
        own = candidate.response[len(candidate.before_text) :]  # with half a character at its end, unlike its text
        return full or (asked and boundary.ends_after(own))

    def _read(self, candidate: Candidate) -> None:
        candidate.response = self.decode([*candidate.before, *candidate.ids])

    def unread(self, candidates: Iterable[Candidate]) -> dict[_Tip, Context]:
        """What must be read for their next token.

        That is a candidate's own last token, or the prompt it waits for, or the last token of a
        segment that ended by its length.
        """
        return {c.state: c.context for c in candidates if c.state is not None and c.state.unread and c.state.waiting}

    def forward(self, candidates: Iterable[Candidate]) -> None:
        """Read it; of long prompts a piece, so that the others take a step between the pieces."""
        unread = self._recalled(self.unread(candidates))
        feeds = [
            ForwardInput(tip.branch, tip.unread[:PREFILL_CHUNK], (tip, context)) for tip, context in unread.items()
        ]
        step = [feed for feed in feeds if len(feed.ids) == 1]
        for batch in self.transformer.batches([feed for feed in feeds if len(feed.ids) > 1]):
            self._run(batch)
        if step:
            self._run(step)
            self.steps += 1

    def _recalled(self, unread: dict[_Tip, Context]) -> dict[_Tip, Context]:
        """Without what was read before, or is being read now, for another request."""
        fresh = [tip for tip, context in unread.items() if tip is context.state and not tip.branch.tree.ids]
        for tip in fresh:
            tree = tip.branch.tree
            self.memory.recall(tree, tip.unread)
            if tree.ids:
                tree.drop(tip.branch)
                tip.branch = tree.branch()
                del tip.unread[: len(tree.ids)]
                unread[tip].usage.cached_tokens += len(tree.ids)
        unknown = [tip for tip in fresh if not tip.branch.tree.ids]
        first = {unknown[index] for index in first_to_read([tip.unread for tip in unknown])}
        return {tip: context for tip, context in unread.items() if tip in first or tip not in unknown}

    def _run(self, feeds: Sequence[ForwardInput]) -> None:
        """One forward; tips that have nothing unread any more get their logits."""
        served = {}
        for feed, logits in zip(feeds, self.transformer.logits(feeds), strict=True):
            tip, context = feed.owner
            if isinstance(logits, OutOfMemory):
                self.failed[context] = logits
                continue
            del tip.unread[: len(feed.ids)]
            if tip is context.state:
                tip.branch.tree.keep(tip.branch)
            if not tip.unread:
                tip.logits = logits
                waiting, tip.waiting = tip.waiting, []
                for candidate in waiting:
                    self._go_on(candidate)
            context.usage.lm_tokens += len(feed.ids)
            served[id(context)] = context.usage
        for usage in served.values():
            usage.lm_forwards += 1

    def read(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
        """The logits before each token of an answer, (tokens, vocabulary)."""
        tree = self.transformer.cache.open()
        try:
            [row] = self.transformer.logits([ForwardInput(tree.branch(), [*prompt_ids, *ids], outputs=len(ids) + 1)])
        finally:
            self.transformer.cache.close(tree)
        if isinstance(row, OutOfMemory):
            raise row
        return row.values[:-1].float()

    @cached_property
    def times(self) -> StepTimes:
        """Seconds of a step, sampling included, by its number of candidates."""
        return step_times("drafting", self.model, self._time)

    def _time(self, candidates: int) -> float:
        aside = LocalLanguageModel(self.model, self.chat, self.name)
        aside.eos = set()
        context = Context("", [0] * 32, 64, Sampler(), StopStrings(), Usage())
        aside.open(context)
        begun = [Candidate(context, _Long(), Uniforms(0, 0, i), i) for i in range(candidates)]
        for candidate in begun:
            aside.begin(candidate)

        def step() -> None:
            aside.forward(begun)
            aside.sample()

        return least_seconds(step, self.model.device)

    def reset(self) -> None:
        """Forget every row, after an error in the middle of a forward."""
        for context in list(self.contexts):
            context.state = None
        self.contexts, self.ready = [], []
        old = self.transformer.cache
        self.transformer = Transformer(self.model, self.memory)
        self.memory.replace(old, self.transformer.cache)

    def decode(self, ids: Sequence[int]) -> str:
        return self.chat.decode(ids)


def _stacked(logits: list[Output]) -> tuple[torch.Tensor, list[int]]:
    """Distinct logits (n, vocabulary), and where each of the given ones is among them."""
    places = {(id(row.batch), row.last): row.value for row in logits}  # siblings begin from the same ones
    batch = logits[0].batch
    if len({source for source, _ in places}) == 1 and 4 * len(places) >= 3 * len(batch):
        return batch, [row.last for row in logits]  # a few rows too many cost less than a copy of the others
    index = {place: i for i, place in enumerate(places)}
    return torch.stack(list(places.values())), [index[id(row.batch), row.last] for row in logits]


class _Long(Boundary):
    @property
    def min_tokens(self) -> int:
        return 64

    @property
    def max_tokens(self) -> int:
        return 64


def _end_of_sequence(model: Any, tokenizer: Any) -> set[int]:
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = ids if isinstance(ids, list) else [ids, tokenizer.eos_token_id]
    return {int(i) for i in ids if i is not None}
