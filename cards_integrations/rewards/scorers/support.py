"""How far several sources support an answer, all together and each alone."""

from __future__ import annotations

from collections.abc import Sequence

from cards_integrations.rewards.base import Response


def support(response: Response, table: Sequence[Sequence[float]]) -> float:
    """`table[i][j]`: how source j supports sentence i. The mean over sentences of the best source's support.

    What each of several sources gives alone is left in the parts of the response.
    """
    if not table:
        return 0.0
    by_source = list(zip(*table, strict=True))
    if len(by_source) > 1:
        response.parts.update({f"source {j + 1}": sum(own) / len(own) for j, own in enumerate(by_source)})
    return sum(max(row) for row in table) / len(table)
