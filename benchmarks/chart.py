"""The picture of speed.json."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

OURS, THEIRS, OTHER = "#2f6db3", "#c9c9c9", "#e0a030"
Runs = dict[str, dict[str, list[dict[str, float]]]]


def draw(results: dict[str, Any], target: Path) -> None:
    """Seconds a token by contender, where the time goes, and reward against time."""
    runs: Runs = results["runs"]
    bars = [part for part in runs if part.startswith(("plain", "aligned", "8 CARDS", "16 CARDS"))]
    profiles = [part for part in runs if part.startswith("profile")]
    panels = len(bars) + bool(profiles) + ("frontier" in runs)
    if not panels:
        return
    rows = -(-panels // 3)
    figure, axes = plt.subplots(rows, min(3, panels), figsize=(5.2 * min(3, panels), 3.4 * rows), squeeze=False)
    free = iter(axes.flat)
    for part in bars:
        _bars(next(free), part, runs[part])
    if profiles:
        _profile(next(free), {part: runs[part]["all"][0] for part in profiles})
    if "frontier" in runs:
        _frontier(next(free), runs["frontier"])
    for axis in free:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _bars(axis: Axes, part: str, contenders: dict[str, list[dict[str, float]]]) -> None:
    names = list(contenders)
    each = [[1000 * run["seconds"] / run["tokens"] for run in contenders[name]] for name in names]
    middle = [statistics.median(values) for values in each]
    ours = [name.startswith(("ours", "at once")) for name in names]
    axis.barh(names, middle, color=[OURS if own else THEIRS for own in ours])
    for row, values in enumerate(each):
        axis.plot([min(values), max(values)], [row, row], color="black", linewidth=1)
        axis.annotate(f" {middle[row]:.3g}", (max(values), row), va="center")
    axis.invert_yaxis()
    axis.set_xlim(0, 1.15 * max(max(values) for values in each))
    axis.set_title(part, fontsize=10)
    axis.set_xlabel("ms for each token of the answers")


def _profile(axis: Axes, profiles: dict[str, dict[str, float]]) -> None:
    names = [name.removeprefix("profile, ") for name in profiles]
    left = [0.0] * len(names)
    for what, color in (("language model", OURS), ("reward model", OTHER), ("all else", "#b04040")):
        shares = [100 * found[what] / found["seconds"] for found in profiles.values()]
        axis.barh(names, shares, left=left, color=color, label=what)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axis.set_title("where the time goes", fontsize=10)
    axis.set_xlabel("% of the wall time")
    axis.legend(fontsize=8, loc="lower left")


def _frontier(axis: Axes, curves: dict[str, list[dict[str, float]]]) -> None:
    for name, curve in curves.items():
        style = "o" if name == "plain" else "s--" if name.startswith("best") else "o-"
        axis.plot([run["seconds"] for run in curve], [run["reward"] for run in curve], style, label=name, markersize=4)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_title("reward against time, tiny pair, 16 at once", fontsize=10)
    axis.set_xlabel("seconds for each answer")
    axis.set_ylabel("guiding reward")
    axis.legend(fontsize=7)
