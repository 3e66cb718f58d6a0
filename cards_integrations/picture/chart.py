"""A chart of rewards over tokens, with all candidates that were scored: as an inline SVG, and with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from cards_integrations.picture.numbers import number
from cards_integrations.picture.tree import Node, Point, levels_of
from cards_integrations.templates import render
from cards_integrations.trace import Alignment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#2f7fd1", "#d9730d", "#888888"  # distinguishable by colour-blind eyes, on white and on black
WIDTH, HEIGHT = 900, 250  # of the chart
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 28, 44  # its margins
KEY, NAME = 92, 36  # horizontal positions of the key, and of the name in each of its entries
CROSS, TRIANGLE, DOT = "m-3-3l6 6m0-6l-6 6", "m-2-3.5l6 3.5-6 3.5 0-7", "h0"
MARKS = {"accepted": "✓", "best": "✓", "rejected": "✗", "unscored": ""}


@dataclass
class Points:
    """What a chart shows. A point is a number of tokens, and the reward of the answer up to there."""

    kept: list[Point] = field(default_factory=list)
    """The ends of the kept segments, after the prompt if it was scored."""
    thresholds: list[Point] = field(default_factory=list)
    """The thresholds of the kept segments, at their ends."""
    rejected: list[Point] = field(default_factory=list)
    """The ends of candidates that were not kept and that no other candidate follows."""
    went_on: list[Point] = field(default_factory=list)
    """The ends of candidates that were not kept, but that others follow."""
    twigs: list[tuple[Point, Point]] = field(default_factory=list)
    """Lines to candidates that were not kept: from the end of what each one follows to its own end."""
    nodes: list[Node] = field(default_factory=list)
    """All candidates that were scored."""

    @classmethod
    def of(cls, alignment: Alignment) -> Points:
        """Collect the points of an alignment's segments and drafts."""
        points, end = cls(), 0
        for segment in alignment.segments:
            end += len(segment.token_ids)
            if segment.reward is not None:
                points.kept.append((end, segment.reward))
            if segment.threshold is not None:
                points.thresholds.append((end, segment.threshold))
        if points.kept and alignment.prompt_reward is not None:
            points.kept.insert(0, (0, alignment.prompt_reward))
        if len(points.thresholds) == 1:  # a line takes two points
            points.thresholds.insert(0, (0, points.thresholds[0][1]))
        for node in (node for level in levels_of(alignment) for node in level if node.point):
            points._add(node, node.point)
        return points

    def _add(self, node: Node, point: Point | None) -> None:
        assert point is not None
        self.nodes.append(node)
        if not node.kept and node.start:
            self.twigs.append((node.start, point))
        if not node.kept:
            (self.went_on if node.went_on else self.rejected).append(point)


