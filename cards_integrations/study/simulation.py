"""Learns from scored answers how rewards of drafts move along an answer, to predict what CARDS will do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cards_integrations.trace import Alignment

Floats = NDArray[np.float64]
Ints = NDArray[np.int_]
Indices = NDArray[np.intp]
Flags = NDArray[np.bool_]

BINS = 5  # groups of texts with similar rewards; the prompt alone is one more


@dataclass(frozen=True)
class SimulationSettings:
    """The settings of CARDS that are simulated."""

    target: float
    """The reward that finished answers should have."""
    beta: float
    """The temperature of the reward, in its units: how far below the threshold a draft may be and still be accepted."""
    alpha: float
    """Where the threshold begins, from the reward of the prompt alone (0) to the target (1)."""
    hard: bool
    """Whether drafts are accepted only at or above the threshold."""
    max_rejections: int
    """The number of rejected drafts of a segment after which the best one is kept."""


@dataclass(frozen=True)
class Prediction:
    """Means over answers: what CARDS is predicted to do, or what was measured."""

    acceptance: float
    """The share of examined drafts that are accepted."""
    kept_tokens: float
    """The number of tokens of an answer."""
    drafted_tokens: float
    """The number of tokens of the drafts that are examined for an answer."""
    rm_calls: float
    """The number of scores for an answer, that of the prompt included."""
    reward: float
    """The reward of the finished answer."""
    best_of_rejected: float = 0.0
    """The share of segments without an accepted draft, of which the best rejected one is kept."""


class Simulator:
    """Simulates answers as chains of rewards.

    The reward of a draft is a linear function of that of the kept text before it, plus a residual that all drafts after
    that text share, plus a residual of its own. Both residuals are drawn from those that were observed after texts of
    about the same reward; lengths and ends are drawn from segments at about the same position.
    """

    def __init__(self, answers: Sequence[Alignment], max_tokens: int) -> None:
        """Learn from answers.

        Args:
            answers: Answers of `Pilot`: every segment has the same number of scored drafts.
            max_tokens: The length limit of the simulated answers.
        """
        self.max_tokens = max_tokens
        self.prompt_rewards = np.array([answer.prompt_reward for answer in answers])
        before, rewards, lengths, ends, positions = [], [], [], [], []
        for answer in answers:
            reward, written = answer.prompt_reward or 0.0, 0
            for segment in answer.segments:
                before.append(reward)
                rewards.append([draft.reward for draft in segment.drafts])
                lengths.append([len(draft.token_ids) for draft in segment.drafts])
                ends.append(segment is answer.segments[-1] and answer.finish_reason == "stop")
                positions.append(written)
                reward, written = segment.reward or 0.0, written + len(segment.token_ids)
        self.before, self.positions = np.array(before), np.array(positions)
        self.rewards, self.lengths, self.ends = np.array(rewards), np.array(lengths), np.array(ends)
        self.by_position = np.argsort(self.positions, kind="stable")
        self._fit()

    def _fit(self) -> None:
        """Fit the linear function, and sort the residuals by the reward before them."""
        k, first = self.rewards.shape[1], self.positions == 0
        features, means = _features(self.before, first), self.rewards.mean(1)
        self.weights = np.linalg.lstsq(features, means, rcond=None)[0]
        within = self.rewards - means[:, None]
        self.own = within * np.sqrt(k / (k - 1))
        later = self.before[~first]
        self.edges = np.quantile(later, np.linspace(0, 1, BINS + 1)[1:-1]) if later.size else np.zeros(BINS - 1)
        bins = np.where(first, BINS, np.searchsorted(self.edges, self.before))
        self.bins = [np.flatnonzero(bins == which) for which in range(BINS + 1)]
        self.shared = means - features @ self.weights
        for members in filter(len, self.bins):
            self.shared[members] = _shrunk(self.shared[members], float(np.var(within[members])) / (k - 1))

    def simulate(self, settings: SimulationSettings, n_answers: int = 2000, seed: int = 0) -> Prediction:
        """Predict what CARDS does with these settings, as means over simulated answers."""
        random = np.random.default_rng(seed)
        tries = settings.max_rejections + 1
        prompt = random.choice(self.prompt_rewards, n_answers)
        start = (1 - settings.alpha) * prompt + settings.alpha * settings.target
        reward, written = prompt.copy(), np.zeros(n_answers, dtype=int)
        live = np.ones(n_answers, dtype=bool)
        examined = accepted = drafted = segments = 0
        while live.any():
            rows = np.flatnonzero(live)
            rewards, lengths, ends = self._drafts(random, reward[rows], written[rows], tries)
            chance = self._acceptance(settings, rewards, start[rows, None], written[rows, None] + lengths)
            passes = random.random(rewards.shape) < chance
            passes[:, -1] = False
            index, passed = passes.argmax(1), passes.any(1)
            kept = np.arange(len(rows)), np.where(passed, index, rewards.argmax(1))
            seen = np.where(passed, index + 1, tries)
            examined += int(seen.sum())
            accepted += int(passed.sum())
            segments += len(rows)
            drafted += int(np.where(np.arange(tries) < seen[:, None], lengths, 0).sum())
            reward[rows] = rewards[kept]
            written[rows] += lengths[kept]
            live[rows] = ~ends[kept] & (written[rows] < self.max_tokens)
        return Prediction(
            acceptance=accepted / examined,
            kept_tokens=float(written.mean()),
            drafted_tokens=drafted / n_answers,
            rm_calls=1 + examined / n_answers,
            reward=float(reward.mean()),
            best_of_rejected=1 - accepted / segments,
        )

    def _drafts(
        self, random: np.random.Generator, before: Floats, written: Ints, tries: int
    ) -> tuple[Floats, Ints, Flags]:
        """Draw rewards, lengths and ends (texts, tries) of drafts after texts with these rewards and lengths."""
        first = written == 0
        drafts = random.integers(0, self.rewards.shape[1], (len(before), tries))
        bins = np.where(first, BINS, np.searchsorted(self.edges, before))
        shared = self.shared[self._similar_rewards(random, bins, ())]
        own = self.own[self._similar_rewards(random, bins, (tries,)), drafts]
        rewards = (_features(before, first) @ self.weights + shared)[:, None] + own
        segments = self._similar_positions(random, written, tries)
        lengths = np.minimum(self.lengths[segments, drafts], self.max_tokens - written[:, None])
        return rewards, lengths, self.ends[segments]

    def _acceptance(self, settings: SimulationSettings, rewards: Floats, start: Floats, tokens: Ints) -> Floats:
        """Return the probability that each draft is accepted, (texts, tries); `tokens` are lengths with the draft."""
        thresholds = start + tokens * (settings.target - start) / self.max_tokens
        gap = rewards - np.minimum(thresholds, settings.target)
        return np.where(gap >= 0, 1.0, 0.0 if settings.hard else np.exp(np.minimum(gap / settings.beta, 0)))

    def _similar_rewards(self, random: np.random.Generator, bins: Indices, shape: tuple[int, ...]) -> Indices:
        """Draw, for each text, observed segments (texts, *shape) after texts of about the same reward."""
        found = np.zeros((len(bins), *shape), dtype=np.intp)
        for which, members in enumerate(self.bins):
            here = bins == which
            if here.any():
                observed = members if members.size else np.arange(len(self.before))
                found[here] = random.choice(observed, (int(here.sum()), *shape))
        return found

    def _similar_positions(self, random: np.random.Generator, written: Ints, n: int) -> Indices:
        """Draw, for each text, observed segments (texts, n) that began at about the same position."""
        positions = self.positions[self.by_position]
        near = max(4, len(positions) // 10)
        first, n_first = written == 0, int((positions == 0).sum())
        at = np.searchsorted(positions, written)
        low = np.where(first, 0, np.clip(at - near, n_first, max(n_first, len(positions) - 1)))
        high = np.where(first, n_first, np.minimum(at + near, len(positions)))
        low = np.minimum(low, len(positions) - 1)
        return self.by_position[random.integers(low[:, None], np.maximum(high, low + 1)[:, None], (len(written), n))]


def _features(before: Floats, first: Flags) -> Floats:
    """Return the regressors, (texts, 4): the reward of the prompt alone has a line of its own, as it predicts less."""
    return np.stack([np.ones(len(before)), before, first, first * before], 1).astype(float)


def _shrunk(means: Floats, noise: float) -> Floats:
    """Shrink the mean rewards of drafts towards their centre, as their variance includes some of single drafts'."""
    variance = float(np.var(means))
    shrinkage = np.sqrt(max(0.0, variance - noise) / variance) if variance else 0.0
    centre = means.mean()
    return np.asarray(centre + shrinkage * (means - centre))
