"""Cascade Reward Sampling (arXiv 2406.16306): segment-level quasi-rejection sampling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cards_integrations.decoding.acceptance import Acceptance, Threshold
from cards_integrations.decoding.base import Draft, Scale, Session
from cards_integrations.decoding.registry import register_method
from cards_integrations.decoding.segmentation import AnyBoundary, Uncertainty
from cards_integrations.decoding.stopping import OptimalStopping
from cards_integrations.decoding.targets import RewardTargeted
from cards_integrations.trace import Guidance, ScaleOrigin

ONLY_WITH_A_TARGET = ("target_reward", "alpha", "beta")  # settings that OptimalStopping makes no use of


@register_method
class Cards(RewardTargeted):
    """Cascade Reward Sampling (arXiv 2406.16306, algorithm 1).

    A candidate s is drawn from p(s | x, y), up to where the predictive uncertainty rises, and accepted with
    probability min(1, exp((r(x, y + s) - tau(t)) / beta)), t being the tokens of y + s. The threshold tau rises
    from r0 = (1 - alpha) r(x) + alpha r* to the target r* (see `Threshold`).

    Examples:
        >>> Cards(target_reward=1.2, beta=0.1, max_rejections=8)
        >>> Cards(acceptance=OptimalStopping(price=0.01), boundary=FixedLength(length=16))
    """

    elsewhere = {  # noqa: RUF012
        name: f"boundary=Uncertainty({name}=...)" for name in Uncertainty.model_fields.keys() - {"kind"}
    }

    method: Literal["cards"] = "cards"
    """Names this method in settings files."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Where the threshold starts: 0 at the reward of the prompt, 1 at the target."""
    acceptance: Literal["soft", "hard"] | OptimalStopping = "soft"  # type: ignore[assignment]
    """"soft" accepts with the probability above, "hard" if r >= tau. `OptimalStopping(price=...)` is a search rule
    that needs neither a target nor a beta."""
    max_rejections: Annotated[int, Field(ge=0)] = 20
    """After so many rejected candidates one more is drawn, and the best of them all is kept."""
    boundary: AnyBoundary = Uncertainty()
    """Where a segment ends."""

    @classmethod
    def paper(cls, target_reward: float = 8.5) -> Cards:
        """Return the settings of the authors' code, which sampled at a temperature of beta (0.7) and with top-k 40."""
        return cls(target_reward=target_reward, alpha=0.5, beta=0.7, boundary=Uncertainty(threshold=3.0))

    @property
    def needs_scale(self) -> bool:
        if isinstance(self.acceptance, OptimalStopping):
            return self.acceptance.unit == "std"
        return super().needs_scale

    def guidance(self, scale: Scale | None, origin: ScaleOrigin | None) -> Guidance | None:
        return None if isinstance(self.acceptance, OptimalStopping) else super().guidance(scale, origin)

    @model_validator(mode="after")
    def _has_one_rule(self) -> Cards:
        if isinstance(self.acceptance, OptimalStopping):
            fields = Cards.model_fields
            unused = [name for name in ONLY_WITH_A_TARGET if getattr(self, name) != fields[name].default]
            if unused:  # the defaults come with every saved setting
                raise ValueError(f"acceptance=OptimalStopping(...) makes no use of {', '.join(unused)}: leave that out")
        return self

    async def generate(self, session: Session) -> None:
        if isinstance(self.acceptance, OptimalStopping):
            rule = self.acceptance.in_rewards(session.reward_scale)
            return await rule.generate(session, self.boundary, self.max_rejections + 1)
        target, beta = self.target_and_beta(session)
        accepts = Acceptance(self.acceptance, beta)
        threshold = Threshold.adaptive(await session.prompt_reward(), target, self.alpha, session.max_tokens)

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
