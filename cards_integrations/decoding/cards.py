"""Cascade Reward Sampling (arXiv 2406.16306): segment-level quasi-rejection sampling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cards_integrations.decoding.acceptance import Acceptance, Threshold
from cards_integrations.decoding.base import Decoding, Draft, Session
from cards_integrations.decoding.segmentation import AnyBoundary, Uncertainty
from cards_integrations.errors import SettingsError

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Cards(Decoding):
    """CARDS, algorithm 1 of the paper.

    A candidate s is drawn from p(s | x, y) up to where uncertainty rises, and kept with probability
    min(1, exp((r(x, y + s) - tau(t)) / beta)) (`acceptance="soft"`), or when r >= tau (`"hard"`).
    After `max_rejections` rejected candidates one more is drawn and the best of them all is kept.

    `target_reward` and `beta` follow the scale of the reward model. "auto" takes mean + 1.5 spreads
    and a fifth of a spread for a reward that publishes its scale, and asks for a number otherwise.
    """

    method: Literal["cards"] = "cards"
    target_reward: Finite | Literal["auto"] = "auto"
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] = "auto"
    acceptance: Literal["soft", "hard"] = "soft"
    max_rejections: Annotated[int, Field(ge=0)] = 20
    boundary: AnyBoundary = Uncertainty()

    @classmethod
    def paper(cls, target_reward: float = 8.5) -> Cards:
        """The settings of the authors' code; its temperature was beta, so sample at 0.7 and top-k 40."""
        return cls(target_reward=target_reward, alpha=0.5, beta=0.7, boundary=Uncertainty(threshold=3.0))

    async def generate(self, session: Session) -> None:
        target, beta = self._on_scale_of(session)
        accepts = Acceptance(self.acceptance, beta)
        threshold = Threshold.rising(await session.prompt_reward(), target, self.alpha, session.max_tokens)

        def passes(draft: Draft) -> bool:
            last = draft.index == self.max_rejections
            return not last and accepts(draft.reward, threshold.at(draft.end), draft.uniform)

        while not session.finished:
            best: Draft | None = None
            async for draft in session.drafts(until=self.boundary, limit=self.max_rejections + 1, passes=passes):
                draft.threshold = threshold.at(draft.end)
                if passes(draft):
                    draft.verdict, best = "accepted", draft
                    break
                draft.verdict = "rejected"
                best = session.better(best, draft)
            assert best is not None  # a session yields at least one draft
            if best.verdict == "rejected":
                best.verdict = "best"
            await session.keep(best)

    def _on_scale_of(self, session: Session) -> tuple[float, float]:
        scale = session.reward_scale
        if self.target_reward == "auto" and scale is None:
            raise SettingsError(
                "decoding.target_reward='auto' needs a reward that publishes its scale, and this one does not: "
                "pass Cards(target_reward=..., beta=...), about 1.5 spreads above the mean reward of plain "
                "answers, and a fifth of the spread."
            )
        mean, spread = scale or (0.0, 0.0)
        target = mean + 1.5 * spread if self.target_reward == "auto" else self.target_reward
        beta = (spread / 5 or 0.7) if self.beta == "auto" else self.beta
        return target, beta
