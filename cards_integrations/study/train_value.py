"""Trains a head on the hidden states of the drafting model to predict another reward, its teacher."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from cards_integrations.decoding import Uncertainty
from cards_integrations.decoding.segmentation import AnyBoundary
from cards_integrations.engine.engine import Engine
from cards_integrations.errors import SettingsError
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.rewards import ValueReward
from cards_integrations.rewards.value_head import PROBE, Target, ValueCard, ValueHead
from cards_integrations.settings import Options
from cards_integrations.study.aligner import Aligner
from cards_integrations.study.metrics import pearson, spearman
from cards_integrations.study.prefixes import Prefixes, ScoredPrefixes, collect_prefixes
from cards_integrations.study.ridge import Ridge, fit_ridge

MIN_PROMPTS = 20


@dataclass(frozen=True)
class TrainedValue:
    """A value head, and how well it predicts on prompts that it was not trained on."""

    path: Path
    """The file that was written."""
    head: ValueHead
    """The head."""

    @property
    def card(self) -> ValueCard:
        """What the head was trained on, and its correlations."""
        return self.head.card

    @property
    def reward(self) -> ValueReward:
        """A reward that guides by the head."""
        return ValueReward(path=str(self.path))

    def __str__(self) -> str:
        card, (mean, std) = self.card, self.card.scale
        what = "the reward of the finished answer" if card.target == "value" else "the reward of the answer so far"
        lines = [
            f"A value head on {card.trained_on} that foretells {what}, of {card.teacher!r}: {self.path}",
            f"Trained on {card.prefixes[0]} answers so far, to {card.prompts[0]} prompts; penalty {card.penalty:.2g}.",
            f"On {card.prefixes[1]}, to {card.prompts[1]} other prompts: Pearson {card.pearson:.2f}, Spearman "
            f"{card.spearman:.2f}.",
            f"Its values of whole plain answers have mean {mean:.3g} and standard deviation {std:.2g}.",
        ]
        return "\n".join(lines)


def train_value(
    llm: Aligner,
    prompts: Sequence[Any],
    path: str | Path,
    *,
    contexts: Sequence[Any] | None = None,
    target: Target = "prefix",
    boundary: AnyBoundary | None = None,
    held_out: float = 0.25,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> TrainedValue:
    """Train a value head: a ridge regression from the drafting model's hidden states to the reward.

    The prompts get plain answers, and the reward scores each beginning of these that ends with a segment.

    Args:
        llm: The language model, with the reward that teaches.
        prompts: Strings or lists of messages, at least 20, better some hundreds, like those of later requests.
        path: The file to write.
        contexts: The context of each prompt, for rewards that read it.
        target: "prefix" predicts the reward of the answer so far; "value" that of the finished answer.
        boundary: Where a segment ends; by default the boundary of `decoding`, if it has one.
        held_out: The share of the prompts on which the head is tested and not trained.
        seed: The seed of the first answer, and of the split.
        progress: Whether to show the progress; `progress=False` of the LLM takes precedence.
        options: Arguments of `align` that replace the LLM's own options, such as `reward`.

    Returns:
        The head, which was written, with its test.

    Raises:
        SettingsError: There is no reward, there are too few prompts, or the language model is not a local one.
    """
    chosen = llm.resolve_options(options)
    if chosen.reward is None:
        raise SettingsError("train_value: there is no reward to learn from; pass reward=.")
    if not isinstance(chosen.model, LocalModel):
        raise SettingsError(
            f"train_value: model={chosen.model.model!r} is not a local model, and shows no hidden state: pass a local "
            "one."
        )
    if target not in get_args(Target):
        raise SettingsError(f"train_value: target={target!r}: pass 'value' or 'prefix'.")
    if len(prompts) < MIN_PROMPTS:
        raise SettingsError(f"train_value: {len(prompts)} prompts are too few; give at least {MIN_PROMPTS}.")
    _check_split(len({repr(prompt) for prompt in prompts}), held_out)
    boundary = boundary or getattr(chosen.decoding, "boundary", None) or Uncertainty()
    options = {**options, "decoding": ScoredPrefixes(boundary=boundary), "stop": (), "finish_at": "token"}
    engine = llm.engine_for(options, llm)
    found = collect_prefixes(llm, engine, prompts, contexts, seed, progress, options)
    return fit_head(engine, chosen, found, path, target, held_out, seed)


def fit_head(
    engine: Engine, trained: Options, found: Prefixes, path: str | Path, target: Target, held_out: float, seed: int
) -> TrainedValue:
    """Fit a head to prefixes that have been collected, and write it.

    Args:
        engine: The engine of the language model.
        trained: The options with which the prefixes were collected: model, teacher and length limit.
        found: The prefixes.
        path: The file to write.
        target: As for `train_value`.
        held_out: As for `train_value`.
        seed: The seed of the split.

    Raises:
        SettingsError: The split leaves too few prompts to train or to test on.
    """
    assert isinstance(trained.model, LocalModel)
    assert trained.reward is not None
    probe_ids = engine.loaded().chat.encode(PROBE) or [0]
    [probe] = engine.states([(probe_ids[:1], probe_ids[1:])])
    prompts = int(found.prompts.max()) + 1
    tested = _check_split(prompts, held_out)
    order = torch.randperm(prompts, generator=torch.Generator().manual_seed(seed)).tolist()
    test, train = found.of(order[:tested]), found.of(order[tested:])
    fit = fit_ridge(train.states, train.targets(target), train.prompts)
    card = ValueCard(
        model=trained.model.model,
        revision=trained.model.revision,
        adapter=trained.model.adapter,
        probe_ids=probe_ids,
        teacher=trained.reward.name,
        target=target,
        max_tokens=trained.max_tokens,
        prompts=(prompts - tested, tested),
        prefixes=(len(train.states), len(test.states)),
        penalty=fit.penalty,
        **_worth(fit, test, target),
    )
    head = ValueHead(fit.weight.float().view(2, -1), fit.bias, probe, card)
    head.save(path)
    return TrainedValue(Path(path), head)


def _check_split(prompts: int, held_out: float) -> int:
    """Return how many of so many different prompts to test on.

    Raises:
        SettingsError: They are too few, or leave too few to train on.
    """
    tested = round(prompts * held_out)
    if not 2 <= tested <= prompts - 2:
        raise SettingsError(
            f"train_value: held_out={held_out:g} leaves {tested} of {prompts} different prompts to test on: give more "
            "prompts, or leave at least 2 on each side."
        )
    return tested


def _worth(fit: Ridge, test: Prefixes, target: Target) -> dict[str, Any]:
    """Return the correlations and the scale of a head on prompts that it was not trained on."""
    values, targets = fit(test.states), test.targets(target).tolist()
    wholes = values[test.whole].tolist()
    return {
        "pearson": pearson(values.tolist(), targets),
        "spearman": spearman(values.tolist(), targets),
        "scale": (statistics.fmean(wholes), statistics.stdev(wholes)),
    }
