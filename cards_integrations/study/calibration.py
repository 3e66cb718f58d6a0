"""The result of a calibration."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from cards_integrations.decoding import Cards, Uncertainty
from cards_integrations.decoding.base import Scale
from cards_integrations.engine.scale_store import ScaleStore
from cards_integrations.errors import SettingsError
from cards_integrations.models.sources import ModelSource
from cards_integrations.rewards.base import Reward
from cards_integrations.study import calibration_report
from cards_integrations.study.figures import new_figure
from cards_integrations.study.held_out import HeldOutCurve
from cards_integrations.study.simulation import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FRACTIONS = (0.25, 0.5, 0.75, 1.0)  # of an answer, at which its reward is compared with that of the whole


@dataclass(frozen=True)
class Choice:
    """A target and a beta, and what they are predicted to give."""

    target: float
    """The target reward of CARDS."""
    beta: float
    """The beta of CARDS."""
    predicted: Prediction
    """What CARDS is predicted to do with them."""


@dataclass(frozen=True)
class Calibration:
    """What was measured on plain answers, what was chosen, and what it is predicted to give."""

    model: ModelSource
    """The language model."""
    reward: Reward
    """The reward that guides."""
    max_tokens: int
    """The length limit of the answers for which this was calibrated."""
    requested: Cards
    """The settings of CARDS before the calibration."""
    boundary: Uncertainty
    """Where segments end, with the entropy threshold that was found."""
    scale: Scale
    """The mean and the standard deviation of the reward of plain answers."""
    plain: Prediction
    """What plain answers cost and score, as measured."""
    chosen: Choice
    """The target and the beta that were found."""
    curve: tuple[Choice, ...]
    """For each target, from the lowest on, the choice whose reward costs the fewest tokens."""
    correlations: tuple[float, ...]
    """The correlations of the rewards of the first 25, 50, 75 and 100 percent of an answer with that of the whole."""
    segment_lengths: tuple[int, ...]
    """The lengths of all drafts, in tokens."""
    held_out: HeldOutCurve | None = None
    """The held-out reward over the target; None if there was no such reward."""
    warnings: tuple[str, ...] = field(default=())
    """Reasons not to rely on the prediction."""

    @property
    def decoding(self) -> Cards:
        """The settings of CARDS with the target, the beta and the boundary that were found."""
        return self.decoding_for(self.chosen)

    def decoding_for(self, choice: Choice) -> Cards:
        """Return the settings of CARDS with the target and the beta of a choice."""
        update = {"target_reward": choice.target, "beta": choice.beta, "boundary": self.boundary}
        return self.requested.model_copy(update=update)

    def __str__(self) -> str:
        predicted, plain = self.chosen.predicted, self.plain
        lines = [
            f"{self.reward.name} on {self.model.model}: plain answers have {self.scale.mean:.3g} "
            f"(standard deviation {self.scale.std:.2g}) in {plain.kept_tokens:.0f} tokens.",
            f"Chosen: target_reward={self.chosen.target:.4g}, beta={self.chosen.beta:.3g}, "
            f"entropy threshold {self.boundary.threshold:.2f} "
            f"(segments of {statistics.fmean(self.segment_lengths):.1f} tokens).",
            f"Predicted: reward {predicted.reward:.3g}, one of {1 / max(predicted.acceptance, 1e-9):.1f} drafts "
            f"accepted, {predicted.drafted_tokens:.0f} tokens looked at "
            f"({predicted.drafted_tokens / plain.kept_tokens:.1f} times plain), "
            f"{predicted.rm_calls:.0f} scores an answer.",
            "Correlation of the reward of the first 25/50/75% of an answer with that of the whole: "
            + "/".join(f"{c:.2f}" for c in self.correlations[:3]) + ".",
            *(str(self.held_out).splitlines() if self.held_out else ()),
            *(f"Warning: {warning}" for warning in self.warnings),
        ]  # fmt: skip
        return "\n".join(lines)

    def to_yaml(self, path: str | Path) -> None:
        """Write settings that `CardsLLM.from_settings` reads, with the results as comments.

        Args:
            path: The file to write.
        """
        settings = {
            "model": self.model.model_dump(mode="json", exclude_defaults=True) | {"model": self.model.model},
            "reward": self.reward.model_dump(mode="json"),
            "decoding": self.decoding.model_dump(mode="json"),
            "max_tokens": self.max_tokens,
        }
        comment = "".join(f"# {line}\n" for line in str(self).splitlines())
        Path(path).write_text(comment + yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")

    def remember(self) -> None:
        """Store target and beta, which "auto" uses from now on for this language model and this reward."""
        scale = self.scale.model_copy(update={"target": self.chosen.target, "beta": self.chosen.beta})
        ScaleStore().calibrate(self.model, self.reward, scale)

    def plot(self, axes: Sequence[Axes] | None = None) -> Figure:
        """Draw the mean reward over tokens, how well a beginning predicts the end, and the lengths of segments.

        With a held-out reward, it is drawn over the target on a fourth chart.

        Args:
            axes: Three axes of one figure, or four with a held-out reward; None for a new figure.

        Returns:
            The figure.
        """
        held_out = self.held_out
        if axes is None:
            axes = new_figure(18, 3.8).subplots(1, 4) if held_out else new_figure(13, 3.8).subplots(1, 3)
        rewards, correlations, lengths = axes[:3]
        curve = [choice.predicted for choice in self.curve]
        calibration_report.draw_rewards(rewards, curve, self.plain, self.chosen.predicted)
        calibration_report.draw_correlations(correlations, FRACTIONS, self.correlations)
        calibration_report.draw_lengths(lengths, self.segment_lengths, self.boundary.threshold)
        if held_out is not None:
            calibration_report.draw_held_out(axes[3], held_out, self.chosen.target)
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
        figure: Figure = rewards.figure  # type: ignore[assignment]
        figure.suptitle(f"{self.reward.name} on {self.model.model}", fontsize=10)
        return figure

    def save(self, path: str | Path) -> None:
        """Write the charts as an image, or the charts and the results as a page that opens offline.

        Args:
            path: The file to write: .png, .svg, .pdf, .html for the page, or .csv for the levels of the held-out
                reward as a table.

        Raises:
            SettingsError: A table is asked for, but there was no held-out reward.
        """
        path = Path(path)
        if path.suffix == ".csv":
            return self._save_table(path)
        figure = self.plot()
        if path.suffix == ".html":
            path.write_text(calibration_report.page(str(self), figure), encoding="utf-8")
        else:
            figure.savefig(path, dpi=150)

    def _save_table(self, path: Path) -> None:
        if self.held_out is None:
            raise SettingsError("calibrate: there is no table without a held-out reward; pass held_out=.")
        rows = self.held_out.rows()
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
