"""How rewards of drafts move along an answer: learnt from plain answers, to foresee what CARDS will do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cards_integrations.decoding.base import Decoding, Draft, Session
from cards_integrations.decoding.segmentation import AnyBoundary, Uncertainty
from cards_integrations.trace import Alignment

Floats = NDArray[np.float64]


class Pilot(Decoding):
    """A plain answer, segment by segment: several candidates are drawn and scored, and the first is kept."""

    method: Literal["pilot"] = "pilot"
    boundary: AnyBoundary = Uncertainty()
    candidates: int = Field(4, ge=2)

    async def generate(self, session: Session) -> None:
        await session.prompt_reward()
        while not session.finished:
            first: Draft | None = None
            async for draft in session.drafts(until=self.boundary, limit=self.candidates):
                draft.verdict = "rejected" if first else "accepted"
                first = first or draft
            assert first is not None  # a session yields at least one draft
            await session.keep(first)


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
    """Plain answers as chains of rewards.

    The reward of a draft is linear in that of the kept text before it, plus what all drafts after
    that text have in common, plus its own; both residuals, lengths and ends are those observed.
    """

    def __init__(self, answers: Sequence[Alignment], max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.prompts = np.array([answer.prompt_reward for answer in answers])
        before, rewards, lengths, ends, places = [], [], [], [], []
        for answer in answers:
            reward, written = answer.prompt_reward or 0.0, 0
            for segment in answer.segments:
                last = segment is answer.segments[-1]
                before.append(reward)
                rewards.append([draft.reward for draft in segment.drafts])
                lengths.append([len(draft.token_ids) for draft in segment.drafts])
                ends.append(last and answer.finish_reason == "stop")
                places.append(written)
                reward, written = segment.reward or 0.0, written + len(segment.token_ids)
        self.before, self.places = np.array(before), np.array(places)
        self.rewards, self.lengths, self.ends = np.array(rewards), np.array(lengths), np.array(ends)
        self._fit()

    def _fit(self) -> None:
        k = self.rewards.shape[1]
        x = self._features(self.before, self.places)
        means = self.rewards.mean(1)
        self.weights = np.linalg.lstsq(x, means, rcond=None)[0]
        common = means - x @ self.weights
        own = self.rewards - means[:, None]
        within = own.var() * k / (k - 1)
        between = max(0.0, common.var() - within / k)  # the mean of k drafts carries some of their own noise
        self.common = common * np.sqrt(between / (common.var() or 1.0))
        self.own = own * np.sqrt(k / (k - 1))
        self.order = np.argsort(self.places, kind="stable")

    def _features(self, before: Floats, places: NDArray[np.int_]) -> Floats:
        first = places == 0  # the prompt's own reward says less than that of a beginning
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
            groups = self._alike(written[who], random)
            drafts = random.integers(0, self.rewards.shape[1], (len(who), tries))
            mean = self._features(reward[who], written[who]) @ self.weights + self.common[groups]
            own_groups = self._alike(np.repeat(written[who], tries), random).reshape(len(who), tries)
            rewards = mean[:, None] + self.own[own_groups, drafts]
            lengths = np.minimum(self.lengths[own_groups, drafts], n - written[who, None])
            ends = self.ends[own_groups]
            tau = start[who, None] + (written[who, None] + lengths) * (setting.target - start[who, None]) / n
            gap = rewards - np.minimum(tau, setting.target)
            chance = np.where(gap >= 0, 1.0, 0.0 if setting.hard else np.exp(np.minimum(gap / setting.beta, 0)))
            passes = random.random(gap.shape) < chance
            passes[:, -1] = False
            first = passes.argmax(1)
            passed = passes.any(1)
            kept = np.where(passed, first, rewards.argmax(1))
            seen = np.where(passed, first + 1, tries)
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

    def _alike(self, written: NDArray[np.int_], random: np.random.Generator) -> NDArray[np.intp]:
        """For each place in an answer, an observed segment that began at about the same place."""
        ordered = self.places[self.order]
        at = np.searchsorted(ordered, written, side="left")
        upto = np.searchsorted(ordered, written, side="right")
        spread = max(4, len(ordered) // 10)
        low = np.where(written == 0, 0, np.maximum(at - spread, int((self.places == 0).sum())))
        high = np.where(written == 0, upto, np.minimum(at + spread, len(ordered)))
        low = np.minimum(low, len(ordered) - 1)
        high = np.maximum(high, low + 1)
        return self.order[random.integers(low, high)]
