"""Choose the settings of CARDS for a language model and a reward model."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cards_integrations.decoding import Cards, OptimalStopping, Sampling, Uncertainty
from cards_integrations.decoding.base import Scale
from cards_integrations.errors import SettingsError
from cards_integrations.rewards import AnyReward
from cards_integrations.study.aligner import Aligner
from cards_integrations.study.calibration import FRACTIONS, Calibration, Choice
from cards_integrations.study.overoptimisation import Wish, judge_for, with_held_out
from cards_integrations.study.pilot import Pilot
from cards_integrations.study.runner import Runner
from cards_integrations.study.simulation import Prediction, SimulationSettings, Simulator
from cards_integrations.trace import Alignment

log = logging.getLogger("cards_integrations")
MIN_PROMPTS = 8
TARGET_STDS = np.arange(-1.0, 3.55, 0.1)  # targets that are simulated, in standard deviations above the mean
BETA_STDS = (0.1, 0.2, 0.4)  # betas that are simulated, in standard deviations
DEFAULT_TARGET_STDS = 1.5  # the default target, in standard deviations above the mean
WEAK_CORRELATION = 0.3  # of half an answer's reward with the whole one's; below it CARDS cannot decide by beginnings
MOSTLY = 0.5  # share of the segments above which a warning says that the target is out of reach
MAX_PREDICTABLE_STDS = 2.0  # standard deviations above the mean; plain answers beyond it are too few for predictions


def calibrate(
    llm: Aligner,
    prompts: Sequence[Any] | None = None,
    *,
    contexts: Sequence[Any] | None = None,
    budget: float | None = None,
    goal: float | None = None,
    quantile: float | None = None,
    segment_length: float | None = None,
    candidates: int = 4,
    held_out: AnyReward | str | Callable[..., Any] | None = "auto",
    targets: Sequence[float] | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Calibration:
    """Choose entropy threshold, target and beta for the models and the `max_tokens` of an LLM.

    It drafts and scores several candidates for each segment of plain answers, and of answers that keep the best
    candidate; learns how rewards move along an answer (`Simulator`); and simulates CARDS for many targets and betas. At
    most one of `budget`, `goal` and `quantile` may be given; without any of them, the target is 1.5 standard deviations
    above the mean of plain answers.

    With a held-out reward, which does not guide, the prompts are also answered with a few targets. Then the target is
    the lowest one whose held-out reward is within a standard error of the peak's. A target that a budget, a goal or a
    quantile asks for is lowered to it only if it is above the peak, and worse by more than a standard error.

    Args:
        llm: The language model, with its reward.
        prompts: Strings or lists of messages, at least 8, better 50. By default, the built-in ones of the reward.
        contexts: The context of each prompt, for rewards that read it.
        budget: Tokens of examined drafts, as a multiple of a plain answer's tokens.
        goal: The mean reward that answers should reach.
        quantile: The target, as a quantile of the rewards of plain answers.
        segment_length: The mean length of a segment in tokens, which sets the entropy threshold; without it the
            threshold of `decoding` stays.
        candidates: Scored candidates of each segment.
        held_out: A reward that judges and does not guide. "auto" is the one that comes with the guiding reward:
            "sentiment-minilm" for "sentiment", and none for others. None uses no such reward.
        targets: The targets at which the held-out reward is measured; by default 0.5, 1, 1.5, 2 and 2.5 standard
            deviations above the mean of plain answers, or up to the target that a budget, a goal or a quantile asks
            for.
        seed: The seed of the first answer; those of the others follow it.
        progress: Whether to show the progress; `progress=False` of the LLM takes precedence.
        options: Arguments of `align` that replace the LLM's own options, such as `reward` or `decoding`.

    Returns:
        What was measured and chosen.

    Raises:
        SettingsError: Arguments exclude each other, there is no reward, or there are too few prompts.
    """
    if sum(wanted is not None for wanted in (budget, goal, quantile)) > 1:
        raise SettingsError("calibrate: give only one of budget=, goal= and quantile=.")
    chosen = llm.resolve_options(options)
    if chosen.reward is None:
        raise SettingsError("calibrate: there is no reward to calibrate; pass reward=.")
    if prompts is None:
        prompts, contexts = zip(*chosen.reward.prompts, strict=True)
    if len(prompts) < MIN_PROMPTS:
        raise SettingsError(f"calibrate: {len(prompts)} prompts are too few; give at least {MIN_PROMPTS}.")
    requested = chosen.decoding if isinstance(chosen.decoding, Cards) else Cards()
    if isinstance(requested.acceptance, OptimalStopping):
        requested = requested.model_copy(update={"acceptance": "soft"})  # a target is what is calibrated
    boundary = requested.boundary if isinstance(requested.boundary, Uncertainty) else Uncertainty()
    runner = Runner(llm, prompts, contexts or [None] * len(prompts), seed, progress, options)

    if segment_length is not None:
        plain = runner.answers(Sampling(), "plain answers")
        uncertainties = llm.engine_for(options, llm).uncertainties(boundary.measure, plain)
        boundary = _boundary_for(segment_length, uncertainties, boundary)
    pilot = Pilot(boundary=boundary, candidates=candidates)
    answers = runner.answers(pilot, "plain answers with scored drafts")
    best_answers = runner.answers(pilot.model_copy(update={"keep": "best"}), "answers of the best drafts")
    rewards = [answer.reward or 0.0 for answer in answers]
    scale = Scale(mean=statistics.fmean(rewards), std=statistics.stdev(rewards))
    curve = _curve(Simulator([*answers, *best_answers], chosen.max_tokens), requested, scale)
    plain_tokens = statistics.fmean(len(answer.token_ids) for answer in answers)
    segments = statistics.fmean(len(answer.segments) for answer in answers)
    calibration = Calibration(
        model=chosen.model,
        reward=chosen.reward,
        max_tokens=chosen.max_tokens,
        requested=requested,
        boundary=boundary,
        scale=scale,
        plain=Prediction(1.0, plain_tokens, plain_tokens, 1 + segments, scale.mean),
        chosen=_choose(curve, scale, rewards, plain_tokens, budget, goal, quantile),
        curve=curve,
        correlations=_correlations(answers),
        segment_lengths=tuple(len(draft.token_ids) for a in answers for s in a.segments for draft in s.drafts),
    )
    if (judge := judge_for(held_out, chosen.reward)) is not None:
        given = any(wanted is not None for wanted in (budget, goal, quantile))
        wish = Wish(judge, optional=held_out == "auto", targets=targets, target_is_given=given)
        calibration = with_held_out(calibration, runner, answers, wish)
    warnings = (*calibration.warnings, *_warnings(calibration, budget, goal))
    for warning in warnings:
        log.warning("calibrate: %s", warning)
    return replace(calibration, warnings=warnings)


def _boundary_for(length: float, uncertainties: list[list[float]], boundary: Uncertainty) -> Uncertainty:
    """Return the boundary with the threshold whose mean segment length is nearest to `length`, in tokens.

    Args:
        length: The wanted mean length of a segment, in tokens.
        uncertainties: For each plain answer, the uncertainty at each of its tokens.
        boundary: The boundary with its other settings.

    Raises:
        SettingsError: The boundary does not allow segments of this length.
    """
    if not boundary.min_length <= length <= boundary.max_length:
        raise SettingsError(
            f"calibrate: segment_length={length:g} is not between the boundary's min_length={boundary.min_length} "
            f"and max_length={boundary.max_length}: choose a length between them."
        )
    values = np.concatenate([np.array(each) for each in uncertainties])
    thresholds = np.quantile(values, np.linspace(0.3, 0.999, 60))
    means = [_mean_length(uncertainties, threshold, boundary) for threshold in thresholds]
    best = int(np.argmin(np.abs(np.array(means) - length)))
    return boundary.model_copy(update={"threshold": float(thresholds[best])})


def _mean_length(uncertainties: list[list[float]], threshold: float, boundary: Uncertainty) -> float:
    """Return the mean length of a segment, in tokens, with a threshold."""
    lengths = []
    for values in uncertainties:
        length = 0
        for value in values:
            if length >= boundary.max_length or (length >= boundary.min_length and value >= threshold):
                lengths.append(length)
                length = 0
            length += 1
        lengths.append(length)
    return statistics.fmean(lengths)


def _curve(simulator: Simulator, requested: Cards, scale: Scale) -> tuple[Choice, ...]:
    """Return, for each target, the choice with the best beta: the one whose reward costs the fewest tokens."""
    choices: dict[float, list[Choice]] = {}
    for target in scale.mean + TARGET_STDS * scale.std:
        for share in BETA_STDS:
            settings = SimulationSettings(
                target=float(target),
                beta=share * scale.std or 1.0,
                alpha=requested.alpha,
                hard=requested.acceptance == "hard",
                max_rejections=requested.max_rejections,
            )
            choice = Choice(settings.target, settings.beta, simulator.simulate(settings))
            choices.setdefault(target, []).append(choice)
    predictions = [choice.predicted for same_target in choices.values() for choice in same_target]

    def price(choice: Choice) -> float:
        """Return the tokens of a choice, as a multiple of those of the cheapest choice with at least its reward."""
        reward, tokens = choice.predicted.reward, choice.predicted.drafted_tokens
        return tokens / min(other.drafted_tokens for other in predictions if other.reward >= reward)

    return tuple(min(same_target, key=price) for same_target in choices.values())


def _choose(
    curve: Sequence[Choice],
    scale: Scale,
    rewards: Sequence[float],
    plain_tokens: float,
    budget: float | None,
    goal: float | None,
    quantile: float | None,
) -> Choice:
    """Return the choice that a budget, a goal or a quantile asks for, or the nearest one."""
    if budget is not None:
        affordable = [c for c in curve if c.predicted.drafted_tokens <= budget * plain_tokens]
        return max(affordable or curve[:1], key=lambda c: c.predicted.reward)
    if goal is not None:
        sufficient = [c for c in curve if c.predicted.reward >= goal]
        return min(sufficient or curve[-1:], key=lambda c: c.predicted.drafted_tokens)
    default = scale.mean + DEFAULT_TARGET_STDS * scale.std
    target = default if quantile is None else float(np.quantile(rewards, quantile))
    return min(curve, key=lambda c: abs(c.target - target))


def _correlations(answers: Sequence[Alignment]) -> tuple[float, ...]:
    """Return the correlation, over answers, of the reward at each fraction of the text with that of the whole."""
    rewards = np.array([_rewards_at_fractions(answer) for answer in answers]).T
    return tuple(0.0 if r.std() == 0 else float(np.corrcoef(r, rewards[-1])[0, 1]) for r in rewards)


def _rewards_at_fractions(answer: Alignment) -> list[float]:
    """Return the reward at each fraction of an answer, interpolated between the ends of segments."""
    ends = np.cumsum([len(segment.token_ids) for segment in answer.segments])
    rewards = [answer.prompt_reward or 0.0, *(segment.reward or 0.0 for segment in answer.segments)]
    length = max(1, int(ends[-1]))
    return [float(np.interp(fraction * length, [0, *ends], rewards)) for fraction in FRACTIONS]


def _warnings(calibration: Calibration, budget: float | None, goal: float | None) -> list[str]:
    warnings = []
    if calibration.scale.std == 0:
        warnings.append("the reward gives every plain answer the same score, so it cannot guide.")
    elif calibration.correlations[1] < WEAK_CORRELATION:
        warnings.append(
            f"the reward of half an answer tells little about that of the whole ({calibration.correlations[1]:.2f}): "
            "CARDS decides by beginnings; best-of-N may do better with this reward."
        )
    predicted = calibration.chosen.predicted
    if budget is not None and predicted.drafted_tokens > 1.05 * budget * calibration.plain.kept_tokens:
        warnings.append(f"the budget of {budget:g} times plain is less than the lowest target costs.")
    if goal is not None and predicted.reward < goal:
        warnings.append(f"no target is predicted to reach a mean reward of {goal:g}.")
    if calibration.chosen.target > calibration.scale.mean + MAX_PREDICTABLE_STDS * calibration.scale.std:
        warnings.append("few plain answers reach the target, so the prediction is uncertain.")
    if predicted.best_of_rejected > MOSTLY:
        warnings.append(
            f"{100 * predicted.best_of_rejected:.0f}% of the segments are predicted to end as the best of the rejected "
            "candidates: the target is out of reach."
        )
    return warnings
