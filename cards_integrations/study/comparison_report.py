"""A comparison as a table, as charts, and as a page that opens offline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cards_integrations.study.arms import Arm
from cards_integrations.study.figures import as_base64, new_figure
from cards_integrations.study.rows import Row
from cards_integrations.templates import printable, render

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
DERIVED_COLUMNS = ("perplexity", "distinct-2", "self-BLEU")
TERMINAL_COLUMNS = ("reward", "judged", "log_p_per_token", "drafted_tokens", "rm_tokens", "seconds")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
MARKS = "osD^vP*Xh<>"


def table(arms: Sequence[Arm]) -> Table:
    """Return a table for a terminal, with one line for each arm."""
    from rich.table import Table

    table = Table(box=None)
    table.add_column("", overflow="fold")
    for name in TERMINAL_COLUMNS:
        table.add_column(COLUMNS[name], justify="right")
    for arm in arms:
        means = [arm.mean(name) for name in TERMINAL_COLUMNS]
        table.add_row(arm.name, *("" if mean is None else f"{mean.value:.3g}" for mean in means))
    return table


def frontier(arms: Sequence[Arm], cost: str = "drafted_tokens") -> Figure:
    """Draw the guiding reward and the judge's over the cost.

    Args:
        arms: The arms to draw.
        cost: The key of the cost in the rows.
    """
    kinds = [kind for kind in ("reward", "judged") if any(arm.mean(kind) for arm in arms)]
    figure = new_figure(6.5 * len(kinds), 5)
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        _draw(axes, arms, kind, cost)
    legend = figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    for name in legend.get_texts():
        name.set_parse_math(False)
    return figure


def _draw(axes: Axes, arms: Sequence[Arm], kind: str, cost: str) -> None:
    for number, arm in enumerate(arms):
        reached, paid = arm.mean(kind), arm.mean(cost)
        if reached is None or paid is None:
            continue
        axes.errorbar(
            paid.value, reached.value,
            xerr=[[paid.value - paid.low], [paid.high - paid.value]],
            yerr=[[reached.value - reached.low], [reached.high - reached.value]],
            fmt=MARKS[number % len(MARKS)], color=COLOURS[number % len(COLOURS)], capsize=2, label=printable(arm.name),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set(
        xlabel={"seconds": "seconds per answer"}.get(cost, f"tokens {COLUMNS.get(cost, cost)} per answer"),
        ylabel={"reward": "guiding reward", "judged": "held-out reward"}[kind],
    )
    axes.spines[["top", "right"]].set_visible(False)


def page(arms: Sequence[Arm], rows: Sequence[Row], max_examples: int = 20) -> str:
    """Return an HTML page without scripts or anything from elsewhere, in which the models' text is escaped.

    Args:
        arms: The arms of the table and of the charts.
        rows: Their answers.
        max_examples: How many prompts are shown with all their answers.
    """
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    return render(
        "comparison.html.j2",
        headings=[*COLUMNS.values(), *DERIVED_COLUMNS],
        arms=[
            {"name": arm.name, "means": [arm.mean(name) for name in COLUMNS], "derived": _derived(arm)} for arm in arms
        ],
        n_prompts=len(prompts),
        image=as_base64(frontier(arms)),
        examples=[_example([row for row in rows if row["prompt"] == prompt]) for prompt in prompts[:max_examples]],
        short=_short,
    )


def _example(rows: Sequence[Row]) -> dict[str, Any]:
    """All answers to one prompt; of a conversation only the last message is shown."""
    asked = rows[0]["asked"]
    prompt = asked if isinstance(asked, str) else asked[-1].get("content", "") if asked else ""
    answers = [{"arm": row["arm"], "text": row["text"], "scores": _scores(row)} for row in rows]
    return {"prompt": str(prompt)[:200], "answers": answers}


def _scores(row: Row) -> str:
    scores = (("reward", row.get("reward")), ("judge", row.get("judged")))
    return ", ".join(f"{name} {value:.2f}" for name, value in scores if isinstance(value, float))


def _derived(arm: Arm) -> list[str]:
    log_p = arm.mean("log_p_per_token")
    values = (log_p and math.exp(-log_p.value), arm.diversity["distinct_2"], arm.diversity["self_bleu"])
    return ["" if value is None else f"{value:.3g}" for value in values]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
