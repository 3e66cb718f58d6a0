"""An alignment as a picture: HTML for notebooks, a page of its own, and a chart with matplotlib."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from cards_integrations.templates import render
from cards_integrations.trace import Alignment, DraftTrace, Segment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE = "#2f7fd1", "#d9730d"  # colour-blind eyes can distinguish them; legible on white and on black
FAINT, STRONG = 0.1, 0.6  # opacity of the blue at the lowest and at the highest reward
WIDTH, HEIGHT = 900, 230  # of the chart, and its margins
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 28, 44
VERDICTS = {"accepted": "✓ accepted", "rejected": "✗ rejected", "best": "✓ best", "unscored": "unscored"}

Line = list[tuple[int, float]]
"""Rewards over the number of tokens."""


@dataclass
class Points:
    """What the charts show over tokens."""

    steps: Line = field(default_factory=list)
    """The rewards of the kept segments, each at the segment's begin and at its end."""
    thresholds: Line = field(default_factory=list)
    """The thresholds of the kept segments, at their ends."""
    rejected: Line = field(default_factory=list)
    """The rewards of the rejected drafts, at their ends."""

    @classmethod
    def of(cls, alignment: Alignment) -> Points:
        """Collect the points of an alignment's segments and drafts."""
        points, begin = cls(), 0
        for segment in alignment.segments:
            end = begin + len(segment.token_ids)
            if segment.reward is not None:
                points.steps += [(begin, segment.reward), (end, segment.reward)]
            if segment.threshold is not None:
                points.thresholds.append((end, segment.threshold))
            for draft in segment.drafts:
                if draft.verdict == "rejected" and draft.reward is not None:
                    points.rejected.append((begin + len(draft.token_ids), draft.reward))
            begin = end
        if len(points.thresholds) == 1:  # a line takes two points
            points.thresholds.insert(0, (0, points.thresholds[0][1]))
        return points

    @property
    def ends(self) -> Line:
        """The rewards of the kept segments, at their ends."""
        return self.steps[1::2]

    @property
    def rewards(self) -> list[float]:
        """The rewards of the kept segments."""
        return [reward for _, reward in self.ends]


def page(alignment: Alignment) -> str:
    """Return a whole HTML page that opens offline."""
    return render("alignment_page.html.j2", **_data(alignment))


def fragment(alignment: Alignment) -> str:
    """Return the HTML that a notebook shows: no scripts, no links, and the model's text is never markup."""
    return render("alignment.html.j2", **_data(alignment))


def _data(alignment: Alignment) -> dict[str, Any]:
    """What the templates of an alignment use."""
    points = Points.of(alignment)
    return {
        "alignment": alignment,
        "pieces": list(_pieces(alignment, points.rewards)),
        "legend": _legend(alignment, points.rewards),
        "cost": cost(alignment),
        "chart": _chart(points) if points.steps else None,
        "n_drafts": sum(len(segment.drafts) for segment in alignment.segments),
        "verdicts": VERDICTS,
        **{function.__name__: function for function in (number, counted, decision, parts, as_json)},
    }


# --- numbers and words ---


def number(value: float | None) -> str:
    """Format with three decimals, or with three digits if the value is tiny or huge."""
    if value is None:
        return "-"
    return f"{value:,.3f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.3g}"


def counted(n: int, thing: str) -> str:
    """Format as `1 token`, `1,000 tokens`."""
    return f"{n:,} {thing}{'s' * (n != 1)}"


def as_json(value: Any) -> str:
    """Format the arguments of a tool call."""
    return json.dumps(value, ensure_ascii=False, default=str)


def parts(draft: DraftTrace) -> str:
    """Format the scores that a composite reward consists of."""
    return " · ".join(f"{name} {number(value)}" for name, value in draft.parts.items())


def is_below(segment: Segment) -> bool:
    """True if the segment was kept although its reward is below its threshold."""
    return segment.reward is not None and segment.threshold is not None and segment.reward < segment.threshold


def decision(segment: Segment) -> str:
    """Format as `1.138 ≥ 0.863`: a segment's reward and its threshold, as far as there are any."""
    if segment.reward is None:
        return "not scored"
    if segment.threshold is None:
        return number(segment.reward)
    return f"{number(segment.reward)} {'<' if is_below(segment) else '≥'} {number(segment.threshold)}"


def cost(alignment: Alignment) -> str:
    """Say in one line how an answer ended, and everything that it cost."""
    usage = alignment.usage
    reward = "" if alignment.reward is None else f"reward {number(alignment.reward)}"
    if reward and alignment.prompt_reward is not None:
        reward += f" (prompt alone {number(alignment.prompt_reward)})"
    models = [
        ("language model", usage.lm_forwards, usage.lm_tokens),
        ("reward model", usage.rm_forwards, usage.rm_tokens),
    ]
    facts = [
        " on ".join(filter(None, [alignment.method, alignment.model])),
        reward,
        f"{counted(usage.completion_tokens, 'token')} kept, {usage.drafted_tokens:,} drafted",
        f"{counted(usage.drafts, 'candidate')} looked at",
        *(f"{name} {counted(n, 'forward')}, {counted(tokens, 'token')}" for name, n, tokens in models if n),
        f"{usage.seconds:.2f} s",
        f"finish: {alignment.finish_reason}",
        f"seed {alignment.seed}",
    ]
    return " · ".join(filter(None, facts))


# --- the running text ---


class Piece(NamedTuple):
    """A kept segment in the running text; white space around it is not marked."""

    before: str
    text: str
    after: str
    title: str
    below: bool
    blue: float | None


