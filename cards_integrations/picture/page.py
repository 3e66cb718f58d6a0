"""An alignment as HTML: what a notebook shows, and a page in which all segments are links to their candidates."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cards_integrations.picture.chart import Points, chart
from cards_integrations.picture.numbers import counted, decision, is_below, number
from cards_integrations.picture.tree import Node, levels_of
from cards_integrations.templates import render
from cards_integrations.trace import Alignment, DraftTrace, Guidance, Segment

FAINT, STRONG = 0.1, 0.6  # opacity of the blue at the lowest and at the highest reward
AT_ONCE = 0.004  # of the whole time; segments that were kept within it are one bar of the time line
VERDICTS = {"accepted": "✓ accepted", "rejected": "✗ rejected", "best": "✓ best", "unscored": "unscored"}
WENT_ON = "→ went on"


def page(alignment: Alignment) -> str:
    """Return a whole HTML page that opens offline."""
    return render("alignment_page.html.j2", **_data(alignment, linked=True))


def fragment(alignment: Alignment) -> str:
    """Return the HTML that a notebook shows: no scripts, no links, and the model's text is never markup."""
    return render("alignment.html.j2", **_data(alignment, linked=False))


def _data(alignment: Alignment, linked: bool) -> dict[str, Any]:
    """Return the data of the templates of an alignment; `linked` makes segments links."""
    points, levels = Points.of(alignment), levels_of(alignment)
    drafts = [draft for segment in alignment.segments for draft in segment.drafts]
    rewards = [segment.reward for segment in alignment.segments if segment.reward is not None]
    return {
        "alignment": alignment,
        "linked": linked,
        "pieces": list(_pieces(alignment, rewards)),
        "legend": _legend(alignment, rewards),
        "cost": cost(alignment),
        "chart": chart(points) if points.kept else None,
        "bars": _time_line(alignment),
        "curves": list(_curves(alignment)),
        "rows": list(zip(alignment.segments, levels, strict=True)),
        "branches": any(draft.parent is not None for draft in drafts),
        "thresholds": any(draft.threshold is not None for draft in drafts),
        "n_drafts": len(drafts),
        "unseen_rounds": alignment.plan is not None and len(alignment.plan.rounds) > len(levels),
        **{word.__name__: word for word in (number, counted, facts, followed, verdict, parts, as_json)},
    }


# --- words ---


def as_json(value: Any) -> str:
    """Format the arguments of a tool call."""
    return json.dumps(value, ensure_ascii=False, default=str)


def parts(draft: DraftTrace) -> str:
    """Format the scores that a composite reward consists of."""
    return " · ".join(f"{name} {number(value)}" for name, value in draft.parts.items())


def verdict(node: Node) -> str:
    """Return in words what became of a candidate."""
    return WENT_ON if node.went_on and not node.kept else VERDICTS[node.draft.verdict]


def followed(node: Node) -> str:
    """Return in words what a candidate follows: the place, from 1, of one of the segment before, or the kept text."""
    if node.draft.parent is not None:
        return str(node.draft.parent + 1)
    return "kept" if node.segment > 1 else "-"


def facts(segment: Segment, level: Sequence[Node]) -> str:
    """Format as `1.138 ≥ 0.863 · 12 candidates · 3 went on`."""
    went_on = sum(node.went_on and not node.kept for node in level)
    found = [decision(segment), counted(len(level), "candidate"), f"{went_on} went on" if went_on else ""]
    return " · ".join(filter(None, found))


