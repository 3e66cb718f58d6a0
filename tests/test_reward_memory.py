"""What a reward model remembers of a response ends with `keep` or `drop`, and of a conversation with `close`."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import tiny

from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.settings import LocalModel, Placement
from cards_integrations.rewards import (
    ClassifierReward,
    Conversation,
    GateReward,
    GradedJudgeReward,
    GroundednessReward,
    ImplicitReward,
    JudgeReward,
    LengthReward,
    MinReward,
    PatternReward,
    Response,
    Reward,
    RewardLoader,
    RewardModel,
)
from cards_integrations.trace import Usage

CONTEXT = ("w10 w11 w12 .",)


def rewards(models: Callable[..., str]) -> dict[str, Reward]:
    decoder = ClassifierReward(model=models("llama", classifier=True), scale=(0, 1))
    encoder = ClassifierReward(model=models("bert", classifier=True), scale=(0, 1))
    return {
        "decoder": decoder,
        "encoder": encoder,
        "sentences": decoder.model_copy(update={"granularity": "sentence"}),
        "implicit": ImplicitReward(tuned=LocalModel(model=models("mistral"))),
        "judge": JudgeReward(words=("w7", "w8")),
        "graded judge": GradedJudgeReward(criteria=["w30", "w31 w32"], grades=["w7", "w7 w8", "w9"]),
        "likelihood": GroundednessReward(),
        "entailment": GroundednessReward(by="entailment", model=encoder.model, label="LABEL_0"),
        "gate": GateReward(gate=PatternReward(forbidden="w30"), reward=decoder),
        "nested": MinReward(rewards=[MinReward(rewards=[decoder, encoder], scale=(0, 1)), LengthReward(target=3)]),
    }


def parts(model: RewardModel) -> list[RewardModel]:
    """The model, and all that it is made of."""
    return [model, *(each for part in getattr(model, "models", ()) for each in parts(part))]


def remembered(model: RewardModel) -> list[Any]:
    """Conversations and responses that are keys of a dict or members of a set of the model."""
    tables = [table for part in parts(model) for table in vars(part).values() if isinstance(table, (dict, set))]
    return [key for table in tables for key in table if isinstance(key, (Conversation, Response))]


@pytest.mark.parametrize(
    "kind",
    [
        "decoder",
        "encoder",
        "sentences",
        "implicit",
        "judge",
        "graded judge",
        "likelihood",
        "entailment",
        "gate",
        "nested",
    ],
)
async def test_nothing_stays_referenced(models: Callable[..., str], kind: str) -> None:
    loader = ModelLoader(Placement(dtype="float32"))
    loader.causal(LocalModel(model=models("llama")))
    model = RewardLoader(loader)[rewards(models)[kind]]
    talk = Conversation("w7 w8 w9", Usage(), CONTEXT)
    model.open(talk)
    first, *others = [Response(talk, text) for text in ("w20 w21 . w22", "w23 .", "w24 w25 . w26")]
    await model.score([first, *others])
    child = Response(talk, "w20 w21 . w22 w27 .", parent=first)
    await model.score([child])
    gone = [weakref.ref(response) for response in (*others, child)]
    model.drop(child)
    for response in others:
        model.drop(response)
    del others, child, response
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
    model.keep(first)
    gone = [weakref.ref(first)]
    del first
    gc.collect()
    assert gone[0]() is None

    await model.score([Response(talk, "w20 w21 . w22 w28 .")])  # neither kept nor dropped
    model.close(talk)
    assert remembered(model) == []
    for part in parts(model):
        if hasattr(part, "transformer"):
            assert not part.transformer.cache.trees
    ended = weakref.ref(talk)
    del talk
    gc.collect()
    assert ended() is None


async def test_a_kept_response_is_read_no_more(models: Callable[..., str]) -> None:
    """As the parent of what was drafted ahead of it, it is like none: what it said is in the trunk by then."""
    model = RewardLoader(ModelLoader(Placement(dtype="float32")))[rewards(models)["decoder"]]
    talk = Conversation("w7 w8 w9", Usage())
    model.open(talk)
    ids = tiny.words()("w20 w21")["input_ids"]
    first = Response(talk, "w20 w21", ids)
    await model.score([first])
    model.keep(first)
    read = talk.usage.rm_tokens
    await model.score([Response(talk, "w20 w21 w22", parent=first)])
    assert talk.usage.rm_tokens == read + 1
