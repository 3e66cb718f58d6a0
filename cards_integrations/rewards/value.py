"""A value head on the language model that drafts: a reward without a forward of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from cards_integrations.errors import RewardError
from cards_integrations.rewards.base import Loader, Reward, RewardModel
from cards_integrations.rewards.registry import register_reward


@register_reward
class ValueReward(Reward):
    """The prediction of a trained head from last hidden states of the language model that drafts.

    It reads the state after the last token of the answer so far, and the mean of the states after all its tokens. The
    drafting computes these anyway, so that nothing is read for the reward. `CardsLLM.train_value`, or
    `cards train-value`, trains a head on any other reward, its teacher.
    """

    kind: Literal["value"] = "value"
    """Names this class in settings files."""
    path: Annotated[str, Field(min_length=1)]
    """The file of the trained head. A running engine reads it once."""

    @property
    def name(self) -> str:
        return f"value {Path(self.path).name}"

    @property
    def published_scale(self) -> tuple[float, float] | None:
        from cards_integrations.rewards.value_head import read_card

        try:
            return self.scale or read_card(self.path).scale
        except RewardError:
            return None  # loading the head will say why

    def build(self, loader: Loader) -> RewardModel:
        from cards_integrations.rewards.scorers.value import Value
        from cards_integrations.rewards.value_head import ValueHead

        causal = loader.causal(None, self.name)
        model = Value(self.name, causal, ValueHead.load(self.path))
        try:
            model.check()
        except BaseException:
            model.release()
            raise
        return model
