"""Draws the charts of a calibration, and a page with them that opens offline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cards_integrations.study.figures import as_base64
from cards_integrations.study.held_out import HeldOutCurve
from cards_integrations.study.simulation import Prediction
from cards_integrations.templates import render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_rewards(axes: Axes, curve: Sequence[Prediction], plain: Prediction, chosen: Prediction) -> None:
    """Draw the mean reward over the tokens that it costs."""
    axes.plot(
        [predicted.drafted_tokens for predicted in curve], [predicted.reward for predicted in curve],
        color="tab:blue", label="CARDS, predicted",
    )  # fmt: skip
    axes.plot(plain.drafted_tokens, plain.reward, "o", color="tab:gray", label="plain, measured")
    axes.plot(chosen.drafted_tokens, chosen.reward, "o", color="tab:red", label="chosen")
    axes.set(xlabel="tokens looked at, per answer", ylabel="mean reward", title="What a target buys")
    axes.set_xscale("log")
    axes.legend(frameon=False)


def draw_correlations(axes: Axes, fractions: Sequence[float], correlations: Sequence[float]) -> None:
    """Draw how well the reward of the first part of an answer predicts that of the whole."""
    axes.plot([100 * fraction for fraction in fractions], correlations, "o-", color="tab:blue")
    axes.axhline(0, color="tab:gray", linewidth=0.8)
    axes.set(
        xlabel="share of the answer, %",
        ylabel="correlation",
        ylim=(-0.2, 1.05),
        title="A beginning's reward and the end's",
    )


def draw_lengths(axes: Axes, lengths: Sequence[int], threshold: float) -> None:
    """Draw a histogram of the lengths of segments."""
    axes.hist(lengths, bins=range(1, max(lengths) + 2), color="tab:blue", align="left")
    axes.set(xlabel="tokens", ylabel="drafts", title=f"Segments at entropy threshold {threshold:.2f}")


def draw_held_out(axes: Axes, found: HeldOutCurve, chosen: float) -> None:
    """Draw both rewards over the target, with 95% intervals, and what was chosen.

    Args:
        axes: Where to draw; the guiding reward gets an axis of its own on the right.
        found: The held-out reward at some targets.
        chosen: The target that was chosen.
    """
    plain, *levels = found.levels
    targets, means = found.targets, [level.held_out for level in levels]
    axes.errorbar(
        targets, [mean.value for mean in means],
        yerr=[[mean.value - mean.low for mean in means], [mean.high - mean.value for mean in means]],
        fmt="o-", color="tab:green", capsize=2, label="held out",
    )  # fmt: skip
    axes.plot(targets, found.fitted[1:], "--", color="tab:green", linewidth=1, label="held out, one peak")
    axes.axhline(plain.held_out.value, color="tab:gray", linewidth=0.8, label="held out, plain")
    guide = axes.twinx()
    guide.plot(targets, [level.reward.value for level in levels], "s:", color="tab:blue", label="guide (right)")
    guide.spines["top"].set_visible(False)
    axes.axvline(chosen, color="tab:red", linewidth=1, label="chosen")
    axes.set(xlabel="target reward", ylabel="mean held-out reward", title="Does the guide still help?")
    lines = [*axes.get_legend_handles_labels()[0], *guide.get_legend_handles_labels()[0]]
    axes.legend(lines, [str(line.get_label()) for line in lines], frameon=False, fontsize=8)


def page(text: str, figure: Figure) -> str:
    """Return an HTML page with each line of the text as a paragraph, and the charts."""
    return render("calibration.html.j2", lines=text.splitlines(), image=as_base64(figure))
