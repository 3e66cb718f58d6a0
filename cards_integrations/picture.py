"""An alignment as a picture: HTML for notebooks, a page of its own, and a chart with matplotlib."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cards_integrations.trace import Alignment, DraftTrace, Segment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE = "#2f7fd1", "#d9730d"  # told apart by colour-blind eyes, and legible on white and on black
FAINT, STRONG = 0.1, 0.6  # how blue the lowest and the highest reward are
WIDTH, HEIGHT = 900, 230  # of the chart, and its margins
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 28, 44
WORDS = {"accepted": "✓ accepted", "rejected": "✗ rejected", "best": "✓ best", "unscored": "unscored"}

# Colours are the notebook's own, or see-through: so it suits light and dark themes without knowing of them.
STYLE = """
.cards-trace { max-width: 60rem; line-height: 1.5; font-variant-numeric: tabular-nums; }
.cards-trace p { margin: .6em 0; }
.cards-trace .note, .cards-trace th, .cards-trace .number, .cards-trace .facts {
  color: color-mix(in srgb, currentColor 72%, transparent); font-size: .85em; }
.cards-trace .answer { line-height: 1.9; counter-reset: segment; }
.cards-trace .answer, .cards-trace .draft { white-space: pre-wrap; overflow-wrap: anywhere; }
.cards-trace .kept, .cards-trace .draft, .cards-trace .excerpt { unicode-bidi: isolate; }
.cards-trace span.kept { background: rgb(47 127 209 / var(--blue, 0)); border-radius: 3px; padding: .15em;
  counter-increment: segment; }
.cards-trace span.kept:not(:only-child)::after { content: "\\2060" counter(segment); font-size: .62em; opacity: .6;
  vertical-align: .5em; padding-left: .2em; user-select: none; }
