"""The HTML of traces and reports: jinja2 templates, and the one place that renders them."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


def render(template: str, **data: Any) -> str:
    """Render a template of this folder.

    Args:
        template: The name of its file.
        data: What the template may use. Every text among it is escaped.
    """
    return _ENVIRONMENT.get_template(template).render(data)


def printable(text: str) -> str:
    """Replace halves of surrogate pairs, which no file can hold, with question marks."""
    return text.encode(errors="replace").decode()


def _escaped(value: object) -> object:
    """Escape a text; NUL, which HTML cannot write, is replaced, and a carriage return stays one."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = str(escape(printable(value)))
    return Markup(text.replace("\r", "&#13;").replace("\0", "\ufffd"))


_ENVIRONMENT = Environment(
    loader=PackageLoader("cards_integrations"),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_escaped,
    trim_blocks=True,
    lstrip_blocks=True,
)
