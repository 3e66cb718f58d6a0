"""The picture of what wide.py found: both rewards over the time of an answer.

    python benchmarks/wide_chart.py [wide-tiny-h200-1 wide-smollm2-here-16] [--out docs/wide.png]

A column for each of the results: in the first row the guiding reward, in the second the held-out one, means with 95%
intervals over prompts. Points of a family of methods are joined in the order of their time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

RESULTS = Path(__file__).parent / "results"
SHOWN = ("wide-tiny-h200-1", "wide-smollm2-here-16")  # in docs/comparison.md
FAMILIES = {  # the beginnings of their names, the first that fits, and how they are drawn
    "plain": ("plain", "#555555", "*"),
    "best-of-N per segment": ("best-of-8 per|best-of-16 per", "#8fbf8f", "v"),
    "best-of-N": ("best-of-", "#9a9a9a", "s"),
    "TreeBoN": ("TreeBoN", "#e0a030", "D"),
    "AdaSearch, AdaBeam": ("AdaSearch|AdaBeam", "#9467bd", "P"),
    "STARS": ("STARS", "#17a2a2", "X"),
    "optimal stopping": ("optimal stopping", "#d98cb3", "h"),
    "CARDS": ("CARDS", "#b04040", "^"),
    "Cascade, by tokens": ("Cascade tokens", "#7fb2e5", "o"),
    "Cascade, by time": ("Cascade", "#2f6db3", "o"),
}
WHERE = {
    "tiny": "tiny pair", "smollm2": "SmolLM2", "h200": "7B on an H200 (computed)", "l4": "7B on an L4 (computed)",
    "here": "two CPU cores",
}  # fmt: skip


def family(arm: str) -> str:
    """The family of a method, by its name in the results."""
    return next(name for name, (words, *_) in FAMILIES.items() if any(map(arm.startswith, words.split("|"))))


def title(result: str) -> str:
    """What a result is of, from the name of its file."""
    _, which, device, at_once = result.split("-")
    return f"{WHERE[which]}, {WHERE[device]}, {'one request' if at_once == '1' else f'{at_once} requests'} at a time"


def panel(axis: Axes, found: dict[str, Any], reward: str) -> None:
    """One reward of all methods over their time."""
    for name, (_, color, marker) in FAMILIES.items():
        arms = sorted((arm for arm in found if family(arm) == name), key=lambda arm: found[arm]["over plain"])
        if not arms:
            continue
        times, each = [found[arm]["over plain"] for arm in arms], [found[arm][reward] for arm in arms]
        values = [of["value"] for of in each]
        below = [of["value"] - of["low"] for of in each]
        above = [of["high"] - of["value"] for of in each]
        axis.errorbar(times, values, (below, above), label=name, color=color, marker=marker, markersize=6, linewidth=1)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xticks(
        [n for n in (1, 1.2, 1.5, 2, 3, 5, 10) if n <= 1.1 * max(of["over plain"] for of in found.values())]
    )
    axis.grid(alpha=0.3)


def draw(names: Sequence[str], target: Path) -> None:
    """Draw these results, a column for each."""
    columns = len(names)
    figure, axes = plt.subplots(2, columns, figsize=(6 * columns, 8), squeeze=False, sharex="col")
    for column, name in enumerate(names):
        found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for row, reward in enumerate(("guiding", "held-out")):
            panel(axes[row, column], found, reward)
            axes[row, column].set_ylabel(f"{reward} reward")
        axes[0, column].set_title(title(name), fontsize=10)
        axes[1, column].set_xlabel("time of an answer over that of a plain one")
    drawn = [axis.get_legend_handles_labels() for axis in axes[0]]
    labels = {label: handle for handles, each in drawn for handle, label in zip(handles, each, strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="lower center", ncols=5, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(target, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", default=SHOWN, help="Names of files in results/, without .json.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "wide.png")
    options = parser.parse_args()
    draw(options.results, options.out)


if __name__ == "__main__":
    main()
