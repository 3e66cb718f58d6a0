"""An alignment as a picture: HTML for notebooks, a page of its own, and a chart with matplotlib."""

from cards_integrations.picture.chart import draw
from cards_integrations.picture.page import fragment, page

__all__ = ["draw", "fragment", "page"]
