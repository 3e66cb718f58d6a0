"""Requests share decode steps: many at once take few more steps than one alone."""

from __future__ import annotations

from pathlib import Path

from conftest import Start

from cards_integrations.decoding import Cards, Uncertainty
from cards_integrations.engine import Request
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward


def test_sixteen_at_once_take_a_third_of_the_steps(shared_models: Path, start: Start) -> None:
    reward = ClassifierReward(model=str(shared_models / "rm-sentiment-stories260k"))
    decoding = Cards(target_reward=0.6, beta=0.1, boundary=Uncertainty(threshold=2.5))
    requests = [
        Request(f"{name} went to the park", decoding, reward, Sampler(temperature=0.9), 48, seed=seed)
        for seed, name in enumerate(["Tom", "Lily", "The big dog", "Mom"] * 4)
    ]
    engine = start(shared_models / "stories260k")
    alone = [engine.run(request) for request in requests]
    steps_alone = engine.loaded().steps
    together = engine.run_many(requests)
    steps_together = engine.loaded().steps - steps_alone
    print(f"{steps_alone} decode steps one after another, {steps_together} at once")
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert steps_together * 3 <= steps_alone
