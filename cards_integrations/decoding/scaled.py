"""Methods with a target and a temperature on the scale of the reward."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, FiniteFloat

from cards_integrations.decoding.base import Decoding, Session

Beta = Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"]


def beta_for(beta: float | Literal["auto"], session: Session) -> float:
    """As given, or what a calibration chose, or a fifth of a spread of the reward over plain answers."""
    scale = session.reward_scale
    if beta != "auto":
        return beta
    return (scale and (scale.beta or scale.std / 5)) or 0.7


class OnScale(Decoding):
    """`target_reward` and `beta` follow the scale of the reward model.

    "auto" takes what `calibrate` has chosen for this pair of models, else mean + 1.5 spreads and a fifth
    of a spread of the reward over plain answers, which is measured at first use where the reward does not
    publish it.
    """

    target_reward: FiniteFloat | Literal["auto"] = "auto"
    beta: Beta = "auto"
    acceptance: Literal["soft", "hard"] = "soft"
    """min(1, exp((r - target) / beta)), or r >= target."""

    @property
    def needs_scale(self) -> bool:
        return self.target_reward == "auto" or (self.acceptance == "soft" and self.beta == "auto")

    def on_scale_of(self, session: Session) -> tuple[float, float]:
        """Target and beta, from the reward's scale where they are "auto"."""
        target, scale = self.target_reward, session.reward_scale
        if target == "auto":
            assert scale is not None  # the engine knows it, if `needs_scale`
            target = scale.mean + 1.5 * scale.std if scale.target is None else scale.target
        return target, beta_for(self.beta, session)
