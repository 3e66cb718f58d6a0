"""A value head on the language model that drafts: a reward that costs nothing extra."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from cards_integrations.errors import RewardError
from cards_integrations.rewards.base import Loader, Reward, RewardModel
from cards_integrations.rewards.registry import register_reward


@register_reward
class ValueReward(Reward):
    """What a trained head reads off the last hidden states of the language model that drafts.

    They are that after the last token of the answer so far, and the mean of those after all of its tokens. The
    drafting computes them anyway: nothing is read for the reward. `CardsLLM.train_value`, or `cards train-value`,
    makes a head from any other reward, its teacher.
    """

    kind: Literal["value"] = "value"
    """Names this class in settings files."""
    path: Annotated[str, Field(min_length=1)]
    """The file of the trained head. A running engine keeps the one that it has read."""

    @property
    def name(self) -> str:
        return f"value {Path(self.path).name}"

    @property
    def published_scale(self) -> tuple[float, float] | None:
        from cards_integrations.rewards.value_head import read_card

        try:
            return self.scale or read_card(self.path).scale
        except RewardError:
            return None  # to load it says why

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
