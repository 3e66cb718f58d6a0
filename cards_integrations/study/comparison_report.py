"""Shows a comparison as a table, as charts, and as a page that opens offline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cards_integrations.study.arms import Arm
from cards_integrations.study.figures import as_base64, new_figure
from cards_integrations.study.metrics import Mean
from cards_integrations.study.rows import Row
from cards_integrations.templates import printable, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

COLUMNS = {
    "reward": "reward",
    "judged": "judge",
    "repeated_3grams": "repeated 3-grams, %",
    "log_p_per_token": "log p / token",
    "tokens": "tokens",
    "drafted_tokens": "drafted",
    "looked_at_tokens": "looked at",
    "rm_tokens": "RM tokens",
    "lm_forwards": "LM forwards",
    "rm_forwards": "RM forwards",
    "seconds": "seconds",
}
WIN_COLUMNS = {"judged": "wins by the judge, %", "reward": "wins by the reward, %"}
DERIVED_COLUMNS = ("perplexity", "distinct-1", "distinct-2", "self-BLEU")
TERMINAL_COLUMNS = ("reward", "judged", "repeated_3grams", "log_p_per_token", "drafted_tokens", "seconds")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
MARKS = "osD^vP*Xh<>"
Wins = Mapping[str, Mapping[str, Mean | None]]
"""The share of wins over the baseline, by arm and by the name of the reward."""


def table(arms: Sequence[Arm], wins: Wins, baseline: str) -> Table:
    """Return a table for a terminal, with one line for each arm.

    Args:
        arms: The arms.
        wins: Their win rates.
        baseline: The name of the arm with which win rates and times are compared.
    """
    from rich.table import Table

    rewards = [name for name in WIN_COLUMNS if any(wins[arm.name][name] is not None for arm in arms)][:1]
    numbers = [name for name in TERMINAL_COLUMNS if any(arm.mean(name) is not None for arm in arms)]
    [plain] = [arm.mean("seconds") for arm in arms if arm.name == baseline]
    table = Table(box=None)
    table.add_column("", overflow="fold")
    shown = [COLUMNS[name] for name in numbers]
    for heading in (*shown, f"time over {baseline}", "distinct-2", *(WIN_COLUMNS[name] for name in rewards)):
        table.add_column(heading, justify="right")
    for arm in arms:
        means = [arm.mean(name) for name in numbers]
        cells = ["" if mean is None else f"{mean.value:.3g}" for mean in means]
        taken = arm.mean("seconds")
        over = f"{taken.value / plain.value:.2f}" if taken and plain and plain.value else ""
        won = [wins[arm.name][name] for name in rewards]
        rates = ["" if rate is None else f"{100 * rate.value:.0f}" for rate in won]
        table.add_row(arm.name, *cells, over, f"{arm.diversity['distinct_2']:.3g}", *rates)
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


def page(arms: Sequence[Arm], wins: Wins, baseline: str, rows: Sequence[Row], max_examples: int = 20) -> str:
    """Return an HTML page without scripts or external files, in which the text of models is escaped.

    Args:
        arms: The arms of the table and of the charts.
        wins: Their win rates.
        baseline: The name of the arm with which they are compared.
        rows: Their answers.
        max_examples: How many prompts are shown with all their answers.
    """
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    return render(
        "comparison.html.j2",
        headings=[*WIN_COLUMNS.values(), *COLUMNS.values(), *DERIVED_COLUMNS],
        arms=[
            {
                "name": arm.name,
                "means": [*_percent(wins[arm.name]), *(arm.mean(name) for name in COLUMNS)],
                "derived": _derived(arm),
            }
            for arm in arms
        ],
        n_prompts=len(prompts),
        baseline=baseline,
        image=as_base64(frontier(arms)),
        examples=[_example([row for row in rows if row["prompt"] == prompt]) for prompt in prompts[:max_examples]],
        short=_short,
    )


def _example(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the answers to one prompt as the page shows them; of a conversation it shows only the last message."""
    asked = rows[0]["asked"]
    prompt = asked if isinstance(asked, str) else asked[-1].get("content", "") if asked else ""
    answers = [{"arm": row["arm"], "text": row["text"], "scores": _scores(row)} for row in rows]
    return {"prompt": str(prompt)[:200], "answers": answers}


def _scores(row: Row) -> str:
    scores = (("reward", row.get("reward")), ("judge", row.get("judged")))
    return ", ".join(f"{name} {value:.2f}" for name, value in scores if isinstance(value, float))


def _percent(wins: Mapping[str, Mean | None]) -> list[Mean | None]:
    return [rate and Mean(*(100 * value for value in rate)) for rate in map(wins.get, WIN_COLUMNS)]


def _derived(arm: Arm) -> list[str]:
    log_p, names = arm.mean("log_p_per_token"), ("distinct_1", "distinct_2", "self_bleu")
    values = (log_p and math.exp(-log_p.value), *(arm.diversity[name] for name in names))
    return ["" if value is None else f"{value:.3g}" for value in values]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
