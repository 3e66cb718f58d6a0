"""The reward that a tuned model implies, relative to the model that it was tuned from."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cards_integrations.models.local.settings import AnyLocalModel
from cards_integrations.rewards.base import Loader, Reward, RewardModel
from cards_integrations.rewards.registry import register_reward


@register_reward
class ImplicitReward(Reward):
    """beta * (log p_tuned(y | x) - log p_base(y | x)), in nats: equation 5 of DPO (arXiv 2305.18290).

    TreeBoN (arXiv 2410.16033) is guided by it. The log p of the language model that drafts costs nothing. So the usual
    choice is to draft with the base model and to name the tuned one, which may be an adapter on the same weights:
    `LocalModel(model=..., adapter=...)`.
    """

    kind: Literal["implicit"] = "implicit"
    """Names this class in settings files."""
    tuned: AnyLocalModel | None = None
    """The tuned model; None is the language model that drafts."""
    base: AnyLocalModel | None = None
    """The model it was tuned from; None is the language model that drafts."""
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """Weight of the difference in log p."""

    @model_validator(mode="after")
    def _two_models(self) -> Self:
        if self.tuned == self.base:
            raise ValueError("tuned and base are the same model: their difference is always 0")
        return self

    @property
    def name(self) -> str:
        tuned, base = (m.adapter or m.model if m else "the language model" for m in (self.tuned, self.base))
        return f"implicit ({tuned} over {base})"

    def build(self, loader: Loader) -> RewardModel:
        from cards_integrations.rewards.scorers.implicit import Implicit
        from cards_integrations.rewards.scorers.likelihood import likelihood

        named = {"log p tuned": self.tuned, "log p base": self.base}
        return Implicit(
            self.name, [likelihood(loader.causal(spec, name), name) for name, spec in named.items()], self.beta
        )
