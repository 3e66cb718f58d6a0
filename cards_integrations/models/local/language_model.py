"""The local language model: all candidates of all live requests in one running batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch

from cards_integrations.chat.detokenizer import decodes_locally
from cards_integrations.chat.grammar import Grammar, GrammarTokenizer, Matcher
from cards_integrations.chat.stop_strings import StopStrings
from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.errors import CardsError, SettingsError, as_cards_error
from cards_integrations.models.base import Boundary, Candidate, Context
from cards_integrations.models.local.appending import TokenAppender, end_of_sequence
from cards_integrations.models.local.drawing import Drawn, TokenDrawer
from cards_integrations.models.local.frontier import Frontier, OpenRequest
from cards_integrations.models.local.prefill import is_mixed, prefill_shares, reads_for
from cards_integrations.models.local.resolve import max_positions
from cards_integrations.models.randomness import Uniforms
from cards_integrations.models.sampling import Sampler
from cards_integrations.trace import Usage
from cards_integrations.transformer.exact import check_exact
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.forward import PREFILL_CHUNK, Output, Transformer, checked
from cards_integrations.transformer.kv_cache import Branch, Tree
from cards_integrations.transformer.kv_memory import CacheNeed, KVMemory, first_to_read
from cards_integrations.transformer.rope import reads_again
from cards_integrations.transformer.step_times import StepTimes, least_seconds, step_times
from cards_integrations.transformer.thread_tuner import ThreadTuner

log = logging.getLogger("cards_integrations")
PREFILL_BESIDE = 512  # tokens of prompts that are read at most between two decode steps
UNKNOWN_TIMES = StepTimes({1: 1.0, 16: 2.0})  # not seconds: assumes that more candidates cost little
Read = Callable[[Sequence[ForwardInput]], list[Output | CardsError]]
LONG = 96  # tokens above which a candidate gets a row of its own


class LocalLanguageModel:
    """A transformers causal model; implements all protocols of `models.base`.

    Args:
        model: A causal model of transformers.
        chat: Its tokenizer and chat template.
        name: What errors and metadata call it.
        memory: The budget that its KV cache shares with others; unlimited by default.
        threads: Chooses the CPU threads of each step; None leaves them as they are.
    """

    def __init__(
        self, model: Any, chat: ChatTokenizer, name: str, memory: KVMemory | None = None,
        threads: ThreadTuner | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.model = model
        self.chat = chat
        self.threads = threads
        check_exact(model)
        self.transformer = Transformer(model, memory)
        self.reads_again = bool(self.transformer.switch) and reads_again(model, self.transformer.switch)
        self.memory = self.transformer.memory
        self.context_window = max_positions(model.config)
        self.eos = end_of_sequence(model, chat.tokenizer)
        self.appender = TokenAppender(name, model.dtype, chat, self.eos)
        decodes_locally(chat)  # tested while nobody waits
        self.steps = 0  # decode steps, each with at least one candidate
        self.drawer = TokenDrawer(lambda: self.grammars, self.eos)
        self._requests: dict[Context, OpenRequest] = {}  # in order of arrival
        self._ready: list[Candidate] = []  # those that have logits
        self._failed: list[Candidate] = []

    def cache_needs(self, context: Context, tokens: int) -> list[CacheNeed]:
        now = len(context.prompt_ids) + len(context.ids)
        needs, switch = [CacheNeed(self.transformer.cache, 1, tokens)], self.transformer.switch
        if self.reads_again and now <= switch < tokens:  # until a candidate beyond the switch is kept
            needs.append(CacheNeed(self.transformer.cache, 1, switch))
        return needs

    @property
    def forwards(self) -> int:
        """Forwards so far."""
        return self.transformer.forwards

    @property
    def tokens(self) -> int:
        """Tokens read so far."""
        return self.transformer.tokens

    # --- requests ---

    def open(self, context: Context) -> None:
        """Open a row for a request; its prompt is read when a candidate needs it."""
        self._check_ids(context.sampler)
        self._requests[context] = OpenRequest(Frontier(self._row(context), unread=list(context.prompt_ids)))

    def _check_ids(self, sampler: Sampler) -> None:
        """Refuse token ids that the model does not have."""
        for name, ids in (("logit_bias", dict(sampler.logit_bias)), ("stop_token_ids", sampler.stop_token_ids)):
            if ids and max(ids) >= self.vocabulary:
                last = self.vocabulary - 1
                raise SettingsError(f"{name}: token {max(ids)} does not exist; model {self.name!r} has 0 to {last}.")

    @cached_property
    def vocabulary(self) -> int:
        """Number of tokens that have a logit."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def _row(self, context: Context) -> Branch:
        """Open a row for the kept text; its length, or that of the prompt, decides on the rotary frequencies."""
        prompt, whole = len(context.prompt_ids), len(context.prompt_ids) + len(context.ids)
        long = self.transformer.is_long(whole if self.reads_again else prompt)
        return self.transformer.cache.open(whole + 1, long).branch()

    def close(self, context: Context) -> None:
        """Give up the candidates that are left, and free the row."""
        request = self._requests.get(context)
        if request is not None:
            for candidate in list(request.candidates):
                self.drop(candidate)
            self._requests.pop(context)
            self._close_long(request)
            if request.kept.held is not None:
                self.memory.keep(request.kept.branch.tree)
                self.transformer.cache.close(request.kept.branch.tree)

    def preempt(self, context: Context) -> None:
        """Free the row; what was kept and drafted is read again after `resume`."""
        request = self._requests.get(context)
        if request is None:
            return
        for candidate in self._ready:
            if candidate.context is context and candidate in request.candidates:
                request.candidates[candidate].waiting.append(candidate)
        self._ready = [candidate for candidate in self._ready if candidate.context is not context]
        for candidate, frontier in reversed(list(request.candidates.items())):  # children before their parents
            if frontier.owner is candidate:
                self._free(frontier, row=frontier.own_row)
                frontier.forget(candidate.ids)
                if not candidate.ids:
                    request.join(frontier, request.origin(candidate))
        self._close_long(request)
        self.transformer.cache.close(request.kept.branch.tree)
        request.kept.forget([*context.prompt_ids, *context.ids])

    def resume(self, context: Context) -> None:
        """Let a preempted request be read again."""
        if (request := self._requests.get(context)) is not None:
            request.kept.held = self._row(context)

    # --- candidates ---

    @cached_property
    def grammars(self) -> GrammarTokenizer:
        return GrammarTokenizer(self.chat.tokenizer, self.vocabulary, self.eos)

    def matcher(self, grammar: Grammar) -> Matcher:
        return self.grammars.matcher(grammar)

    def begin(self, candidate: Candidate) -> None:
        request, parent = self._requests[candidate.context], candidate.parent
        request.candidates[candidate] = request.origin(candidate)
        matcher = candidate.context.matcher if parent is None else parent.matcher
        candidate.matcher = matcher and matcher.fork()
        self._go_on(candidate, request.candidates[candidate])

    def _frontier(self, candidate: Candidate) -> Frontier | None:
        """Return the frontier of a candidate; None once it has been given up."""
        request = self._requests.get(candidate.context)
        return None if request is None else request.candidates.get(candidate)

    def _go_on(self, candidate: Candidate, origin: Frontier) -> None:
        """Let a candidate have its next token as soon as there are logits for it."""
        if origin.unread:
            origin.waiting.append(candidate)
            return
        if origin.owner is not candidate:
            branch, text = self._branch(origin.branch, candidate), origin.detokenizer
            own_row = branch.tree is not origin.branch.tree
            frontier = Frontier(branch, candidate, own_row, logits=origin.logits, read=origin.read)
            frontier.complete = candidate.limit == 0
            if text is not None and len(text.ids) == len(candidate.before):
                frontier.detokenizer = text.fork()
            self._requests[candidate.context].candidates[candidate] = frontier
        self._ready.append(candidate)

    def _branch(self, origin: Branch, candidate: Candidate) -> Branch:
        """Return a new branch for a candidate.

        A long candidate gets a row of its own: in a shared row its attention would read its siblings' columns, masked.
        """
        longest = len(candidate.ids) + candidate.remaining_tokens
        cache, columns = self.transformer.cache, origin.length + longest
        short = longest <= LONG or candidate.index == 0 or candidate.parent is not None
        if short or not self.memory.admits([CacheNeed(cache, 1, columns)]):
            return origin.branch()
        row = cache.open(long=origin.long)
        cache.copy(origin.tree, row)
        self.memory.evict_for(0)  # the cache may have grown
        return row.branch()

    def vacancies(self, context: Context, boundary: Boundary) -> int:
        """Return for how many more candidates of a request there is memory."""
        if (branch := self._requests[context].kept.held) is None:
            return 0
        tree = branch.tree
        cache = self.transformer.cache
        longest = min(boundary.max_tokens, context.max_tokens)
        if longest > LONG:
            return self.memory.spare // max(1, cache.row_bytes(len(tree.ids) + longest))
        columns = (cache.columns_within(tree, self.memory.spare_columns) - tree.taken) // longest
        return min(columns, self.memory.spare // cache.bytes_per_state) if cache.bytes_per_state else columns

    def drop(self, candidate: Candidate) -> None:
        """Give up a candidate, finished or not."""
        request = self._requests.get(candidate.context)
        frontier = request.candidates.pop(candidate, None) if request is not None else None
        if frontier is None:
            return
        if candidate in frontier.waiting:
            frontier.waiting.remove(candidate)
        if frontier.owner is candidate:
            self._free(frontier, row=frontier.own_row)

    def _free(self, frontier: Frontier, row: bool) -> None:
        """Free a branch, or the row that was opened for it."""
        if frontier.held is None:
            return
        if row:
            self.transformer.cache.close(frontier.branch.tree)
        else:
            frontier.branch.tree.drop(frontier.branch)

    def keep(self, candidate: Candidate) -> None:
        """Make a finished candidate part of its context; the logits after it are carried over."""
        context = candidate.context
        request = self._requests[context]
        self._keep_path(request, request.candidates.pop(candidate))
        self._keep_long(request, candidate)
        context.matcher = candidate.matcher
        context.ids += candidate.ids
        context.text = candidate.response

    def _keep_path(self, request: OpenRequest, new: Frontier) -> None:
        """Make the path of a candidate that of the kept text, and free what only the old one needs."""
        old = request.kept
        if new is old:  # a candidate without tokens, which was preempted: it has no path of its own
            return
        if new.held is None:  # preempted, or to be read with other frequencies: its tokens are read after the kept ones
            new.held, new.unread = old.held, [*old.unread, *new.unread]
        else:
            new.branch.tree.keep(new.branch)
            new.own_logits()
            if old.branch.long != new.branch.long:
                self.memory.keep(old.branch.tree)  # other texts may begin like it
            self._free(old, row=old.branch.tree is not new.branch.tree)
        request.kept, new.own_row = new, False  # the row that it is in is the request's now

    # --- sampling ---

    def sample(self) -> list[Candidate]:
        """Give each candidate with logits its next token, or end it.

        Returns:
            The candidates that have ended.
        """
        ready = [(c, frontier) for c in self._ready if (frontier := self._frontier(c)) is not None]
        ended, self._ready, self._failed = self._failed, [], []
        ended += [_with_states(*pair) for pair in ready if pair[1].complete]
        ready = [pair for pair in ready if not pair[1].complete]
        return ended + self._sample(ready) if ready else ended

    def _sample(self, ready: Sequence[tuple[Candidate, Frontier]]) -> list[Candidate]:
        """Give each candidate its token. If that fails, try it in halves, down to the candidate that is the cause.

        Returns:
            The candidates that have ended.
        """
        candidates = [candidate for candidate, _ in ready]
        try:
            drawn = self.drawer.draw(candidates, [frontier.logits for _, frontier in ready if frontier.logits])
        except BaseException as error:
            if len(ready) == 1:
                return [_failed(candidates[0], error)]
            half = len(ready) // 2
            return self._sample(ready[:half]) + self._sample(ready[half:])
        return [pair[0] for pair, token in zip(ready, drawn, strict=True) if self._ended(*pair, token)]

    def _ended(self, candidate: Candidate, frontier: Frontier, drawn: Drawn) -> bool:
        """Append a token to a candidate; True if it has ended or failed with that."""
        try:
            if not self.appender.append(candidate, frontier, drawn):
                return False
            if candidate.context.states:
                if frontier.unread:  # its last token is read first, for its hidden state
                    frontier.complete = True
                    frontier.waiting.append(candidate)
                    return False
                _with_states(candidate, frontier)
            frontier.own_logits()
        except BaseException as error:
            _failed(candidate, error)
        return True

    # --- what is to be read ---

    def has_unread(self, candidates: Iterable[Candidate]) -> bool:
        """True if something must be read before these candidates can have their next token."""
        return any(True for _ in self._unread(candidates))

    def _unread(self, candidates: Iterable[Candidate]) -> Iterator[tuple[Frontier, Context]]:
        """Yield what must be read for the next token of these candidates, with the request that it belongs to.

        That is a candidate's own last token, the prompt that it waits for, or the last token of the segment before,
        which is unread if that segment ended by its length.
        """
        for candidate in candidates:
            frontier = self._frontier(candidate)
            if frontier is not None and frontier.unread and frontier.waiting:
                if frontier.held is None or self.reads_again:
                    frontier = self._first_unread(frontier, candidate.context)
                yield frontier, candidate.context

    def _first_unread(self, frontier: Frontier, context: Context) -> Frontier:
        """Return the first unread frontier on the path to this one: itself, unless what it follows is unread, too."""
        request = self._requests[context]
        if self._has_outgrown(frontier):
            self._leave_short(frontier, request, context)
        if frontier.held is None and (candidate := frontier.owner) is not None:
            origin = self._origin(candidate, request)
            if origin.unread:
                return self._first_unread(origin, context)
            if origin is request.long:
                frontier.held = origin.branch.branch()
                frontier.unread = [*candidate.before[len(context.ids) :], *candidate.ids]
                frontier.read = None
            else:
                frontier.held = self._branch(origin.branch, candidate)
                frontier.own_row = frontier.branch.tree is not origin.branch.tree
        return frontier

    # --- texts that outgrow the rotary frequencies of short texts, and so are read again ---

    def _has_outgrown(self, frontier: Frontier) -> bool:
        held = frontier.held
        if held is None or held.long or not self.reads_again:
            return False
        return self.transformer.is_long(held.length + len(frontier.unread))

    def _leave_short(self, frontier: Frontier, request: OpenRequest, context: Context) -> None:
        """Give up what was read of a path with the frequencies of short texts."""
        frontier.read = None  # its hidden states change
        if frontier is not request.kept:
            assert frontier.owner is not None
            self._free(frontier, row=frontier.own_row)
            frontier.forget(frontier.owner.ids)
            return
        long, tree = self._long(request, context), frontier.branch.tree
        self.memory.keep(tree)
        self.transformer.cache.close(tree)
        frontier.held, frontier.unread, frontier.logits = long.held, long.unread, None
        request.long = None

    def _origin(self, candidate: Candidate, request: OpenRequest) -> Frontier:
        """Return what a candidate goes on from: if it is itself the one that outgrows, the long reading."""
        before = len(candidate.context.prompt_ids) + len(candidate.before)
        long = self.transformer.is_long(before + len(candidate.ids))
        if self.reads_again and long and not self.transformer.is_long(before):
            return self._long(request, candidate.context)
        return request.origin(candidate)

    def _long(self, request: OpenRequest, context: Context) -> Frontier:
        """Return the frontier of the kept text as read with the frequencies of long texts."""
        if request.long is None:
            branch = self.transformer.cache.open(long=True).branch()
            request.long = Frontier(branch, unread=[*context.prompt_ids, *context.ids])
        return request.long

    def _keep_long(self, request: OpenRequest, candidate: Candidate) -> None:
        """Extend the long reading of the kept text by a kept candidate, or end it if the candidate is in it."""
        kept, long = request.kept.held, request.long
        if long is None:
            return
        if kept is not None and kept.tree is long.branch.tree:
            kept.tree.drop(long.branch)
            request.long = None
        else:
            long.unread += candidate.ids

    def _close_long(self, request: OpenRequest) -> None:
        """Free the row in which the kept text is read with the frequencies of long texts."""
        if request.long is not None:
            self.transformer.cache.close(request.long.branch.tree)
            request.long = None

    # --- forwards ---

    def growth(self, candidates: Iterable[Candidate]) -> int:
        """Return by how many bytes the cache grows at most when `forward` is called for these candidates."""
        more: dict[Tree, int] = {}
        unread = dict(self._unread(candidates))
        for frontier in unread:
            tree, tokens = frontier.branch.tree, len(frontier.unread)
            if tree.ids:  # else all of it that is known may be copied at once
                tokens = min(tokens, PREFILL_CHUNK)
            more[tree] = more.get(tree, 0) + tokens
        return self.transformer.cache.growth(more, len(unread))

    def forward(self, candidates: Iterable[Candidate]) -> None:
        """Read what these candidates wait for; of prompts only a piece, so that other requests go on in between."""
        unread = self._read_now(dict(self._unread(candidates))).items()
        step = [ForwardInput(f.branch, f.unread.copy(), (f, context)) for f, context in unread if len(f.unread) == 1]
        prompts = [(f, context) for f, context in unread if len(f.unread) > 1]
        lengths = [len(f.unread) for f, _ in prompts]
        budget = PREFILL_BESIDE if step or is_mixed(lengths, PREFILL_BESIDE) else PREFILL_CHUNK
        # Models that go on by single tokens would read all but the first piece token by token.
        shares = lengths if self.transformer.stepwise else prefill_shares(lengths, budget)
        pieces = [
            ForwardInput(f.branch, f.unread[:share], (f, context))
            for (f, context), share in zip(prompts, shares, strict=True)
            if share
        ]
        if pieces:
            self._run(pieces)
        if step:
            with self.threads.step(len(step)) if self.threads else nullcontext():
                self._run(step)
            self.steps += 1

    def _read_now(self, unread: dict[Frontier, Context]) -> dict[Frontier, Context]:
        """Fill rows with what is known of their texts, and leave out prompts that can soon reuse another one's."""
        if all(len(frontier.unread) == 1 for frontier in unread):
            return unread
        trunks = [frontier for frontier, context in unread.items() if self._requests[context].is_trunk(frontier)]
        begun = [f for f in trunks if f.branch.tree.ids and len(f.unread) > 1]
        if self.transformer.recurrent:
            begun = []  # a part of what they read cannot be reused
        new = [frontier for frontier in trunks if not frontier.branch.tree.ids]
        later = {frontier for frontier in new if any(reads_for(other, frontier) for other in begun)}
        for frontier in new:
            if frontier not in later:
                self._recall(frontier, unread[frontier])
        unknown = [frontier for frontier in new if frontier not in later and not frontier.branch.tree.ids]
        if not self.transformer.recurrent:
            later |= {*unknown} - {unknown[i] for i in first_to_read([frontier.unread for frontier in unknown])}
        return {frontier: context for frontier, context in unread.items() if frontier not in later}

    def _recall(self, frontier: Frontier, context: Context) -> None:
        """Fill an empty row with the longest known prefix of its text."""
        tree = frontier.branch.tree
        self.memory.recall(tree, frontier.unread)
        if not tree.ids:
            return
        tree.drop(frontier.branch)
        frontier.held = tree.branch()
        del frontier.unread[: len(tree.ids)]
        usage, again = context.usage, frontier is self._requests[context].long
        if not again and not usage.lm_tokens:  # what this request has read itself does not count
            usage.cached_tokens = max(usage.cached_tokens, min(len(tree.ids), usage.prompt_tokens))

    def _run(self, inputs: Sequence[ForwardInput]) -> None:
        """Run one forward; frontiers that have nothing left to read get their logits."""
        served = {}
        asked = any(each.owner[1].states for each in inputs)
        outputs = self.transformer.logits_and_states(inputs) if asked else self.transformer.logits(inputs)
        for each, logits in zip(inputs, outputs, strict=True):
            frontier, context = each.owner
            request = self._requests[context]
            if isinstance(logits, CardsError):
                self._fail(frontier, request, logits)
                continue
            del frontier.unread[: len(each.ids)]
            if context.states:
                frontier.note_state(logits.state, frontier.branch.length - len(context.prompt_ids))
            if request.is_trunk(frontier):
                frontier.branch.tree.keep(frontier.branch)
            if not frontier.unread and frontier is not request.long:
                frontier.logits = logits
                waiting, frontier.waiting = frontier.waiting, []
                for candidate in waiting:
                    self._go_on(candidate, frontier)
            context.usage.lm_tokens += len(each.ids)
            served[id(context)] = context.usage
        for usage in served.values():
            usage.lm_forwards += 1

    def _fail(self, frontier: Frontier, request: OpenRequest, error: CardsError) -> None:
        """Fail the candidates that wait at a frontier that could not be read; if there are none, all of the request."""
        for at in [frontier] if frontier.waiting else dict.fromkeys(request.candidates.values()):
            for candidate in at.waiting:
                candidate.error = error
            self._failed += at.waiting
            at.waiting = []

    # --- whole answers, and times ---

    def read(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield the logits before each token of an answer, in pieces of (tokens, vocabulary), float32."""
        if ids:
            yield from self._read_answer(self.transformer.logits, prompt_ids, ids[:-1])

    def read_states(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield the last hidden states after the prompt and each token of an answer, in pieces of (n, hidden size)."""
        yield from self._read_answer(self.transformer.hidden, prompt_ids, ids)

    def _read_answer(self, run: Read, prompt_ids: Sequence[int], ids: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield the outputs after the prompt and after each token of an answer, in pieces of (n, ...)."""
        text, prompt = [*prompt_ids, *ids], len(prompt_ids)
        short = min(len(text), self.transformer.switch) if self.reads_again else len(text)
        long = self.transformer.is_long(prompt)
        if long or short == len(text):
            yield from self._read(run, text, prompt, long)
        else:
            yield from self._read(run, text[:short], prompt, long=False)
            yield from self._read(run, text, short + 1, long=True)

    def _read(self, run: Read, ids: list[int], first: int, long: bool) -> Iterator[torch.Tensor]:
        """Yield the outputs after the first `first` tokens of a text and after each later one, a piece each forward."""
        cache, piece = self.transformer.cache, len(ids) if self.transformer.stepwise else PREFILL_BESIDE
        tree = cache.open(long=long)
        branch = tree.branch()
        try:
            for end in range(piece, len(ids) + piece, piece):
                part = ids[end - piece : end]
                wanted = min(len(part), max(0, min(end, len(ids)) + 1 - first))
                [row] = checked(run([ForwardInput(branch, part, outputs=max(1, wanted))]))
                tree.keep(branch)
                yield row.values[max(1, wanted) - wanted :].float()
        finally:
            cache.close(tree)

    def step_times(self) -> StepTimes:
        """Return the seconds of a step, sampling included, by its number of candidates."""
        try:
            return step_times("drafting", self.model, self._time)
        except CardsError as error:
            log.warning("model %r: its steps cannot be timed: %s", self.name, error)
            return UNKNOWN_TIMES

    def _time(self, candidates: int) -> float:
        aside = LocalLanguageModel(self.model, self.chat, self.name)
        aside.appender.eos = ()  # so that no candidate ends early
        aside.transformer.trial = True  # the engine may be closed meanwhile
        context = Context("", [0] * 32, 64, Sampler(), StopStrings(), Usage())
        aside.open(context)
        begun = [Candidate(context, _Long(), Uniforms(0, 0, i), i) for i in range(candidates)]
        for candidate in begun:
            aside.begin(candidate)

        def step() -> None:
            aside.forward(begun)
            for candidate in aside.sample():
                if candidate.error is not None:
                    raise candidate.error

        step()  # the prompt, once for all of them
        return least_seconds(step, self.model.device)

    def reset(self) -> None:
        """Forget every row, after an error in the middle of a forward."""
        self._requests, self._ready, self._failed = {}, [], []
        old, self.transformer = self.transformer, Transformer(self.model, self.memory)
        self.transformer.forwards, self.transformer.tokens = old.forwards, old.tokens
        self.memory.replace(old.cache, self.transformer.cache)


def _with_states(candidate: Candidate, frontier: Frontier) -> Candidate:
    """Set the hidden states of a candidate, all of which has been read, and return it."""
    candidate.states = frontier.states
    frontier.own_logits()
    return candidate


def _failed(candidate: Candidate, error: BaseException) -> Candidate:
    """Set the error of a candidate, which ends its request, and return it."""
    candidate.error = as_cards_error(error, "Drafting failed")
    return candidate


class _Long(Boundary):
    @property
    def min_tokens(self) -> int:
        return 64

    @property
    def max_tokens(self) -> int:
        return 64
