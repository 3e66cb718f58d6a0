"""Decoding methods as their papers write them: plain forwards, whole texts rescored, every branch from its beginning.

Only the random numbers and the settings objects are the package's own.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import reference
import torch
from reference import Ids

from cards_integrations.decoding import (
    AdaSearch,
    Args,
    Boundary,
    Cascade,
    Decoding,
    FixedLength,
    Particles,
    Rain,
    RejectionSampling,
    SegmentBestOfN,
    SpeculativeRejection,
    TreeBoN,
)
from cards_integrations.decoding.base import Draft as Offered
from cards_integrations.models.randomness import Uniforms
from cards_integrations.trace import SearchPlan

TREES = 2**32  # levels of a tree have the random numbers from this segment on


@dataclass(eq=False, repr=False)
class Draft:
    """A segment that follows `parent`; `text` is the whole answer with it, before a stop string."""

    parent: Draft | None
    ids: Ids
    text: str
    whole: bool
    finished: bool
    log_p: float
    uniform: float
    reward: float = math.nan
    verdict: str = "rejected"
    level: list[Draft] = field(default_factory=list)

    @property
    def path(self) -> list[Draft]:
        return [*self.parent.path, self] if self.parent else [self]

    @property
    def answer(self) -> Ids:
        return [token for draft in self.path for token in draft.ids]

    @property
    def own_text(self) -> str:
        return self.text[len(self.parent.text) if self.parent else 0 :]


@dataclass(repr=False)
class Naive:
    """One request. `score(ids, text, whole)` rescores an answer; `whole`: the text is that of the ids, nothing cut."""

    loop: reference.Reference
    score: Callable[[Ids, str, bool], float]
    prompt: Ids
    max_tokens: int
    seed: int
    levels: list[list[Draft]] = field(default_factory=list)  # all that were drafted

    def run(self, method: Decoding) -> Draft:
        """The last draft of the answer; verdicts are those of the drafts on its path and beside them."""
        return METHODS[type(method)](self, method)

    @property
    def ties(self) -> bool:
        """Are there drafts with equal rewards?"""
        rewards = sorted(draft.reward for level in self.levels for draft in level)
        return any(after - before < 1e-5 for before, after in pairwise(rewards))

    def prompt_reward(self) -> float:
        return self.score([], "", True)

    def grow(self, parents: Sequence[Draft | None], boundary: Boundary, ranked: bool = False) -> list[Draft]:
        number, drafts = TREES + len(self.levels), list[Draft]()
        for i, parent in enumerate(parents):
            drafts.append(self.draft(parent, boundary, Uniforms(self.seed, number, i), i if ranked else None))
            drafts[-1].level = drafts
        self.levels.append(drafts)
        return drafts

    def segment(self, kept: Draft | None, boundary: Boundary, limit: int) -> Iterator[Draft]:
        """One candidate after another; those that are looked at make a level."""
        level: list[Draft] = []
        self.levels.append(level)
        number = len(kept.path) if kept else 0
        for i in range(limit if self.loop.temperature else 1):
            level.append(self.draft(kept, boundary, Uniforms(self.seed, number, i)))
            level[-1].level = level
            yield level[-1]

    def draft(self, parent: Draft | None, boundary: Boundary, uniforms: Uniforms, rank: int | None = None) -> Draft:
        answer = parent.answer if parent else []
        if rank is not None:
            values = self.loop.next_logits(self.prompt + answer).tolist()
            token = sorted(range(len(values)), key=lambda i: -values[i])[rank]
            ids, ended = ([], "eos") if token == self.loop.eos else ([token], "length")
        elif self.loop.temperature:
            found = self.loop.draft(self.prompt, answer, boundary, self.max_tokens, uniforms)
            ids, ended = found.ids, found.ended
        else:
            loop = reference.Reference(
                self.loop.next_logits, lambda ids: 0.0, self.loop.decode, self.loop.eos, 1.0, 1, self.loop.stop
            )  # of one token there is but one to draw
            found = loop.draft(self.prompt, answer, boundary, self.max_tokens, uniforms)
            ids, ended = found.ids, found.ended
        text = self.loop.decode(answer + ids)
        cuts = [text.find(stop) for stop in self.loop.stop if stop in text]
        text = text[: min(cuts)] if cuts else text
        finished = ended in ("eos", "stop") or bool(cuts) or len(answer + ids) == self.max_tokens
        log_p = self.log_p(answer, [*ids, self.loop.eos] if ended == "eos" else ids)
        draft = Draft(parent, ids, text, not cuts, finished, log_p, uniforms.verdict)
        draft.reward = self.score(answer + ids, text, not cuts)
        return draft

    def log_p(self, answer: Ids, ids: Ids) -> float:
        rows = [self.loop.next_logits(self.prompt + answer + ids[:i]).double().log_softmax(-1) for i in range(len(ids))]
        return sum(float(row[token]) for row, token in zip(rows, ids, strict=True))


def kept(draft: Draft, verdict: str, since: Draft | None = None) -> Draft:
    """All of the path that was not kept before."""
    for each in draft.path[len(since.path) if since else 0 :]:
        each.verdict = verdict
    return draft


def best(drafts: Sequence[Draft]) -> Draft:
    """The first of those with the highest reward."""
    return next(draft for draft in drafts if draft.reward == max(each.reward for each in drafts))


def rejection(request: Naive, method: RejectionSampling) -> Draft:
    target, beta = float(method.target_reward), 0.0 if method.beta == "auto" else method.beta
    drafts = []
    for draft in request.segment(None, FixedLength(length=request.max_tokens), method.max_rejections + 1):
        drafts.append(draft)
        if len(drafts) <= method.max_rejections:
            hard, gap = method.acceptance == "hard", draft.reward - target
            if gap >= 0 or (not hard and draft.uniform < math.exp(gap / beta)):
                return kept(draft, "accepted")
    return kept(best(drafts), "best")


def segment_best_of_n(request: Naive, method: SegmentBestOfN) -> Draft:
    answer: Draft | None = None
    while answer is None or not answer.finished:
        answer = kept(best(list(request.segment(answer, method.boundary, method.n))), "best", answer)
    return answer


def args(request: Naive, method: Args) -> Draft:
    answer: Draft | None = None
    while answer is None or not answer.finished:
        drafts = request.grow([answer] * method.k, FixedLength(length=1), ranked=True)
        scores = torch.tensor([d.log_p + method.weight * d.reward for d in drafts], dtype=torch.double)
        if method.stochastic:
            upto = (scores / method.temperature).softmax(-1).cumsum(-1)
            chosen = drafts[min(int((upto <= drafts[0].uniform).sum()), method.k - 1)]
        else:
            chosen = drafts[int(scores.argmax())]
        answer = kept(chosen, "accepted", answer)
    return answer


def speculative_rejection(request: Naive, method: SpeculativeRejection) -> Draft:
    going: list[Draft | None] = [None] * method.n
    done: list[Draft] = []
    while going:
        drafts = request.grow(going, FixedLength(length=method.checkpoint))
        found = sorted([*done, *drafts], key=lambda draft: draft.reward, reverse=True)
        left = found[: max(1, round(len(found) * (1 - method.fraction)))]
        done = [draft for draft in left if draft.finished]
        going = [draft for draft in drafts if draft in left and not draft.finished]
    return kept(best(done), "best")


def tree_bon(request: Naive, method: TreeBoN) -> Draft:
    layer: list[Draft] = request.grow([None] * method.n, method.boundary)
    while not all(draft.finished for draft in layer):
        alone = [draft for i, draft in enumerate(layer) if draft not in layer[:i]]
        chosen = sorted(alone, key=lambda draft: draft.reward, reverse=True)[: max(1, method.n // method.children)]
        going = [draft for draft in chosen if not draft.finished for _ in range(method.children)]
        children = iter(request.grow(going, method.boundary))
        layer = []
        for draft in chosen:
            layer += [draft] if draft.finished else [next(children) for _ in range(method.children)]
    return kept(best(layer), "best")


def particles(request: Naive, method: Particles) -> Draft:
    beta, n = 0.7 if method.beta == "auto" else method.beta, method.n
    now: list[Draft | None] = [None] * n
    weights, last, spare = np.ones(n), [request.prompt_reward()] * n, 0.0
    while True:
        moving = [i for i in range(n) if (each := now[i]) is None or not each.finished]
        drafts = request.grow([now[i] for i in moving], method.boundary)
        for i, draft in zip(moving, drafts, strict=True):
            now[i] = draft
            weights[i] *= math.exp((draft.reward - last[i]) / beta)
            last[i] = draft.reward
        spare = drafts[-1].uniform if len(drafts) > 1 else spare
        upto = np.cumsum(weights) / weights.sum()
        found = [draft for draft in now if draft is not None]
        if all(draft.finished for draft in found):
            if method.keep == "best":
                return kept(best(found), "best")
            return kept(found[min(int((upto <= spare).sum()), n - 1)], "accepted")
        if weights.sum() ** 2 / (weights**2).sum() < method.threshold * n:
            ancestors = [min(int((upto <= (k + drafts[0].uniform) / n).sum()), n - 1) for k in range(n)]
            now, last, weights = [found[i] for i in ancestors], [last[i] for i in ancestors], np.ones(n)


def cascade(request: Naive, method: Cascade) -> Draft:
    assert method.plan is not None
    return search(request, method.plan, halves=True)


def ada_search(request: Naive, method: AdaSearch) -> Draft:
    return search(request, method.plan_for(request.max_tokens), halves=False)


def search(request: Naive, plan: SearchPlan, halves: bool) -> Draft:
    alive: list[Draft] = []
    going: list[Draft | None] = [None]
    gains: list[float] = []
    for stage in plan.rounds:
        done = [draft for draft in alive if draft.finished]
        flat = halves and gains and gains[-1] <= 0.05 * max(gains)
        room = (max(2, stage.width // 2) if flat else stage.width) - len(done)
        going = going[: max(1, room)]
        children = [parent for k, parent in enumerate(going) for _ in range(shares(max(1, room), len(going))[k])]
        drafts = request.grow(children, FixedLength(length=stage.tokens))
        if len(drafts) > 1:
            rewards = [draft.reward for draft in drafts]
            gains.append(max(rewards) - sum(rewards) / len(rewards))
        alive = sorted([*done, *drafts], key=lambda draft: draft.reward, reverse=True)[: stage.survivors]
        going = [draft for draft in alive if not draft.finished]
        if not going:
            break
    answer = best(alive)
    while not answer.finished:
        [answer] = request.grow([answer], FixedLength(length=request.max_tokens))
    return kept(answer, "best")


def shares(children: int, parents: int) -> list[int]:
    """How many children each parent has: they differ by one at most, and those that have more are spread evenly."""
    upto = [-(-k * children // parents) for k in range(parents + 1)]
    return [after - before for before, after in pairwise(upto)]


@dataclass(eq=False, repr=False)
class Visited:
    """What RAIN knows of a draft."""

    draft: Draft | None
    prior: float = 1.0
    value: float = 0.0
    visits: int = 0
    children: list[Visited] = field(default_factory=list)


def rain(request: Naive, method: Rain) -> Draft:
    answer: Draft | None = None
    root = Visited(None)
    while answer is None or not answer.finished:
        for _ in range(method.searches):
            path = [root]
            while path[-1].children:
                at = path[-1]
                worth = [
                    c.value + method.explore * c.prior * math.sqrt(at.visits) / (1 + c.visits) for c in at.children
                ]
                path.append(at.children[worth.index(max(worth))])
            leaf = path[-1]
            if len(path) > 1 and leaf.draft is not None and leaf.draft.finished:
                learn(path, leaf.draft.reward, method.share)
            else:
                drafts = request.grow([leaf.draft if len(path) > 1 else answer] * method.width, method.boundary)
                named = [(draft.own_text, draft.finished) for draft in drafts]
                for i, draft in enumerate(drafts):
                    if named.index(named[i]) == i:
                        leaf.children.append(Visited(draft, named.count(named[i]) / len(drafts)))
                for child in leaf.children:
                    assert child.draft is not None
                    learn([*path, child], child.draft.reward, method.share)
            chosen = max(root.children, key=lambda child: (child.visits, child.value))
            if method.value_threshold is not None and chosen.value >= method.value_threshold:
                break
        assert chosen.draft is not None
        answer, root = kept(chosen.draft, "best", answer), chosen
    return answer


def learn(path: list[Visited], value: float, share: float) -> None:
    """Means over all searches below; drafts beside one on the path learn of it as much as they are like it."""
    path[0].visits += 1
    for parent, node in reversed([*pairwise(path)]):
        node.visits += 1
        node.value += (value - node.value) / node.visits
        for other in parent.children:
            if other is not node and other.visits:
                assert node.draft is not None
                assert other.draft is not None
                texts = node.draft.own_text, other.draft.own_text
                gained = share * SequenceMatcher(None, *texts, autojunk=False).ratio()
                other.value += gained * (value - other.value) / (other.visits + gained)


METHODS: dict[type[Decoding], Callable[[Naive, Any], Draft]] = {
    RejectionSampling: rejection,
    SegmentBestOfN: segment_best_of_n,
    Args: args,
    SpeculativeRejection: speculative_rejection,
    TreeBoN: tree_bon,
    Particles: particles,
    Cascade: cascade,
    AdaSearch: ada_search,
    Rain: rain,
}


@dataclass(eq=False, repr=False)
class Table:
    """A `Session` without models: `law` has p(next letter | text); the empty letter ends the text."""

    law: dict[str, dict[str, float]]
    reward: Callable[[str], float]
    dice: np.random.Generator
    max_tokens: int
    kept: Offered | None = None
    best: Offered | None = None
    reward_scale: Any = None

    def __post_init__(self) -> None:
        self.texts: dict[Offered | None, str] = {None: ""}

    @property
    def finished(self) -> bool:
        return self.kept is not None and self.kept.finished

    @property
    def text(self) -> str:
        return self.texts[self.kept]

    async def prompt_reward(self) -> float:
        return self.reward("")

    def _offer(self, parent: Offered | None, until: Boundary, index: int) -> Offered:
        text, written, ended = self.texts[parent], 0, False
        while not ended and written < until.max_tokens and len(text) < self.max_tokens:
            at, upto = self.dice.random(), accumulate(self.law[text].values())
            letter = next(letter for letter, below in zip(self.law[text], upto, strict=True) if at < below + 1e-12)
            ended, written, text = letter == "", written + 1, text + letter
        finished = ended or len(text) == self.max_tokens
        draft = Offered(index, text, self.reward(text), len(text), float(self.dice.random()), finished)
        self.texts[draft] = text
        return draft

    async def drafts(self, until: Boundary, limit: int, **options: Any) -> AsyncIterator[Offered]:
        for index in range(limit):
            yield self._offer(self.kept, until, index)

    async def grow(self, parents: Sequence[Offered | None], until: Boundary, **options: Any) -> list[Offered]:
        return [self._offer(self.kept if p is None else p, until, i) for i, p in enumerate(parents)]

    def give_up(self, draft: Offered) -> None:
        pass

    def reject(self, draft: Offered) -> Offered:
        self.best = draft if self.best is None or draft.reward > self.best.reward else self.best
        return self.best

    async def keep_best(self) -> Offered:
        best = self.best
        assert best is not None
        await self.keep(best)
        return best

    async def keep(self, draft: Offered) -> None:
        self.kept, self.best = draft, None
