"""How rewards of drafts move along an answer: learnt from plain answers, to foresee what CARDS will do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cards_integrations.decoding.base import Decoding, Session
from cards_integrations.decoding.segmentation import AnyBoundary, Uncertainty
from cards_integrations.trace import Alignment

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
BINS = 5  # of texts by their reward


class Pilot(Decoding):
    """Several candidates are drawn and scored for each segment.

    The first is kept, which makes a plain answer, or the best, which leads to where guided answers go.
    """

    method: Literal["pilot"] = "pilot"
    boundary: AnyBoundary = Uncertainty()
    candidates: int = Field(4, ge=2)
    keep: Literal["first", "best"] = "first"

    async def generate(self, session: Session) -> None:
        await session.prompt_reward()
        while not session.finished:
            drafts = [draft async for draft in session.drafts(until=self.boundary, limit=self.candidates)]
            for draft in drafts:
                draft.verdict = "rejected"
            kept = drafts[0] if self.keep == "first" else max(drafts, key=lambda draft: draft.reward)
            kept.verdict = "accepted"
            await session.keep(kept)


@dataclass(frozen=True)
class Setting:
    """What a simulation is asked about."""

    target: float
    beta: float
    alpha: float
    hard: bool
    max_rejections: int


@dataclass(frozen=True)
class Prediction:
    """Per answer: tokens kept and looked at, reward model calls, final reward; and the share of drafts accepted."""

    acceptance: float
    kept_tokens: float
    drafted_tokens: float
    rm_calls: float
    reward: float


class Chains:
    """Answers as chains of rewards.

    The reward of a draft is linear in that of the kept text before it, plus what all drafts after
    that text have in common, plus its own. Both residuals are drawn from those observed after texts
    of about the same reward, lengths and ends from segments at about the same place.
    """

    def __init__(self, answers: Sequence[Alignment], max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.prompts = np.array([answer.prompt_reward for answer in answers])
        before, rewards, lengths, ends, places = [], [], [], [], []
        for answer in answers:
            reward, written = answer.prompt_reward or 0.0, 0
            for segment in answer.segments:
                before.append(reward)
                rewards.append([draft.reward for draft in segment.drafts])
                lengths.append([len(draft.token_ids) for draft in segment.drafts])
                ends.append(segment is answer.segments[-1] and answer.finish_reason == "stop")
                places.append(written)
                reward, written = segment.reward or 0.0, written + len(segment.token_ids)
        self.before, self.places = np.array(before), np.array(places)
        self.rewards, self.lengths, self.ends = np.array(rewards), np.array(lengths), np.array(ends)
        self._fit()

    def _fit(self) -> None:
        k, first = self.rewards.shape[1], self.places == 0
        x, means = self._features(self.before, first), self.rewards.mean(1)
        self.weights = np.linalg.lstsq(x, means, rcond=None)[0]
        common = means - x @ self.weights
        own = self.rewards - means[:, None]
        self.own = own * np.sqrt(k / (k - 1))
        later = self.before[~first]
        self.edges = np.quantile(later, np.linspace(0, 1, BINS + 1)[1:-1]) if later.size else np.zeros(BINS - 1)
        bins = np.where(first, BINS, np.searchsorted(self.edges, self.before))
        self.bins = [np.flatnonzero(bins == which) for which in range(BINS + 1)]
        self.common = common.copy()
        for members in self.bins:  # the mean of k drafts carries some of their own noise
            centre, noise = common[members].mean() if members.size else 0.0, float(np.var(own[members])) / (k - 1)
            spread = float(np.var(common[members])) if members.size else 0.0
            shrink = np.sqrt(max(0.0, spread - noise) / spread) if spread else 0.0
            self.common[members] = centre + shrink * (common[members] - centre)
        self.order = np.argsort(self.places, kind="stable")

    def _features(self, before: Floats, first: Flags) -> Floats:
        """The prompt's own reward says less than that of a beginning."""
        return np.stack([np.ones(len(before)), before, first, first * before], 1).astype(float)

    def simulate(self, setting: Setting, chains: int = 2000, seed: int = 0) -> Prediction:
        """What CARDS does with these settings, over many simulated answers."""
        random = np.random.default_rng(seed)
        tries, n = setting.max_rejections + 1, self.max_tokens
        prompt = random.choice(self.prompts, chains)
        start = (1 - setting.alpha) * prompt + setting.alpha * setting.target
        reward, written = prompt.copy(), np.zeros(chains, dtype=int)
        live = np.ones(chains, dtype=bool)
        looked_at = accepted = drafted = 0
        while live.any():
            who = np.flatnonzero(live)
            first = written[who] == 0
            drafts = random.integers(0, self.rewards.shape[1], (len(who), tries))
            there = np.searchsorted(self.edges, reward[who])  # drafts after texts of about this reward
            groups = self._draw(random, first, there, ())
            mean = self._features(reward[who], first) @ self.weights + self.common[groups]
            rewards = mean[:, None] + self.own[self._draw(random, first, there, (tries,)), drafts]
            like = self._alike(written[who], random, tries)  # and that begin at about this place
            lengths = np.minimum(self.lengths[like, drafts], n - written[who, None])
            ends = self.ends[like]
            tau = start[who, None] + (written[who, None] + lengths) * (setting.target - start[who, None]) / n
            gap = rewards - np.minimum(tau, setting.target)
            chance = np.where(gap >= 0, 1.0, 0.0 if setting.hard else np.exp(np.minimum(gap / setting.beta, 0)))
            passes = random.random(gap.shape) < chance
            passes[:, -1] = False
            index = passes.argmax(1)
            passed = passes.any(1)
            kept = np.where(passed, index, rewards.argmax(1))
            seen = np.where(passed, index + 1, tries)
            rows = np.arange(len(who))
            looked_at += int(seen.sum())
            accepted += int(passed.sum())
            drafted += int(np.where(np.arange(tries) < seen[:, None], lengths, 0).sum())
            reward[who] = rewards[rows, kept]
            written[who] += lengths[rows, kept]
            live[who] = ~ends[rows, kept] & (written[who] < n)
        return Prediction(
            accepted / looked_at, float(written.mean()), drafted / chains, 1 + looked_at / chains, float(reward.mean())
        )

    def _draw(
        self, random: np.random.Generator, first: Flags, bins: NDArray[np.intp], shape: tuple[int, ...]
    ) -> NDArray[np.intp]:
        """For each text, observed groups of drafts (texts, *shape) after texts of about the same reward."""
        found = np.zeros((len(bins), *shape), dtype=np.intp)
        bins = np.where(first, BINS, bins)
        for which, members in enumerate(self.bins):
            here = bins == which
            if here.any():
                known = members if members.size else np.arange(len(self.before))
                found[here] = random.choice(known, (int(here.sum()), *shape))
        return found

    def _alike(self, written: NDArray[np.int_], random: np.random.Generator, n: int) -> NDArray[np.intp]:
        """For each text, n observed segments that began at about the same place."""
        ordered = self.places[self.order]
        near = max(4, len(ordered) // 10)
        first, begun = written == 0, int((ordered == 0).sum())
        at = np.searchsorted(ordered, written)
        low = np.where(first, 0, np.clip(at - near, begun, max(begun, len(ordered) - 1)))
        high = np.where(first, begun, np.minimum(at + near, len(ordered)))
        low = np.minimum(low, len(ordered) - 1)
        return self.order[random.integers(low[:, None], np.maximum(high, low + 1)[:, None], (len(written), n))]
