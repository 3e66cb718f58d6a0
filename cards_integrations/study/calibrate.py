"""Calibration: the settings of CARDS for a language model and a reward model."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from cards_integrations.decoding import Cards, Decoding, OptimalStopping, Sampling, Uncertainty
from cards_integrations.decoding.base import Scale
from cards_integrations.engine.scales import ScaleStore
from cards_integrations.errors import SettingsError
from cards_integrations.models.sources import ModelSource
from cards_integrations.rewards.base import Reward
from cards_integrations.study.chains import Chains, Pilot, Prediction, Setting
from cards_integrations.trace import Alignment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cards_integrations.llm import CardsLLM

log = logging.getLogger("cards_integrations")
SHARES = (0.25, 0.5, 0.75, 1.0)
SPREADS = np.arange(-1.0, 3.55, 0.1)  # targets, in spreads above the mean
BETAS = (0.1, 0.2, 0.4)  # in spreads
WEAK = 0.3  # correlation of the half answer's reward with the whole one's, below which CARDS is blind
FORESEEN = 2.0  # spreads above the mean, beyond which too few plain answers have been seen


@dataclass(frozen=True)
class Choice:
    """A target and a beta, and what they are predicted to give."""

    target: float
    beta: float
    predicted: Prediction


@dataclass(frozen=True)
class Calibration:
    """What was measured on plain answers, what was chosen, and what it is predicted to give.

    `correlations` are those of the reward of the first 25, 50, 75 and 100 percent of an answer with
    that of the finished one. `curve` holds the best choice for each target.
    """

    model: ModelSource
    reward: Reward
    max_tokens: int
    asked: Cards
    boundary: Uncertainty
    scale: Scale
    plain: Prediction
    chosen: Choice
    curve: tuple[Choice, ...]
    correlations: tuple[float, ...]
    segment_lengths: tuple[int, ...]
    warnings: tuple[str, ...] = field(default=())

    @property
    def decoding(self) -> Cards:
        """What was asked for, with the chosen settings."""
        chosen = {"target_reward": self.chosen.target, "beta": self.chosen.beta, "boundary": self.boundary}
        return self.asked.model_copy(update=chosen)

    def __str__(self) -> str:
        predicted, plain = self.chosen.predicted, self.plain
        lines = [
            f"{self.reward.name} on {self.model.model}: plain answers have {self.scale.mean:.3g} "
            f"(spread {self.scale.std:.2g}) in {plain.kept_tokens:.0f} tokens.",
            f"Chosen: target_reward={self.chosen.target:.4g}, beta={self.chosen.beta:.3g}, "
            f"entropy threshold {self.boundary.threshold:.2f} "
            f"(segments of {statistics.fmean(self.segment_lengths):.1f} tokens).",
            f"Predicted: reward {predicted.reward:.3g}, one of {1 / max(predicted.acceptance, 1e-9):.1f} drafts "
            f"accepted, {predicted.drafted_tokens:.0f} tokens looked at "
            f"({predicted.drafted_tokens / plain.kept_tokens:.1f} times plain), "
            f"{predicted.rm_calls:.0f} scores an answer.",
            "Reward of the first 25/50/75% of an answer against the whole: "
            + "/".join(f"{c:.2f}" for c in self.correlations[:3]) + ".",
            *(f"Warning: {warning}" for warning in self.warnings),
        ]  # fmt: skip
        return "\n".join(lines)

    def to_yaml(self, path: str | Path) -> None:
        """Settings that `CardsLLM.from_settings` reads, with what was found as comments."""
        settings = {
            "model": self.model.model_dump(mode="json", exclude_defaults=True) | {"model": self.model.model},
            "reward": self.reward.model_dump(mode="json"),
            "decoding": self.decoding.model_dump(mode="json"),
            "max_tokens": self.max_tokens,
        }
        comment = "".join(f"# {line}\n" for line in str(self).splitlines())
        Path(path).write_text(comment + yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")

    def remember(self) -> None:
        """Make it what "auto" takes for this pair of models from now on."""
        scale = self.scale.model_copy(update={"target": self.chosen.target, "beta": self.chosen.beta})
        ScaleStore().put(self.model, self.reward, scale)

    def plot(self, axes: Sequence[Axes] | None = None) -> Figure:
        """Three panels: reward against tokens, how well a beginning foretells the end, segment lengths."""
        from cards_integrations.study.pictures import draw_calibration

        return draw_calibration(self, axes)

    def save(self, path: str | Path) -> None:
        """The charts as .png, .svg or .pdf, or with what was found as an .html page that opens offline."""
        from cards_integrations.study.pictures import save

        save(self.plot(), path, str(self))


def calibrate(
    llm: CardsLLM,
    prompts: Sequence[Any] | None = None,
    *,
    contexts: Sequence[Any] | None = None,
    budget: float | None = None,
    goal: float | None = None,
    quantile: float | None = None,
    segment_length: float | None = None,
    candidates: int = 4,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Calibration:
    """Choose entropy threshold, target and beta for the models and the `max_tokens` of an LLM.

    At most one of: `budget`, tokens looked at as a multiple of a plain answer's; `goal`, the wanted
    mean reward; `quantile` of plain answers' rewards for the target. Without any of them the target is mean +
    1.5 spreads. `segment_length` asks for a mean number of tokens; without it the threshold of
    `decoding` stays. `prompts` are strings or messages (at least 8, better 50), by default built-in ones.

    Draws `candidates` scored drafts for each segment of plain answers, and again of answers that keep
    the best of them, learns how rewards move along an answer (`Chains`), and simulates CARDS for many
    targets and betas.
    """
    if sum(wanted is not None for wanted in (budget, goal, quantile)) > 1:
        raise SettingsError("calibrate: give one of budget=, goal= and quantile=.")
    chosen = llm.resolve_options(options)
    if chosen.reward is None:
        raise SettingsError("calibrate: there is no reward to calibrate; pass reward=.")
    if prompts is None:
        prompts, contexts = zip(*chosen.reward.prompts, strict=True)
    if len(prompts) < 8:
        raise SettingsError(f"calibrate: {len(prompts)} prompts say too little; give at least 8.")
    decoding = chosen.decoding if isinstance(chosen.decoding, Cards) else Cards()
    if isinstance(decoding.acceptance, OptimalStopping):
        decoding = decoding.model_copy(update={"acceptance": "soft"})  # a target is what is calibrated
    boundary = decoding.boundary if isinstance(decoding.boundary, Uncertainty) else Uncertainty()
    asked = _Asked(llm, prompts, contexts or [None] * len(prompts), seed, progress, options)

    if segment_length is not None:
        plain = asked.answers(Sampling(), "plain answers")
        boundary = _threshold_for(
            segment_length, llm.engine_for(options, llm).uncertainties(boundary.measure, plain), boundary
        )
    pilot = Pilot(boundary=boundary, candidates=candidates)
    answers = asked.answers(pilot, "plain answers with scored drafts")
    upwards = asked.answers(pilot.model_copy(update={"keep": "best"}), "answers of the best drafts")
    finals = [answer.reward or 0.0 for answer in answers]
    scale = Scale(mean=statistics.fmean(finals), std=statistics.stdev(finals))
    chains = Chains([*answers, *upwards], chosen.max_tokens)
    setting = Setting(scale.mean, 1.0, decoding.alpha, decoding.acceptance == "hard", decoding.max_rejections)
    curve = _curve(chains, setting, scale)
    lengths = tuple(len(draft.token_ids) for a in answers for s in a.segments for draft in s.drafts)
    kept = statistics.fmean(len(a.token_ids) for a in answers)
    segments = statistics.fmean(len(a.segments) for a in answers)
    found = Calibration(
        chosen.model, chosen.reward, chosen.max_tokens, decoding, boundary, scale,
        plain=Prediction(1.0, kept, kept, 1 + segments, scale.mean),
        chosen=_choose(curve, scale, finals, kept, budget, goal, quantile),
        curve=curve, correlations=_correlations(answers), segment_lengths=lengths,
    )  # fmt: skip
    return replace(found, warnings=_warnings(found, budget, goal))


@dataclass
class _Asked:
    """The prompts, asked with one method or another."""

    llm: CardsLLM
    prompts: Sequence[Any]
    contexts: Sequence[Any]
    seed: int
    progress: bool
    options: dict[str, Any]

    def answers(self, decoding: Decoding, what: str) -> list[Alignment]:
        """One answer to each prompt."""
        seeds = [self.seed + i for i in range(len(self.prompts))]
        progress, options = what if self.progress else False, {**self.options, "decoding": decoding}
        return self.llm.align_batch(self.prompts, seeds, self.contexts, progress, **options)


def _threshold_for(length: float, uncertainties: list[list[float]], boundary: Uncertainty) -> Uncertainty:
    """The threshold whose mean segment length comes nearest to the wanted one."""
    if not boundary.min_length <= length <= boundary.max_length:
        raise SettingsError(
            f"calibrate: segment_length={length:g} is not between the boundary's min_length={boundary.min_length} "
            f"and max_length={boundary.max_length}."
        )
    values = np.concatenate([np.array(each) for each in uncertainties])
    thresholds = np.quantile(values, np.linspace(0.3, 0.999, 60))
    means = [_mean_length(uncertainties, threshold, boundary) for threshold in thresholds]
    best = int(np.argmin(np.abs(np.array(means) - length)))
    return boundary.model_copy(update={"threshold": float(thresholds[best])})


def _mean_length(uncertainties: list[list[float]], threshold: float, boundary: Uncertainty) -> float:
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


def _curve(chains: Chains, setting: Setting, scale: Scale) -> tuple[Choice, ...]:
    """For each target the beta that pays most: its reward costs the fewest tokens."""
    choices: dict[float, list[Choice]] = {}
    for target in scale.mean + SPREADS * scale.std:
        for share in BETAS:
            asked = replace(setting, target=float(target), beta=share * scale.std or 1.0)
            choices.setdefault(target, []).append(Choice(asked.target, asked.beta, chains.simulate(asked)))
    everything = [choice.predicted for several in choices.values() for choice in several]

    def price(choice: Choice) -> float:
        """Tokens over those of the cheapest choice with at least its reward."""
        own = choice.predicted
        return own.drafted_tokens / min(other.drafted_tokens for other in everything if other.reward >= own.reward)

    return tuple(min(several, key=price) for several in choices.values())


def _choose(
    curve: Sequence[Choice], scale: Scale, finals: Sequence[float], plain_tokens: float,
    budget: float | None, goal: float | None, quantile: float | None,
) -> Choice:  # fmt: skip
    if budget is not None:
        affordable = [c for c in curve if c.predicted.drafted_tokens <= budget * plain_tokens]
        return max(affordable or curve[:1], key=lambda c: c.predicted.reward)
    if goal is not None:
        enough = [c for c in curve if c.predicted.reward >= goal]
        return min(enough or curve[-1:], key=lambda c: c.predicted.drafted_tokens)
    target = scale.mean + 1.5 * scale.std if quantile is None else float(np.quantile(finals, quantile))
    return min(curve, key=lambda c: abs(c.target - target))


def _correlations(answers: Sequence[Alignment]) -> tuple[float, ...]:
    """Of the reward at each share of the text with the final one, over answers."""
    at_share = []
    for answer in answers:
        ends = np.cumsum([len(segment.token_ids) for segment in answer.segments])
        rewards = [segment.reward or 0.0 for segment in answer.segments]
        whole = max(1, int(ends[-1]))
        at_share.append([float(np.interp(share * whole, [0, *ends], [answer.prompt_reward or 0.0, *rewards]))
                         for share in SHARES])  # fmt: skip
    columns = np.array(at_share).T
    return tuple(0.0 if c.std() == 0 else float(np.corrcoef(c, columns[-1])[0, 1]) for c in columns)


def _warnings(found: Calibration, budget: float | None, goal: float | None) -> tuple[str, ...]:
    said = []
    if found.scale.std == 0:
        said.append("the reward gives every plain answer the same score, so it cannot guide.")
    elif found.correlations[1] < WEAK:
        said.append(
            f"the reward of half an answer says little of the whole ({found.correlations[1]:.2f}): "
            "CARDS decides by beginnings; best-of-N may do better with this reward."
        )
    predicted = found.chosen.predicted
    if budget is not None and predicted.drafted_tokens > 1.05 * budget * found.plain.kept_tokens:
        said.append(f"the budget of {budget:g} times plain is below what the lowest target takes.")
    if goal is not None and predicted.reward < goal:
        said.append(f"no target is predicted to reach a mean reward of {goal:g}.")
    if found.chosen.target > found.scale.mean + FORESEEN * found.scale.std:
        said.append("the target lies where few plain answers do: the prediction is uncertain.")
    for warning in said:
        log.warning("calibrate: %s", warning)
    return tuple(said)
