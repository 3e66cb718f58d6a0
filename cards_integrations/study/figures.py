"""Figures of matplotlib (the extra `study`), as images and for pages."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure that draws itself in a notebook, even if no backend has been chosen there.

    Args:
        width: The width, in inches.
        height: The height, in inches.
    """
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            return as_png(self)

    return NotebookFigure(figsize=(width, height), layout="constrained")


def as_png(figure: Figure) -> bytes:
    """Return the figure as a PNG image."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    return image.getvalue()


def as_base64(figure: Figure) -> str:
    """Return the figure as a PNG image for a data URL."""
    return base64.b64encode(as_png(figure)).decode()
