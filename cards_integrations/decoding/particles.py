"""Particles: sequential Monte Carlo over segments."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Annotated, Literal

from pydantic import Field

from cards_integrations.decoding.args import drawn
from cards_integrations.decoding.base import Decoding, Session
from cards_integrations.decoding.registry import register_method
from cards_integrations.decoding.scaled import Beta, beta_for
from cards_integrations.decoding.segmentation import AnyBoundary, Uncertainty


@register_method
class Particles(Decoding):
    """n particles approximate p(y | x) exp(r(x, y) / beta); they advance a segment at a time, in one batch.

    The incremental weight of a particle is exp((r(x, y + s) - r(x, y)) / beta), so that the weights of the
    prefixes telescope to those of the target (twisted SMC with the reward as the twist, arXiv 2404.17546;
    particles for inference scaling, arXiv 2502.01618). Where the effective sample size 1 / sum w^2 falls
    below `threshold` * n, particles are drawn anew, systematically, and their weights are equal again. No
    draft is thrown away on rejection. In the end one particle is drawn by its weight, or with
    `keep="best"` the one with the highest reward is taken.
    """

    method: Literal["particles"] = "particles"
    n: Annotated[int, Field(ge=1)] = 8
    beta: Beta = "auto"
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    keep: Literal["drawn", "best"] = "drawn"
    boundary: AnyBoundary = Uncertainty()

    @property
    def needs_scale(self) -> bool:
        return self.beta == "auto"

    async def generate(self, session: Session) -> None:
        beta, start = beta_for(self.beta, session), await session.prompt_reward()
        drafts = await session.grow([None] * self.n, until=self.boundary)
        particles = list(drafts)
        log_w = [(draft.reward - start) / beta for draft in drafts]
        spare = drafts[-1].uniform if self.n > 1 else 0.0  # a uniform that decided nothing
        while not all(particle.finished for particle in particles):
            weights = normalised(log_w)
            if effective(weights) < self.threshold * self.n:
                ancestors = systematic(weights, drafts[0].uniform)
                drawn_anew = [particles[i] for i in ancestors]
                for lost in dict.fromkeys(particles):
                    if lost not in drawn_anew:
                        session.give_up(lost)
                particles, log_w = drawn_anew, [0.0] * self.n
            moving = [i for i, particle in enumerate(particles) if not particle.finished]
            drafts = await session.grow([particles[i] for i in moving], until=self.boundary)
            for i, draft in zip(moving, drafts, strict=True):
                log_w[i] += (draft.reward - particles[i].reward) / beta
                particles[i] = draft
            spare = drafts[-1].uniform if len(drafts) > 1 else spare
        best = max(particles, key=lambda particle: particle.reward)
        chosen = best if self.keep == "best" else drawn(particles, normalised(log_w), spare)
        chosen.verdict = "accepted" if self.keep == "drawn" else "best"
        await session.keep(chosen)


def normalised(log_w: list[float]) -> list[float]:
    """w / sum w, from logarithms."""
    weights = [math.exp(each - max(log_w)) for each in log_w]
    return [weight / sum(weights) for weight in weights]


def effective(weights: list[float]) -> float:
    """The effective sample size: as many equal particles would say as much."""
    return 1 / sum(weight * weight for weight in weights)


def systematic(weights: list[float], uniform: float) -> list[int]:
    """As many indices as there are weights; i is drawn floor(n w_i) times at least, and once more at most."""
    n, upto, chosen, i = len(weights), list(accumulate(weights)), [], 0
    for k in range(n):
        while i < n - 1 and upto[i] <= (k + uniform) / n:
            i += 1
        chosen.append(i)
    return chosen
