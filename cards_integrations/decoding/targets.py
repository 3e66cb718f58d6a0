"""What methods with a target go by: a reward to reach, and a temperature on the scale of the reward."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, FiniteFloat

from cards_integrations.decoding.base import Decoding, Session

Beta = Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"]


def beta_for(beta: float | Literal["auto"], session: Session) -> float:
    """Return beta in units of the reward.

    "auto" is what a calibration has chosen, else a fifth of the reward's standard deviation over plain answers, or
    0.7 where that is not known or 0.
    """
    scale = session.reward_scale
    if beta != "auto":
        return beta
    return (scale and (scale.beta or scale.std / 5)) or 0.7


class RewardTargeted(Decoding):
    """A method that compares rewards with a target, softly or not."""

    target_reward: FiniteFloat | Literal["auto"] = "auto"
    """The reward that an answer should reach. "auto" is what `calibrate` has chosen for this pair of models, else the
    mean of the reward over plain answers plus 1.5 standard deviations, measured at first use where the reward does
    not publish it."""
    beta: Beta = "auto"
    """Temperature of the reward, in units of the reward: the lower, the stricter. "auto" is what `calibrate` has
    chosen, else a fifth of the standard deviation."""
    acceptance: Literal["soft", "hard"] = "soft"
    """"soft" accepts with probability min(1, exp((r - target) / beta)), "hard" if r >= target."""

    @property
    def needs_scale(self) -> bool:
        return self.target_reward == "auto" or (self.acceptance == "soft" and self.beta == "auto")

    def target_and_beta(self, session: Session) -> tuple[float, float]:
        """Return both in units of the reward, from the reward's scale where they are "auto"."""
        target, scale = self.target_reward, session.reward_scale
        if target == "auto":
            assert scale is not None  # the engine knows it, if `needs_scale`
            target = scale.mean + 1.5 * scale.std if scale.target is None else scale.target
        return target, beta_for(self.beta, session)
