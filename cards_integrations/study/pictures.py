"""Charts of what was measured, with matplotlib (the extra `study`)."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cards_integrations.study.calibrate import Calibration

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>cards-integrations</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
p {{ margin: .3rem 0; }} img {{ width: 100%; margin-top: 1rem; }}
</style></head><body>
{text}
<img alt="charts" src="data:image/png;base64,{image}">
</body></html>
"""


def blank(width: float, height: float) -> Figure:
    """A figure that also shows itself in a notebook that has not chosen a backend."""
    from matplotlib.figure import Figure

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            return as_png(self)

    return Shown(figsize=(width, height), layout="constrained")


def as_png(figure: Figure) -> bytes:
    """The image."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    return image.getvalue()


def save(figure: Figure, path: str | Path, text: str) -> None:
    """As an image, or as a page with the text above it."""
    path = Path(path)
    if path.suffix != ".html":
        figure.savefig(path, dpi=150)
        return
    paragraphs = "\n".join(f"<p>{html.escape(line)}</p>" for line in text.splitlines())
    page = PAGE.format(text=paragraphs, image=base64.b64encode(as_png(figure)).decode())
    path.write_text(page, encoding="utf-8")


def draw_calibration(found: Calibration, axes: Sequence[Axes] | None = None) -> Figure:
    """Reward against tokens, how well a beginning foretells the end, and the lengths of segments."""
    from cards_integrations.study.calibrate import SHARES

    if axes is None:
        axes = blank(13, 3.8).subplots(1, 3)
    frontier, foretold, lengths = axes
    plain, chosen = found.plain, found.chosen.predicted

    frontier.plot(
        [c.predicted.drafted_tokens for c in found.curve], [c.predicted.reward for c in found.curve],
        color="tab:blue", label="CARDS, predicted",
    )  # fmt: skip
    frontier.plot(plain.drafted_tokens, plain.reward, "o", color="tab:gray", label="plain, measured")
    frontier.plot(chosen.drafted_tokens, chosen.reward, "o", color="tab:red", label="chosen")
    frontier.set(xlabel="tokens looked at, per answer", ylabel="mean reward", title="What a target buys")
    frontier.set_xscale("log")
    frontier.legend(frameon=False)

    foretold.plot([100 * share for share in SHARES], found.correlations, "o-", color="tab:blue")
    foretold.axhline(0, color="tab:gray", linewidth=0.8)
    foretold.set(
        xlabel="share of the answer, %",
        ylabel="correlation",
        ylim=(-0.2, 1.05),
        title="A beginning's reward and the end's",
    )

    lengths.hist(found.segment_lengths, bins=range(1, max(found.segment_lengths) + 2), color="tab:blue", align="left")
    lengths.set(xlabel="tokens", ylabel="drafts", title=f"Segments at entropy threshold {found.boundary.threshold:.2f}")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure = frontier.figure
    figure.suptitle(f"{found.reward.name} on {found.model.model}", fontsize=10)
    return figure  # type: ignore[return-value]
