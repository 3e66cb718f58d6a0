"""Formulas: MathML in the pages, so that a browser needs neither a script nor a network, and LaTeX for programs."""

from __future__ import annotations

import re
from html import unescape

from bs4 import BeautifulSoup
from latex2mathml.converter import convert

FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.+?)\\[)\]]</(?P=tag)>', re.DOTALL)


def on_page_content(html: str, **_: object) -> str:
    return FORMULA.sub(lambda found: mathml(unescape(found["latex"]), found["tag"] == "div"), html)


def mathml(latex: str, displayed: bool) -> str:
    return convert(latex.strip(), display="block" if displayed else "inline")


def preprocess(soup: BeautifulSoup, output: str) -> None:
    """Make code of formulas, for `llms.txt`: as text their backslashes would be escaped."""
    for formula in soup.find_all(class_="arithmatex"):
        latex = formula.get_text()[2:-2].strip()
        formula.name = "pre" if formula.name == "div" else "code"
        formula.string = latex
