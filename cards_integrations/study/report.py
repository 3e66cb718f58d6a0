"""A comparison as a table, as charts, and as a page that opens offline."""

from __future__ import annotations

import base64
import math
from typing import TYPE_CHECKING

from cards_integrations.picture import escaped, printable
from cards_integrations.study.compare import Arm, Comparison
from cards_integrations.study.metrics import Mean
from cards_integrations.study.pictures import as_png, blank

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

COLUMNS = {
    "reward": "reward",
    "judged": "judge",
    "log_p_per_token": "log p / token",
    "tokens": "tokens",
    "drafted_tokens": "drafted",
    "looked_at_tokens": "looked at",
    "rm_tokens": "RM tokens",
    "lm_forwards": "LM forwards",
    "rm_forwards": "RM forwards",
    "seconds": "seconds",
}
IN_A_TERMINAL = ("reward", "judged", "log_p_per_token", "drafted_tokens", "rm_tokens", "seconds")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
MARKS = "osD^vP*Xh<>"
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Comparison</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 90rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .5rem; text-align: right; border-bottom: 1px solid #8884; }}
th:first-child, td:first-child {{ text-align: left; }}
small {{ opacity: .65; white-space: nowrap; }}
img {{ width: 100%; background: white; border-radius: .5rem; }}
.wide {{ overflow-x: auto; }}
details {{ margin: .6rem 0; }} summary {{ cursor: pointer; }}
dl {{ margin: .4rem 0 .4rem 1rem; }} dt {{ font-weight: 600; }}
dd {{ margin: 0 0 .5rem; white-space: pre-wrap; overflow-wrap: anywhere; }}
</style></head><body>
<h1>{title}</h1>
<p>Means over prompts with 95% bootstrap intervals. The judge is a held-out reward: it guides nothing.</p>
<div class="wide">{table}</div>
<p><img alt="reward against cost" src="data:image/png;base64,{image}"></p>
<h2>Answers</h2>
{answers}
</body></html>
"""


def table(found: Comparison) -> Table:
    """One line for each arm."""
    from rich.table import Table

    shown = Table(box=None)
    shown.add_column("", overflow="fold")
    for name in IN_A_TERMINAL:
        shown.add_column(COLUMNS[name], justify="right")
    for arm in found.arms.values():
        means = [arm.mean(name) for name in IN_A_TERMINAL]
        shown.add_row(arm.name, *("" if mean is None else f"{mean.value:.3g}" for mean in means))
    return shown


def frontier(found: Comparison, cost: str = "drafted_tokens") -> Figure:
    """Guiding reward and judge, over the cost."""
    kinds = [kind for kind in ("reward", "judged") if any(arm.mean(kind) for arm in found.arms.values())]
    figure = blank(6.5 * len(kinds), 5)
    for axis, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        _draw(axis, found, kind, cost)
    legend = figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    for name in legend.get_texts():
        name.set_parse_math(False)
    return figure


def _draw(axis: Axes, found: Comparison, kind: str, cost: str) -> None:
    for number, arm in enumerate(found.arms.values()):
        reached, paid = arm.mean(kind), arm.mean(cost)
        if reached is None or paid is None:
            continue
        axis.errorbar(
            paid.value, reached.value,
            xerr=[[paid.value - paid.low], [paid.high - paid.value]],
            yerr=[[reached.value - reached.low], [reached.high - reached.value]],
            fmt=MARKS[number % len(MARKS)], color=COLOURS[number % len(COLOURS)], capsize=2, label=printable(arm.name),
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set(
        xlabel={"seconds": "seconds per answer"}.get(cost, f"tokens {COLUMNS.get(cost, cost)} per answer"),
        ylabel={"reward": "guiding reward", "judged": "held-out reward"}[kind],
    )
    axis.spines[["top", "right"]].set_visible(False)


def page(found: Comparison, examples: int = 20) -> str:
    """HTML without scripts or anything from elsewhere; the models' text is escaped."""
    headings = "".join(f"<th>{escaped(h)}</th>" for h in ["", *COLUMNS.values(), *DERIVED])
    lines = [f"<tr>{headings}</tr>"]
    for arm in found.arms.values():
        cells = [escaped(arm.name), *(_cell(arm.mean(name)) for name in COLUMNS), *_derived(arm)]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    prompts = dict.fromkeys(row["prompt"] for row in found.rows)
    return PAGE.format(
        title=f"{len(found.arms)} methods, {len(prompts)} prompts",
        table=f"<table>{''.join(lines)}</table>",
        image=base64.b64encode(as_png(frontier(found))).decode(),
        answers="\n".join(_answers(found, prompt) for prompt in list(prompts)[:examples]),
    )


def _answers(found: Comparison, prompt: int) -> str:
    own = [row for row in found.rows if row["prompt"] == prompt]
    asked = own[0]["asked"]
    said = asked if isinstance(asked, str) else asked[-1].get("content", "") if asked else ""
    entries = "".join(
        f"<dt>{escaped(row['arm'])} <small>{_score(row)}</small></dt><dd>{escaped(row['text'])}</dd>" for row in own
    )
    return f"<details><summary>{escaped(str(said)[:200])}</summary><dl>{entries}</dl></details>"


def _score(row: dict[str, object]) -> str:
    named = (("reward", row.get("reward")), ("judge", row.get("judged")))
    return ", ".join(f"{name} {value:.2f}" for name, value in named if isinstance(value, float))


DERIVED = ("perplexity", "distinct-2", "self-BLEU")


def _derived(arm: Arm) -> list[str]:
    log_p = arm.mean("log_p_per_token")
    values = (log_p and math.exp(-log_p.value), arm.diversity["distinct_2"], arm.diversity["self_bleu"])
    return ["" if value is None else f"{value:.3g}" for value in values]


def _cell(mean: Mean | None) -> str:
    return "" if mean is None else f"{_short(mean.value)}<br><small>{_short(mean.low)} … {_short(mean.high)}</small>"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