.cards-trace .below { text-decoration: underline dotted 2px #d9730d; text-underline-offset: .25em; }
.cards-trace .scale { display: inline-block; width: 7em; height: .8em; margin: 0 .5em; border-radius: 3px; }
.cards-trace svg { display: block; width: 100%; height: auto; margin: .8em 0; }
.cards-trace svg text { fill: currentColor; font: 12px system-ui, sans-serif; }
.cards-trace path { fill: none; stroke: currentColor; stroke-width: 1.5; }
.cards-trace path.grid { stroke-width: 1; opacity: .15; }
.cards-trace path.rejected { opacity: .45; }
.cards-trace path.threshold { stroke: #d9730d; stroke-width: 2; stroke-dasharray: 6 4; }
.cards-trace path.kept { stroke: #2f7fd1; stroke-width: 2; }
.cards-trace path.dots { stroke: #2f7fd1; stroke-width: 6; stroke-linecap: round; }
.cards-trace summary { cursor: pointer; padding: .2em 0; }
.cards-trace details details { margin-left: 1.1em; border-top: 1px solid rgb(128 128 128 / .25); }
.cards-trace .row { display: inline-flex; align-items: baseline; gap: 1em; width: calc(100% - 1.5em); }
.cards-trace .number { min-width: 1.8em; text-align: right; }
.cards-trace .excerpt { flex: 1; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.cards-trace .excerpt:empty::before { content: "no text"; opacity: .5; }
.cards-trace .facts { white-space: nowrap; }
.cards-trace table.drafts { border-collapse: collapse; margin: .2em 0 1em 1.6em; font-size: .9em; }
.cards-trace table.drafts tr { background: none; border: 0; }
.cards-trace table.drafts td, .cards-trace table.drafts th { text-align: left; vertical-align: top;
  padding: .15em 1.2em .15em 0; border: 0; font-weight: normal; max-width: none; white-space: nowrap; }
.cards-trace table.drafts .value { text-align: right; }
.cards-trace table.drafts .said { white-space: normal; }
.cards-trace .chosen td:not(.said) { font-weight: 600; }
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>cards-integrations</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; }}
@media (prefers-color-scheme: dark) {{ body {{ color: #ddd; background: #161618; }} }}
</style></head><body>
{fragment}
</body></html>
"""


Line = list[tuple[int, float]]


@dataclass
class Points:
    """What the charts show over tokens: kept segments (begin and end of each), their thresholds, rejected drafts."""

    steps: Line = field(default_factory=list)
    thresholds: Line = field(default_factory=list)
    rejected: Line = field(default_factory=list)

    @property
    def ends(self) -> Line:
        return self.steps[1::2]

    @property
    def rewards(self) -> list[float]:
        return [reward for _, reward in self.ends]


def points(alignment: Alignment) -> Points:
    """Read off an alignment."""
    found, begin = Points(), 0
    for segment in alignment.segments:
        end = begin + len(segment.token_ids)
        if segment.reward is not None:
            found.steps += [(begin, segment.reward), (end, segment.reward)]
        if segment.threshold is not None:
            found.thresholds.append((end, segment.threshold))
        for draft in segment.drafts:
            if draft.verdict == "rejected" and draft.reward is not None:
                found.rejected.append((begin + len(draft.token_ids), draft.reward))
        begin = end
    if len(found.thresholds) == 1:  # a line takes two
        found.thresholds.insert(0, (0, found.thresholds[0][1]))
    return found


def page(alignment: Alignment) -> str:
    """A whole page that opens offline."""
    return PAGE.format(fragment=fragment(alignment))


def fragment(alignment: Alignment) -> str:
    """What a notebook shows. It has neither scripts nor links, and the model's text is never markup."""
    found = points(alignment)
    return "\n".join([
        f'<div class="cards-trace"><style>{STYLE}</style>',
        answer(alignment, found.rewards),
        *(f'<p class="call">{line}</p>' for line in calls(alignment)),
        legend(alignment, found.rewards),
        f'<p class="note cost">{escaped(cost(alignment))}</p>',
        chart(found),
        candidates(alignment),
        "</div>",
    ])  # fmt: skip


def printable(text: str) -> str:
    """Halves of surrogate pairs, which no file can carry, are replaced."""
    return text.encode(errors="replace").decode()


def escaped(text: str) -> str:
    """Text as HTML; what HTML cannot carry (NUL, halves of surrogate pairs) is replaced."""
    return html.escape(printable(text)).replace("\r", "&#13;").replace("\0", "\ufffd")


def number(value: float | None) -> str:
    """Three decimals, but three digits of what is tiny or huge."""
    if value is None:
        return "-"
    return f"{value:,.3f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.3g}"


def counted(n: int, thing: str) -> str:
    """`1 token`, `1,000 tokens`."""
    return f"{n:,} {thing}{'s' * (n != 1)}"


def below(segment: Segment) -> bool:
    """Was it kept though its reward is below the threshold?"""
    return segment.reward is not None and segment.threshold is not None and segment.reward < segment.threshold


def judged(segment: Segment) -> str:
    """`1.138 ≥ 0.863`: its reward and its threshold, as far as there are any."""
    if segment.reward is None:
        return "not scored"
    relation = f" {'<' if below(segment) else '≥'} {number(segment.threshold)}" if segment.threshold is not None else ""
    return html.escape(number(segment.reward) + relation)


def answer(alignment: Alignment, rewards: Sequence[float]) -> str:
    """The running text, with each kept segment as blue as its reward is high."""
    if not alignment.text:
        return '<p class="note">The answer is empty.</p>'
    marked = "".join(_marked(segment, text, rewards) for segment, text in _pieces(alignment))
    return f'<div class="answer" dir="auto">{marked or escaped(alignment.text)}</div>'


def _pieces(alignment: Alignment) -> Iterator[tuple[Segment, str]]:
    """Cut from the text by length: a stop string may reach across segments."""
    begin, last = 0, len(alignment.segments) - 1
    for i, segment in enumerate(alignment.segments):
        end = len(alignment.text) if i == last else begin + len(segment.text)
        yield segment, alignment.text[begin:end]
        begin = end


def _marked(segment: Segment, text: str, rewards: Sequence[float]) -> str:
    """White space around it stays outside, so that its number stands behind its last word."""
    body = text.strip()
    before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :] if body else ""
    kind = "kept below" if below(segment) else "kept"
    blue = "" if segment.reward is None else f' style="--blue: {_blue(segment.reward, rewards):.2f}"'
    facts = f"{judged(segment)} · {counted(len(segment.token_ids), 'token')}"
    return f'{escaped(before)}<span class="{kind}" title="{facts}"{blue}>{escaped(body)}</span>{escaped(after)}'


def _blue(reward: float, rewards: Sequence[float]) -> float:
    low, high = min(rewards), max(rewards)
    share = (reward - low) / (high - low) if high > low else 0.5
    return FAINT + share * (STRONG - FAINT)


def calls(alignment: Alignment) -> Iterator[str]:
    """Tool calls, and what should have been some."""
    for call in alignment.tool_calls:
        arguments = json.dumps(call.arguments, ensure_ascii=False, default=str)
        yield f"calls <code>{escaped(f'{call.name}({arguments})')}</code>"
    for wrong in alignment.invalid_tool_calls:
        yield f"invalid call <code>{escaped(f'{wrong.name}({wrong.arguments})')}</code>: {escaped(wrong.error)}"


def legend(alignment: Alignment, rewards: Sequence[float]) -> str:
    """What the blue means, in numbers."""
    if not rewards:
        return '<p class="note">No rewards: nothing was scored.</p>'
    low, high = min(rewards), max(rewards)
    ends = ", ".join(f"rgb(47 127 209 / {_blue(reward, rewards)})" for reward in (low, high))
    told = f'reward {number(low)}<span class="scale" style="background: linear-gradient(90deg, {ends})"></span>'
    told += number(high) if high > low else ""
    if any(below(segment) for segment in alignment.segments):
        told += ' &emsp; <span class="below">underlined</span>: kept below its threshold'
    return f'<p class="note legend">{told}</p>'


def cost(alignment: Alignment) -> str:
    """One line: how it ended, and all that was paid."""
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


def candidates(alignment: Alignment) -> str:
    """All that was looked at, folded up segment by segment."""
    if not alignment.segments:
        return ""
    looked_at = sum(len(segment.drafts) for segment in alignment.segments)
    title = f"{counted(len(alignment.segments), 'segment')}, {counted(looked_at, 'candidate')}"
    folds = "".join(_fold(i, segment) for i, segment in enumerate(alignment.segments, 1))
    unfolded = " open" if len(alignment.segments) <= 20 else ""
    return f"<details{unfolded}><summary>{title}</summary>{folds}</details>"


def _fold(i: int, segment: Segment) -> str:
    facts = f"{judged(segment)} · {counted(len(segment.drafts), 'candidate')}"
    return (
        f'<details><summary><span class="row"><span class="number">{i}</span> '
        f'<span class="excerpt">{escaped(segment.text)}</span> <span class="facts">{facts}</span></span></summary>'
        '<table class="drafts"><tr><th>verdict</th><th class="value">reward</th><th class="value">threshold</th>'
        f"<th>text</th></tr>{''.join(map(_row, segment.drafts))}</table></details>"
    )


def _row(draft: DraftTrace) -> str:
    chosen = ' class="chosen"' if draft.verdict in ("accepted", "best") else ""
    parts = " · ".join(f"{name} {number(value)}" for name, value in draft.parts.items())
    return (
        f"<tr{chosen}><td>{WORDS[draft.verdict]}</td>"
        f'<td class="value">{number(draft.reward)}</td><td class="value">{number(draft.threshold)}</td>'
        f'<td class="said"><div class="draft" dir="auto">{escaped(draft.text)}</div>'
        f'{parts and f"""<div class="note">{escaped(parts)}</div>"""}</td></tr>'
    )


def ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers in between."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= next((m for m in (5, 2) if (high - low) / (m * step) >= 3), 1)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(found: Points) -> str:
    """Rewards and thresholds over tokens, as an inline SVG."""
    if not found.steps:
        return ""
    heights = [reward for _, reward in found.steps + found.thresholds + found.rejected]
    margin = 0.06 * (max(heights) - min(heights)) or abs(heights[0]) / 2 or 1.0  # a scale, even if all are equal
    low, high = min(heights) - margin, max(heights) + margin
    last = max(1, *(end for end, _ in found.steps + found.rejected))

    def x(tokens: float) -> float:
        return round(LEFT + tokens / last * (WIDTH - LEFT - RIGHT), 1)

    def y(reward: float) -> float:
        return round(HEIGHT - BOTTOM - (reward - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def through(line: Line) -> str:
        return "M" * bool(line) + "L".join(f"{x(end)} {y(reward)}" for end, reward in line)

    rows, columns = ticks(low, high), [tick for tick in ticks(0, last) if tick == round(tick)]
    grid = "".join(f"M{LEFT} {y(tick)}H{WIDTH - RIGHT}" for tick in rows)
    dots = "M106 12h0" + "".join(f"M{x(end)} {y(reward)}h0" for end, reward in found.ends)
    crosses = "".join(f"M{x(end)} {y(reward)}m-3-3l6 6m0-6l-6 6" for end, reward in found.rejected)
    lines = [  # each with its sample in the key
        ("rejected", "M182 9l6 6m0-6l-6 6", crosses),
        ("threshold", "M272 12h28", through(found.thresholds)),
        ("kept", "M92 12h28", through(found.steps)),
    ]
    key = {"kept": 128, "rejected": 196, "threshold": 308}
    words = [
        (6, 12, "start", "reward"), ((LEFT + WIDTH) / 2, HEIGHT - 8, "middle", "tokens"),
        *((key[name], 12, "start", name) for name, _, line in lines if line),
        *((LEFT - 6, y(tick), "end", f"{tick:.6g}") for tick in rows),
        *((x(tick), HEIGHT - BOTTOM + 14, "middle", f"{tick:,.0f}") for tick in columns),
    ]  # fmt: skip
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="reward over tokens">'
        + f'<path class="grid" d="{grid}"/>'
        + "".join(f'<path class="{name}" d="{sample}{line}"/>' for name, sample, line in lines if line)
        + f'<path class="dots" d="{dots}"/>'
        + "".join(f'<text x="{at}" y="{up}" dy=".35em" text-anchor="{to}">{word}</text>' for at, up, to, word in words)
        + "</svg>"
    )


def draw(alignment: Alignment, axes: Axes | None = None) -> Axes:
    """The same chart with matplotlib (the extra `study`)."""
    if axes is None:
        from matplotlib import pyplot

        axes = pyplot.subplots(figsize=(9, 3.2), layout="constrained")[1]
    found = points(alignment)
    if found.steps:
        axes.plot(*zip(*found.steps, strict=True), "o-", markevery=(1, 2), color=BLUE, markersize=4, label="kept")
        if found.rejected:
            axes.plot(*zip(*found.rejected, strict=True), "x", color="gray", alpha=0.6, markersize=4, label="rejected")
        if found.thresholds:
            axes.plot(*zip(*found.thresholds, strict=True), "--", color=ORANGE, label="threshold")
        axes.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    else:
        axes.text(0.5, 0.5, "nothing was scored", transform=axes.transAxes, ha="center", va="center")
    axes.set(xlabel="tokens", ylabel="reward", xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    return axes
