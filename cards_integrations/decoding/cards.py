"""Cascade Reward Sampling (arXiv 2406.16306): segment-level quasi-rejection sampling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cards_integrations.decoding.acceptance import Acceptance, Threshold
from cards_integrations.decoding.base import Draft, Session
from cards_integrations.decoding.registry import register_method
from cards_integrations.decoding.scaled import OnScale
from cards_integrations.decoding.segmentation import AnyBoundary, Uncertainty
from cards_integrations.decoding.stopping import OptimalStopping

REJECTION = ("target_reward", "alpha", "beta")  # what only quasi-rejection goes by


@register_method
class Cards(OnScale):
    """CARDS, algorithm 1 of the paper.

    A candidate s is drawn from p(s | x, y) up to where uncertainty rises, and kept with probability
    min(1, exp((r(x, y + s) - tau(t)) / beta)) (`acceptance="soft"`), or when r >= tau (`"hard"`).
    After `max_rejections` rejected candidates one more is drawn and the best of them all is kept.
    `OptimalStopping(price=...)` is a search rule instead that needs neither target nor beta.
    """

    method: Literal["cards"] = "cards"
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    acceptance: Literal["soft", "hard"] | OptimalStopping = "soft"  # type: ignore[assignment]
    max_rejections: Annotated[int, Field(ge=0)] = 20
    boundary: AnyBoundary = Uncertainty()

    @classmethod
    def paper(cls, target_reward: float = 8.5) -> Cards:
        """The settings of the authors' code; its temperature was beta, so sample at 0.7 and top-k 40."""
        return cls(target_reward=target_reward, alpha=0.5, beta=0.7, boundary=Uncertainty(threshold=3.0))

    @property
    def needs_scale(self) -> bool:
        return super().needs_scale and not isinstance(self.acceptance, OptimalStopping)

    @model_validator(mode="after")
    def _has_one_rule(self) -> Cards:
        if isinstance(self.acceptance, OptimalStopping):
            unused = [name for name in REJECTION if getattr(self, name) != Cards.model_fields[name].default]
            if unused:  # the defaults come with every saved setting
                raise ValueError(f"acceptance=OptimalStopping(...) makes no use of {', '.join(unused)}: leave that out")
        return self

    async def generate(self, session: Session) -> None:
        if isinstance(self.acceptance, OptimalStopping):
            return await self.acceptance.generate(session, self.boundary, self.max_rejections + 1)
        target, beta = self.on_scale_of(session)
        accepts = Acceptance(self.acceptance, beta)
        threshold = Threshold.rising(await session.prompt_reward(), target, self.alpha, session.max_tokens)

        def passes(draft: Draft) -> bool:
            last = draft.index == self.max_rejections
            return not last and accepts(draft.reward, threshold.at(draft.end), draft.uniform)

        while not session.finished:
            async for draft in session.drafts(until=self.boundary, limit=self.max_rejections + 1, passes=passes):
                draft.threshold = threshold.at(draft.end)
                if passes(draft):
                    draft.verdict = "accepted"
                    await session.keep(draft)
                    break
                session.reject(draft)
            else:
                await session.keep_best()
