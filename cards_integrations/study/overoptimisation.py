"""The part of a calibration that measures a held-out reward, which does not guide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cards_integrations.errors import ModelError
from cards_integrations.rewards import as_reward
from cards_integrations.rewards.base import Reward
from cards_integrations.rewards.registry import held_out_for
from cards_integrations.study.calibration import Calibration, Choice
from cards_integrations.study.held_out import HeldOutCurve, measured
from cards_integrations.study.runner import Runner
from cards_integrations.trace import Alignment

LEVEL_STDS = (0.5, 1.0, 1.5, 2.0, 2.5)  # targets that are measured, in standard deviations above the mean
SAME_STDS = 0.1  # standard deviations; a target nearer than this to the one that was asked for is not measured


def judge_for(held_out: Any, guide: Reward) -> Reward | None:
    """Return the reward that `held_out` asks for; "auto" is the one that comes with the guide, if there is one."""
    if held_out == "auto":
        return held_out_for(guide)
    return None if held_out is None else as_reward(held_out)


@dataclass(frozen=True)
class Wish:
    """What the caller of a calibration asked for about the held-out reward."""

    judge: Reward
    """The held-out reward."""
    optional: bool
    """True if the calibration goes on without it if its model cannot be loaded."""
    targets: Sequence[float] | None
    """The targets to measure; None for those of `LEVEL_STDS`."""
    target_is_given: bool
    """True if a budget, a goal or a quantile asks for the target that the calibration has chosen."""


def with_held_out(calibration: Calibration, runner: Runner, plain: Sequence[Alignment], wish: Wish) -> Calibration:
    """Measure a held-out reward over the target, and choose the target by it.

    Args:
        calibration: The calibration without it.
        runner: Answers the prompts.
        plain: The plain answers to them.
        wish: What was asked for.

    Returns:
        The calibration with the held-out reward, its choice, and its warnings.

    Raises:
        ModelError: The model of a held-out reward that is not optional cannot be loaded.
    """
    judge = wish.judge
    try:
        levels = [measured(plain, _rewards(plain), runner.scores(plain, judge))]
    except ModelError as error:
        if not wish.optional:
            raise
        warning = f"the held-out reward {judge.name!r} is not looked at, for it cannot be read: {error}"
        return replace(calibration, warnings=(warning,))
    for choice in _tried(calibration, wish):
        answers = runner.answers(calibration.decoding_for(choice), f"answers with target {choice.target:.3g}")
        scores = runner.scores(answers, judge)
        levels.append(measured(answers, _rewards(answers), scores, levels[0], choice.target, choice.beta))
    found = HeldOutCurve(judge, tuple(levels))
    lowered = wish.target_is_given and found.is_beyond(calibration.chosen.target)
    warnings = _warnings(found)
    if lowered:
        warnings.append(f"the target {calibration.chosen.target:.3g} is beyond the peak, and was lowered.")
    if lowered or not wish.target_is_given:
        calibration = replace(calibration, chosen=_choice(calibration, found.chosen))
    warnings += _unreached(found, calibration.chosen.target)
    return replace(calibration, held_out=found, warnings=tuple(warnings))


def _tried(calibration: Calibration, wish: Wish) -> list[Choice]:
    """Return the choices whose answers are measured: up to the target that was asked for, if there is one."""
    scale, wanted = calibration.scale, calibration.chosen.target
    targets = wish.targets or [scale.mean + stds * scale.std for stds in LEVEL_STDS]
    if wish.target_is_given:
        targets = [*(target for target in targets if target < wanted - SAME_STDS * scale.std), wanted]
    return [_choice(calibration, target) for target in sorted(targets)]


def _choice(calibration: Calibration, target: float) -> Choice:
    """Return a target with the beta and the prediction of the nearest one that was simulated."""
    return replace(min(calibration.curve, key=lambda choice: abs(choice.target - target)), target=float(target))


def _rewards(answers: Sequence[Alignment]) -> list[float]:
    return [answer.reward or 0.0 for answer in answers]


def _warnings(found: HeldOutCurve) -> list[str]:
    if found.peak.target is None:
        return ["no target gives more of the held-out reward than plain answers have."]
    return [found.conclusion] if found.parting is not None else []


def _unreached(found: HeldOutCurve, chosen: float) -> list[str]:
    """Return a warning if answers at the chosen target have no accepted segment."""
    shares = [level.out_of_reach for level in found.levels if level.target == chosen and level.out_of_reach]
    return [
        f"{100 * share:.0f}% of the answers at the chosen target have no accepted segment: each is the best of its "
        "rejected candidates, for the target is out of reach."
        for share in shares
    ]
