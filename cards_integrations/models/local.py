"""The local language model: all candidates of all live requests in one running batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cards_integrations.models.base import Boundary, Candidate, Context
from cards_integrations.models.chat import ChatTokenizer
from cards_integrations.models.kv_cache import Branch, Tree
from cards_integrations.models.loading import positions
from cards_integrations.models.sampling import Sampler
from cards_integrations.models.transformer import Feed, Transformer


@dataclass
class _Trunk:
    """A context's row: `unread` are kept tokens that the model has not seen, `logits` follow the last."""

    tree: Tree
    unread: list[int]
    logits: torch.Tensor | None = None
    waiting: list[Candidate] = field(default_factory=list)


@dataclass
class _Tip:
    """A candidate's branch; `logits` are those after its last token, unless that is still unread."""

    branch: Branch
    logits: torch.Tensor | None


class LocalLanguageModel:
    """A transformers causal model behind the `LanguageModel` protocol."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.name = name
        self.model = model
        self.chat = ChatTokenizer(tokenizer)
        self.transformer = Transformer(model)
        self.context_window = positions(model.config)
        self.eos = _end_of_sequence(model, tokenizer)
        self.contexts: list[Context] = []
        self.drafting: list[Candidate] = []
        self.steps = 0  # forwards that carried at least one candidate

    def open(self, context: Context) -> None:
        """Give a context a row; its prompt is read in the next forward."""
        context.state = _Trunk(self.transformer.cache.open(), list(context.prompt_ids))
        self.contexts.append(context)

    def close(self, context: Context) -> None:
        """Free the row and give up its candidates."""
        if context.state is None:
            return
        self.drafting = [c for c in self.drafting if c.context is not context]
        self.contexts.remove(context)
        self.transformer.cache.close(context.state.tree)
        context.state = None

    def begin(self, candidate: Candidate) -> None:
        trunk: _Trunk = candidate.context.state
        if trunk.logits is None:
            trunk.waiting.append(candidate)
        else:
            self._start(candidate)

    def _start(self, candidate: Candidate) -> None:
        trunk: _Trunk = candidate.context.state
        candidate.state = _Tip(trunk.tree.branch(), trunk.logits)
        self.drafting.append(candidate)

    def drop(self, candidate: Candidate) -> None:
        """Give up a candidate, finished or not."""
        trunk: _Trunk | None = candidate.context.state
        if candidate in self.drafting:
            self.drafting.remove(candidate)
        if trunk is not None and candidate in trunk.waiting:
            trunk.waiting.remove(candidate)
        if trunk is not None and candidate.state is not None:
            trunk.tree.drop(candidate.state.branch)
        candidate.state = None

    def keep(self, candidate: Candidate) -> None:
        """Make a finished candidate part of its context; the logits after it are carried over."""
        context, tip = candidate.context, candidate.state
        trunk: _Trunk = context.state
        trunk.tree.keep(tip.branch)
        trunk.logits = tip.logits
        trunk.unread = candidate.ids[len(tip.branch.columns) :]
        candidate.state = None
        context.ids += candidate.ids
        context.text = candidate.response

    def sample(self) -> list[Candidate]:
        """Give each candidate with logits its next token, or end it; returns those that ended."""
        ready = [c for c in self.drafting if c.state.logits is not None]
        ended: list[Candidate] = []
        groups: dict[tuple[Boundary, Sampler], list[Candidate]] = {}  # alike in sampler and boundary
        for candidate in ready:
            groups.setdefault((candidate.boundary, candidate.context.sampler), []).append(candidate)
        for (boundary, sampler), group in groups.items():
            ended += self._sample(boundary, sampler, group)
        if ended:
            gone = set(map(id, ended))
            self.drafting = [c for c in self.drafting if id(c) not in gone]
        return ended

    @torch.inference_mode()
    def _sample(self, boundary: Boundary, sampler: Sampler, group: list[Candidate]) -> list[Candidate]:
        logits = torch.stack([c.state.logits for c in group]).float()
        uniforms = torch.tensor([c.uniforms[len(c.ids)] for c in group], dtype=torch.float64, device=logits.device)
        tokens = sampler(logits, uniforms)
        log_p = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        rises = boundary.ends_before(logits)
        rising = [False] * len(group) if rises is None else rises.tolist()
        ended = []
        for candidate, token, gain, rise in zip(group, tokens.tolist(), log_p.tolist(), rising, strict=True):
            if rise and len(candidate.ids) >= boundary.shortest:
                self._read(candidate)  # ends before this token; its logits stay for whoever comes next
                ended.append(candidate)
                continue
            candidate.log_likelihood += gain
            candidate.context.usage.drafted_tokens += 1
            if token in self.eos:
                candidate.finish = "stop"
                self._read(candidate)
                ended.append(candidate)
                continue
            candidate.ids.append(token)
            candidate.state.logits = None
            if self._ends_after(candidate):
                ended.append(candidate)
        return ended

    def _ends_after(self, candidate: Candidate) -> bool:
        context, boundary = candidate.context, candidate.boundary
        full = candidate.room <= 0
        if full or context.stop or boundary.reads_text:
            self._read(candidate)
        if context.stop:
            at = context.stop.find(candidate.response, len(context.text))
            if at is not None:
                candidate.response, candidate.whole, candidate.finish = candidate.response[:at], False, "stop"
                return True
        if full and candidate.end >= context.max_tokens:
            candidate.finish = "length"
        asked = boundary.reads_text and len(candidate.ids) >= boundary.shortest
        return full or (asked and boundary.ends_after(candidate.text))

    def _read(self, candidate: Candidate) -> None:
        candidate.response = self.decode([*candidate.context.ids, *candidate.ids])

    def forward(self) -> bool:
        """Read new prompts, then one token of every candidate; False if there was nothing to do.

        The last token of a segment that ended by its length is unread, too; it goes with the
        candidates of the others.
        """
        fresh = [c for c in self.contexts if c.state.unread and c.state.waiting]
        step = [Feed(c.state.branch, c.ids[-1:], c) for c in self.drafting]
        step += [self._unread(context) for context in fresh if len(context.state.unread) == 1]
        prompts = [self._unread(context) for context in fresh if len(context.state.unread) > 1]
        for batch in self.transformer.batches(prompts):
            self._run(batch)
        if step:
            self._run(step)
            self.steps += 1
        return bool(prompts or step)

    def _unread(self, context: Context) -> Feed:
        return Feed(context.state.tree.branch(), context.state.unread, context)

    @torch.inference_mode()
    def _run(self, feeds: Sequence[Feed]) -> None:
        """One forward: every owner gets the logits (vocabulary,) after its feed's last token."""
        inputs, rows, ends = self.transformer.batch(feeds)
        wanted, at = torch.unique(ends, return_inverse=True)
        logits = self.model(**inputs, logits_to_keep=wanted).logits[rows, at]
        served = {}
        for feed, row in zip(feeds, logits, strict=True):
            if isinstance(feed.owner, Candidate):
                context = feed.owner.context
                feed.owner.state.logits = row
            else:
                context = feed.owner
                self._extend(context, feed.branch, row)
            context.usage.lm_tokens += len(feed.ids)
            served[id(context)] = context.usage
        for usage in served.values():
            usage.lm_forwards += 1

    def _extend(self, context: Context, branch: Branch, logits: torch.Tensor) -> None:
        trunk: _Trunk = context.state
        trunk.tree.keep(branch)
        trunk.unread, trunk.logits = [], logits
        waiting, trunk.waiting = trunk.waiting, []
        for candidate in waiting:
            self._start(candidate)

    def reset(self) -> None:
        """Forget every row, after an error in the middle of a forward."""
        for context in list(self.contexts):
            context.state = None
        self.contexts, self.drafting = [], []
        self.transformer = Transformer(self.model)

    def decode(self, ids: Sequence[int]) -> str:
        return self.chat.decode(ids)


def _end_of_sequence(model: Any, tokenizer: Any) -> set[int]:
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = ids if isinstance(ids, list) else [ids, tokenizer.eos_token_id]
    return {int(i) for i in ids if i is not None}