def _pieces(alignment: Alignment, rewards: Sequence[float]) -> Iterator[Piece]:
    """Cut the text by the lengths of its segments: a stop string may reach across several."""
    begin, last = 0, len(alignment.segments) - 1
    for i, segment in enumerate(alignment.segments):
        end = len(alignment.text) if i == last else begin + len(segment.text)
        yield _piece(segment, alignment.text[begin:end], rewards)
        begin = end


def _piece(segment: Segment, text: str, rewards: Sequence[float]) -> Piece:
    body = text.strip()
    return Piece(
        before=text[: len(text) - len(text.lstrip())],
        text=body,
        after=text[len(text.rstrip()) :] if body else "",
        title=f"{decision(segment)} · {counted(len(segment.token_ids), 'token')}",
        below=is_below(segment),
        blue=None if segment.reward is None else _blue(segment.reward, rewards),
    )


def _blue(reward: float, rewards: Sequence[float]) -> float:
    """The opacity of the blue behind a segment."""
    low, high = min(rewards), max(rewards)
    share = (reward - low) / (high - low) if high > low else 0.5
    return FAINT + share * (STRONG - FAINT)


class Legend(NamedTuple):
    """What the blue means, in numbers."""

    low: float
    high: float
    gradient: str
    below: bool


def _legend(alignment: Alignment, rewards: Sequence[float]) -> Legend | None:
    if not rewards:
        return None
    low, high = min(rewards), max(rewards)
    gradient = ", ".join(f"rgb(47 127 209 / {_blue(reward, rewards)})" for reward in (low, high))
    return Legend(low, high, gradient, any(map(is_below, alignment.segments)))


# --- the chart ---


def chart(points: Points) -> str:
    """Return rewards and thresholds over tokens as an inline SVG; empty if nothing was scored."""
    return render("chart.svg.j2", chart=_chart(points)) if points.steps else ""


def ticks(low: float, high: float) -> list[float]:
    """Return three to eight round numbers between the two."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= next((m for m in (5, 2) if (high - low) / (m * step) >= 3), 1)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


class Label(NamedTuple):
    """A text of the chart."""

    x: float
    y: float
    anchor: str
    text: str


class Chart(NamedTuple):
    """The chart as its SVG has it: `lines` are pairs of a class and a path."""

    grid: str
    lines: list[tuple[str, str]]
    dots: str
    labels: list[Label]
    width: int = WIDTH
    height: int = HEIGHT


class Frame(NamedTuple):
    """The numbers at the edges of the chart."""

    tokens: int
    low: float
    high: float

    def x(self, tokens: float) -> float:
        """The horizontal position of a number of tokens."""
        return round(LEFT + tokens / self.tokens * (WIDTH - LEFT - RIGHT), 1)

    def y(self, reward: float) -> float:
        """The vertical position of a reward."""
        return round(HEIGHT - BOTTOM - (reward - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM), 1)

    def path(self, line: Line) -> str:
        """A path through all the points."""
        return "M" * bool(line) + "L".join(f"{self.x(end)} {self.y(reward)}" for end, reward in line)

    def marks(self, line: Line, mark: str) -> str:
        """A path with a mark at each of the points."""
        return "".join(f"M{self.x(end)} {self.y(reward)}{mark}" for end, reward in line)


def _frame(points: Points) -> Frame:
    heights = [reward for _, reward in points.steps + points.thresholds + points.rejected]
    margin = 0.06 * (max(heights) - min(heights)) or abs(heights[0]) / 2 or 1.0  # a scale, even if all are equal
    last = max(1, *(end for end, _ in points.steps + points.rejected))
    return Frame(last, min(heights) - margin, max(heights) + margin)


def _chart(points: Points) -> Chart:
    frame = _frame(points)
    rows = ticks(frame.low, frame.high)
    columns = [tick for tick in ticks(0, frame.tokens) if tick == round(tick)]
    cross, dot = "m-3-3l6 6m0-6l-6 6", "h0"
    lines = [  # class, sample in the key, path, position of the key's text
        ("rejected", "M182 9l6 6m0-6l-6 6", frame.marks(points.rejected, cross), 196),
        ("threshold", "M272 12h28", frame.path(points.thresholds), 308),
        ("kept", "M92 12h28", frame.path(points.steps), 128),
    ]
    drawn = [line for line in lines if line[2]]
    return Chart(
        grid="".join(f"M{LEFT} {frame.y(tick)}H{WIDTH - RIGHT}" for tick in rows),
        lines=[(kind, sample + path) for kind, sample, path, _ in drawn],
        dots=f"M106 12{dot}" + frame.marks(points.ends, dot),
        labels=[
            Label(6, 12, "start", "reward"),
            Label((LEFT + WIDTH) / 2, HEIGHT - 8, "middle", "tokens"),
            *(Label(x, 12, "start", kind) for kind, _, _, x in drawn),
            *(Label(LEFT - 6, frame.y(tick), "end", f"{tick:.6g}") for tick in rows),
            *(Label(frame.x(tick), HEIGHT - BOTTOM + 14, "middle", f"{tick:,.0f}") for tick in columns),
        ],
    )


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
    if points.steps:
        axes.plot(*zip(*points.steps, strict=True), "o-", markevery=(1, 2), color=BLUE, markersize=4, label="kept")
        if points.rejected:
            axes.plot(*zip(*points.rejected, strict=True), "x", color="gray", alpha=0.6, markersize=4, label="rejected")
        if points.thresholds:
            axes.plot(*zip(*points.thresholds, strict=True), "--", color=ORANGE, label="threshold")
        axes.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    else:
        axes.text(0.5, 0.5, "nothing was scored", transform=axes.transAxes, ha="center", va="center")
    axes.set(xlabel="tokens", ylabel="reward", xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    return axes
