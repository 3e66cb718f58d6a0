"""Reward models: pluggable settings objects. To add one, write one file and import it here."""

from __future__ import annotations

from cards_integrations.rewards.base import Conversation, Loader, Response, Reward, RewardModel
from cards_integrations.rewards.classifier import ClassifierReward
from cards_integrations.rewards.criterion import Criterion
from cards_integrations.rewards.critique_judge import CritiqueJudgeReward
from cards_integrations.rewards.fluency import FluencyReward
from cards_integrations.rewards.function import FunctionReward
from cards_integrations.rewards.gate import GateReward
from cards_integrations.rewards.graded_judge import GradedJudgeReward
from cards_integrations.rewards.groundedness import GroundednessReward
from cards_integrations.rewards.guarded import GuardedReward
from cards_integrations.rewards.implicit import ImplicitReward
from cards_integrations.rewards.judge import JudgeReward
from cards_integrations.rewards.length import LengthReward
from cards_integrations.rewards.loader import RewardLoader
from cards_integrations.rewards.minimum import MinReward
from cards_integrations.rewards.pattern import PatternReward
from cards_integrations.rewards.process import ProcessReward
from cards_integrations.rewards.registry import HELD_OUT, NAMED, REWARDS, AnyReward, as_reward, register_reward
from cards_integrations.rewards.relevance import RelevanceReward
from cards_integrations.rewards.remote import RemoteReward
from cards_integrations.rewards.value import ValueReward
from cards_integrations.rewards.weighted import WeightedReward

NAMED |= {
    "sentiment": GuardedReward(
        reward=ClassifierReward(
            model="smollm2", adapter="sentiment-smollm2", prompt_format="chat", end_of_turn=False, scale=(0.75, 0.53)
        )
    ),
    "sentiment-minilm": ClassifierReward(
        model="minilm", adapter="sentiment-minilm", prompt_format="{response}", scale=(0.3, 0.4)
    ),
}
HELD_OUT |= {"sentiment": "sentiment-minilm"}

__all__ = [
    "HELD_OUT",
    "NAMED",
    "REWARDS",
    "AnyReward",
    "ClassifierReward",
    "Conversation",
    "Criterion",
    "CritiqueJudgeReward",
    "FluencyReward",
    "FunctionReward",
    "GateReward",
    "GradedJudgeReward",
    "GroundednessReward",
    "GuardedReward",
    "ImplicitReward",
    "JudgeReward",
    "LengthReward",
    "Loader",
    "MinReward",
    "PatternReward",
    "ProcessReward",
    "RelevanceReward",
    "RemoteReward",
    "Response",
    "Reward",
    "RewardLoader",
    "RewardModel",
    "ValueReward",
    "WeightedReward",
    "as_reward",
    "register_reward",
]
