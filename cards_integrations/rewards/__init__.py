"""Reward models: pluggable settings objects. To add one, write one file and name it in `REWARDS`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from cards_integrations.errors import SettingsError, unknown
from cards_integrations.rewards.base import Conversation, Response, Reward, RewardModel
from cards_integrations.rewards.classifier import ClassifierReward
from cards_integrations.rewards.function import FunctionReward

REWARDS: dict[str, type[Reward]] = {"classifier": ClassifierReward, "function": FunctionReward}

NAMED: dict[str, Reward] = {
    "sentiment": ClassifierReward(
        model="smollm2", adapter="sentiment-smollm2", prompt_format="chat", end_of_turn=False, scale=(0.75, 0.53)
    ),
    "sentiment-minilm": ClassifierReward(
        model="minilm", adapter="sentiment-minilm", prompt_format="{response}", scale=(0.3, 0.4)
    ),
}


def as_reward(value: Any) -> Reward:
    """A reward from a name, a hub id, a directory, a callable, its settings as a dict, or itself."""
    if isinstance(value, Reward):
        return value
    if isinstance(value, str) and value.startswith("{"):
        value = json.loads(value)
    if isinstance(value, (str, Path)):
        name = str(value)
        if name in NAMED:
            return NAMED[name]
        if "/" in name or Path(name).is_dir():
            return ClassifierReward(model=name)
        raise unknown("reward", name, NAMED, " Or pass a hub id, a directory, a function or a settings object.")
    if isinstance(value, dict):
        kind = str(value.get("kind"))
        if kind not in REWARDS:
            raise unknown("reward.kind", kind, REWARDS)
        return REWARDS[kind].model_validate(value)
    if callable(value):
        return FunctionReward(function=value)
    raise SettingsError(f"reward={value!r}: pass a name, a hub id, a directory, a function or a settings object.")


AnyReward = Annotated[SerializeAsAny[Reward], BeforeValidator(as_reward)]

__all__ = [
    "NAMED",
    "REWARDS",
    "AnyReward",
    "ClassifierReward",
    "Conversation",
    "FunctionReward",
    "Response",
    "Reward",
    "RewardModel",
    "as_reward",
]