def ticks(low: float, high: float) -> list[float]:
    """Return three to eight round numbers between `low` and `high`."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= next((m for m in (5, 2) if (high - low) / (m * step) >= 3), 1)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


class Label(NamedTuple):
    """A text of the chart."""

    x: float
    y: float
    anchor: str
    text: str


class Spot(NamedTuple):
    """A candidate in the chart, which shows its `title` and is a link to its segment in the page."""

    x: float
    y: float
    segment: int
    kept: bool
    title: str


class Chart(NamedTuple):
    """The content of the SVG of a chart; `lines` are pairs of a name and a path."""

    grid: str
    lines: list[tuple[str, str]]
    dots: str
    labels: list[Label]
    spots: list[Spot]
    width: int = WIDTH
    height: int = HEIGHT


class Frame(NamedTuple):
    """The ranges of the axes: tokens from 0 to `tokens`, and rewards from `low` to `high`."""

    tokens: int
    low: float
    high: float

    @classmethod
    def around(cls, points: Points) -> Frame:
        """Return the smallest frame, with a margin, that contains all points."""
        shown = [*points.kept, *points.thresholds, *(node.point for node in points.nodes if node.point)]
        shown += [start for start, _ in points.twigs]
        heights = [reward for _, reward in shown]
        margin = 0.06 * (max(heights) - min(heights)) or abs(heights[0]) / 2 or 1.0  # a scale, even if all are equal
        return cls(max(1, *(end for end, _ in shown)), min(heights) - margin, max(heights) + margin)

    def x(self, tokens: float) -> float:
        """Return the horizontal position of a number of tokens."""
        return round(LEFT + tokens / self.tokens * (WIDTH - LEFT - RIGHT), 1)

    def y(self, reward: float) -> float:
        """Return the vertical position of a reward."""
        return round(HEIGHT - BOTTOM - (reward - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM), 1)

    def path(self, line: Sequence[Point]) -> str:
        """Return an SVG path through points."""
        return "M" * bool(line) + "L".join(f"{self.x(end)} {self.y(reward)}" for end, reward in line)

    def marks(self, points: Sequence[Point], mark: str) -> str:
        """Return an SVG path with a mark at each of the points."""
        return "".join(f"M{self.x(end)} {self.y(reward)}{mark}" for end, reward in points)


def svg(points: Points) -> str:
    """Return the chart as an inline SVG; "" if nothing was scored."""
    return render("chart.svg.j2", chart=chart(points), linked=False) if points.kept else ""


def chart(points: Points) -> Chart:
    """Lay out the chart of an answer in which something was scored."""
    frame = Frame.around(points)
    rows = ticks(frame.low, frame.high)
    columns = [tick for tick in ticks(0, frame.tokens) if tick == round(tick)]
    twig = "h22" if points.twigs else "m22 0"
    lines = [  # name, path, sample in the key, width of the entry there
        ("kept", frame.path(points.kept), "h28", 74),
        ("went on", frame.marks(points.went_on, TRIANGLE), twig + TRIANGLE, 100),
        ("rejected", frame.marks(points.rejected, CROSS), twig + CROSS, 106),
        ("threshold", frame.path(points.thresholds), "h28", 0),
    ]
    drawn = [line for line in lines if line[1]]
    places = list(accumulate((width for *_, width in drawn[:-1]), initial=KEY))
    key = [(name, f"M{x} 12{sample}{path}") for x, (name, path, sample, _) in zip(places, drawn, strict=True)]
    twigs = "".join(map(frame.path, points.twigs))
    return Chart(
        grid="".join(f"M{LEFT} {frame.y(tick)}H{WIDTH - RIGHT}" for tick in rows),
        lines=[("twigs", twigs)] * bool(twigs) + key[::-1],  # what is kept on top
        dots=f"M{KEY + 14} 12{DOT}" + frame.marks(points.kept, DOT),
        labels=[
            Label(6, 12, "start", "reward"),
            Label((LEFT + WIDTH) / 2, HEIGHT - 8, "middle", "tokens"),
            *(Label(x + NAME, 12, "start", name) for x, (name, *_) in zip(places, drawn, strict=True)),
            *(Label(LEFT - 6, frame.y(tick), "end", f"{tick:.6g}") for tick in rows),
            *(Label(frame.x(tick), HEIGHT - BOTTOM + 14, "middle", f"{tick:,.0f}") for tick in columns),
        ],
        spots=[_spot(node, frame) for node in sorted(points.nodes, key=lambda node: node.kept)],  # kept ones on top
    )


def _spot(node: Node, frame: Frame) -> Spot:
    assert node.point is not None
    end, reward = node.point
    mark = "→" if node.went_on and not node.kept else MARKS[node.draft.verdict]
    title = f"{mark} segment {node.segment}, reward {number(reward)}: {node.draft.text.strip()}"
    return Spot(frame.x(end), frame.y(reward), node.segment, node.kept, title.strip())


def draw(alignment: Alignment, axes: Axes | None = None) -> Axes:
    """Draw the same chart with matplotlib (the extra `study`).

    Args:
        alignment: The answer.
        axes: Where to draw; None for new axes.

    Returns:
        The axes.
    """
    if axes is None:
        from matplotlib import pyplot

        axes = pyplot.subplots(figsize=(9, 3.2), layout="constrained")[1]
    points = Points.of(alignment)
    if points.kept:
        from matplotlib.collections import LineCollection

        axes.add_collection(LineCollection(points.twigs, colors=GREY, alpha=0.6, linewidths=0.8))
        axes.plot(*zip(*points.kept, strict=True), "o-", color=BLUE, markersize=4, label="kept", zorder=3)
        if points.went_on:
            axes.plot(*zip(*points.went_on, strict=True), ">", color=GREY, mfc="none", markersize=4, label="went on")
        if points.rejected:
            axes.plot(*zip(*points.rejected, strict=True), "x", color=GREY, markersize=4, label="rejected")
        if points.thresholds:
            axes.plot(*zip(*points.thresholds, strict=True), "--", color=ORANGE, label="threshold")
        axes.legend(frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    else:
        axes.text(0.5, 0.5, "nothing was scored", transform=axes.transAxes, ha="center", va="center")
    axes.set(xlabel="tokens", ylabel="reward", xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    return axes
