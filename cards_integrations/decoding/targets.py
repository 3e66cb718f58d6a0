"""Settings of methods that compare rewards with a target: the target, and a temperature in units of the reward."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, FiniteFloat

from cards_integrations.decoding.base import Decoding, Scale, Session
from cards_integrations.trace import Guidance, GuidanceOrigin, ScaleOrigin

Beta = Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"]


def beta_for(beta: float | Literal["auto"], session: Session) -> float:
    """Return beta in units of the reward.

    "auto" is what a calibration has chosen, else a fifth of the reward's standard deviation over plain answers, or
    0.7 where that is not known or 0.
    """
    return chosen_beta(beta, session.reward_scale)[0]


def chosen_beta(
    beta: float | Literal["auto"], scale: Scale | None, origin: ScaleOrigin | None = None
) -> tuple[float, GuidanceOrigin | None]:
    """Return beta as `beta_for` does, and where it came from.

    Args:
        beta: The setting.
        scale: How the reward scores plain answers; None if that is not known.
        origin: Where the scale came from.
    """
    if beta != "auto":
        return beta, "given"
    if scale is not None and scale.beta is not None:
        return scale.beta, "calibrated"
    if scale is not None and scale.std > 0:
        return scale.std / 5, origin
    return 0.7, "default"


class RewardTargeted(Decoding):
    """A method that compares rewards with a target."""

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
        """Return target and beta in units of the reward; what is "auto" follows from the reward's scale."""
        return self._target(session.reward_scale)[0], beta_for(self.beta, session)

    def guidance(self, scale: Scale | None, origin: ScaleOrigin | None) -> Guidance | None:
        target, target_origin = self._target(scale, origin)
        if self.acceptance == "hard":
            return Guidance(target, None, target_origin, None)
        beta, beta_origin = chosen_beta(self.beta, scale, origin)
        return Guidance(target, beta, target_origin, beta_origin)

    def _target(self, scale: Scale | None, origin: ScaleOrigin | None = None) -> tuple[float, GuidanceOrigin | None]:
        if self.target_reward != "auto":
            return self.target_reward, "given"
        assert scale is not None  # the engine knows it, if `needs_scale`
        if scale.target is not None:
            return scale.target, "calibrated"
        return scale.mean + 1.5 * scale.std, origin
