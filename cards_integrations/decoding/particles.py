"""Particles: sequential Monte Carlo over segments."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cards_integrations.decoding.base import Decoding, Scale, Session
from cards_integrations.decoding.registry import register_method
from cards_integrations.decoding.resampling import (
    effective_sample_size,
    normalized,
    systematic_resampling,
    weighted_choice,
)
from cards_integrations.decoding.segmentation import AnyBoundary, Uncertainty
from cards_integrations.decoding.targets import Beta, beta_for, chosen_beta
from cards_integrations.trace import Guidance, ScaleOrigin


@register_method
class Particles(Decoding):
    """n particles approximate p(y | x) exp(r(x, y) / beta); they advance a segment at a time, in one batch.

    The incremental weight of a particle is exp((r(x, y + s) - r(x, y)) / beta), so that the weights of the
    prefixes telescope to those of the target (twisted SMC with the reward as the twist, arXiv 2404.17546;
    particles for inference scaling, arXiv 2502.01618). Where the effective sample size 1 / sum w^2 falls
    below `threshold` * n, particles are resampled systematically, and their weights are equal again. No draft is
    rejected.
    """

    method: Literal["particles"] = "particles"
    """Names this method in settings files."""
    n: Annotated[int, Field(ge=1)] = 8
    """Number of particles."""
    beta: Beta = "auto"
    """Temperature of the reward, in units of the reward; "auto" as for `Cards`."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of n: particles are resampled where the effective sample size falls below it; 0 never resamples."""
    keep: Literal["drawn", "best"] = "drawn"
    """The particle that becomes the answer: "drawn" by its weight, or the "best" by its reward."""
    boundary: AnyBoundary = Uncertainty()
    """Where a segment ends."""

    @property
    def needs_scale(self) -> bool:
        return self.beta == "auto"

    def guidance(self, scale: Scale | None, origin: ScaleOrigin | None) -> Guidance | None:
        beta, beta_origin = chosen_beta(self.beta, scale, origin)
        return Guidance(None, beta, None, beta_origin)

    async def generate(self, session: Session) -> None:
        beta, start = beta_for(self.beta, session), await session.prompt_reward()
        drafts = await session.grow([None] * self.n, until=self.boundary)
        particles = list(drafts)
        log_w = [(draft.reward - start) / beta for draft in drafts]
        spare = drafts[-1].uniform if self.n > 1 else 0.0  # a uniform that decided nothing
        while not all(particle.finished for particle in particles):
            weights = normalized(log_w)
            if effective_sample_size(weights) < self.threshold * self.n:
                resampled = [particles[i] for i in systematic_resampling(weights, drafts[0].uniform)]
                for lost in dict.fromkeys(particles):
                    if lost not in resampled:
                        session.give_up(lost)
                particles, log_w = resampled, [0.0] * self.n
            moving = [i for i, particle in enumerate(particles) if not particle.finished]
            drafts = await session.grow([particles[i] for i in moving], until=self.boundary)
            for i, draft in zip(moving, drafts, strict=True):
                log_w[i] += (draft.reward - particles[i].reward) / beta
                particles[i] = draft
            spare = drafts[-1].uniform if len(drafts) > 1 else spare
        best = max(particles, key=lambda particle: particle.reward)
        chosen = best if self.keep == "best" else weighted_choice(particles, normalized(log_w), spare)
        chosen.verdict = "accepted" if self.keep == "drawn" else "best"
        await session.keep(chosen)