def cost(alignment: Alignment) -> str:
    """Return one line on how an answer ended, and on everything that it cost."""
    usage = alignment.usage
    reward = "" if alignment.reward is None else f"reward {number(alignment.reward)}"
    if reward and alignment.prompt_reward is not None:
        reward += f" (prompt alone {number(alignment.prompt_reward)})"
    models = [
        ("language model", usage.lm_forwards, usage.lm_tokens),
        ("reward model", usage.rm_forwards, usage.rm_tokens),
    ]
    told = [
        " on ".join(filter(None, [alignment.method, alignment.model])),
        reward,
        *(_goals(alignment.guidance) if alignment.guidance else ()),
        f"{counted(usage.completion_tokens, 'token')} kept, {usage.drafted_tokens:,} drafted",
        f"{counted(usage.drafts, 'candidate')} looked at",
        *(f"{name} {counted(n, 'forward')}, {counted(tokens, 'token')}" for name, n, tokens in models if n),
        f"{usage.seconds:.2f} s",
        f"finish: {alignment.finish_reason}",
        f"seed {alignment.seed}",
    ]
    return " · ".join(filter(None, told))


def _goals(guidance: Guidance) -> Iterator[str]:
    """Yield the target and the beta in words, with where each came from."""
    named = (
        ("target", guidance.target, guidance.target_origin),
        ("beta", guidance.beta, guidance.beta_origin),
    )
    for name, value, origin in named:
        if value is not None:
            yield f"{name} {number(value)}" + (f" ({origin})" if origin else "")


# --- the running text ---


class Piece(NamedTuple):
    """A kept segment in the running text.

    Attributes:
        before: The white space before it, which is not coloured.
        text: Its text.
        after: The white space after it.
        title: Its reward, threshold and length.
        below: True if its reward is below its threshold.
        blue: The opacity of the blue behind it; None if it was not scored.
    """

    before: str
    text: str
    after: str
    title: str
    below: bool
    blue: float | None


def _pieces(alignment: Alignment, rewards: Sequence[float]) -> Iterator[Piece]:
    """Cut the text by the lengths of its segments: a stop string may have cut several of them."""
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
    """Return the opacity of the blue behind a segment, given its reward and those of all segments."""
    low, high = min(rewards), max(rewards)
    share = (reward - low) / (high - low) if high > low else 0.5
    return FAINT + share * (STRONG - FAINT)


class Legend(NamedTuple):
    """The legend of the blue.

    Attributes:
        low: The lowest reward of a segment.
        high: The highest reward of a segment.
        gradient: The colours of both, for CSS.
        below: True if a reward is below its threshold, which needs an entry of its own.
    """

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


# --- over time, and by part ---


class Bar(NamedTuple):
    """Segments that were kept at the same moment: those from `first` to `last`, which took `seconds`."""

    first: int
    last: int
    seconds: float
    share: float
    """Its length in percent of the time line."""

    @property
    def numbers(self) -> str:
        """Format as `3` or `3-5`."""
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def _time_line(alignment: Alignment) -> list[Bar]:
    """Return the bars of the time line."""
    moments: list[tuple[int, int, float]] = []  # the first and the last segment that were kept then
    for i, kept in enumerate(alignment.kept_at, start=1):
        together = moments and kept - moments[-1][2] <= AT_ONCE * alignment.kept_at[-1]
        moments.append((moments.pop()[0] if together else i, i, kept))
    begins = [0.0, *(kept for _, _, kept in moments)]
    whole = begins[-1] or 1.0
    return [
        Bar(first, last, kept - begin, 100 * (kept - begin) / whole)
        for (first, last, kept), begin in zip(moments, begins, strict=False)
    ]


class Curve(NamedTuple):
    """A part of the reward along an answer: its name, its last value, and its path in an SVG."""

    name: str
    last: float
    path: str


def _curves(alignment: Alignment) -> Iterator[Curve]:
    """Yield a curve for each part of a composite reward; paths are 200 wide and 24 high."""
    ends, end = [], 0
    for segment in alignment.segments:
        end += len(segment.token_ids)
        ends.append((end, segment.parts))
    for name, last in alignment.rewards.items():
        line = [(end, parts[name]) for end, parts in ends if name in parts]
        low, high = min(value for _, value in line), max(value for _, value in line)
        middle, span, length = (low + high) / 2, high - low or 1.0, max(1, end)
        points = [f"{4 + 192 * end / length:.1f} {12 - 16 * (value - middle) / span:.1f}" for end, value in line]
        yield Curve(name, last, "M" + "L".join(points))
