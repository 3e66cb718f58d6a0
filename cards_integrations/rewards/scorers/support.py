"""How well several sources support an answer, all together and each alone."""

from __future__ import annotations

from collections.abc import Sequence

from cards_integrations.rewards.base import Response


def support(response: Response, table: Sequence[Sequence[float]]) -> float:
    """Average the support of an answer's sentences, each by the source that supports it best.

    Args:
        response: In its `parts` the mean support of each source alone is left, if there are several.
        table: `table[i][j]` says how much source j supports sentence i; (sentences, sources).

    Returns:
        The mean over sentences; 0.0 if there are none.
    """
    if not table:
        return 0.0
    by_source = list(zip(*table, strict=True))
    if len(by_source) > 1:
        response.parts.update({f"source {j + 1}": sum(own) / len(own) for j, own in enumerate(by_source)})
    return sum(max(row) for row in table) / len(table)
