"""Numbers as a picture writes them."""

from __future__ import annotations

from cards_integrations.trace import Segment


def number(value: float | None) -> str:
    """Format with three decimals, or with three digits if the value is tiny or huge."""
    if value is None:
        return "-"
    if value == 0:
        return "0.000"
    return f"{value:,.3f}" if 1e-3 <= abs(value) < 1e6 else f"{value:.3g}"


def counted(n: int, thing: str) -> str:
    """Format as `1 token`, `1,000 tokens`."""
    return f"{n:,} {thing}{'s' * (n != 1)}"


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
