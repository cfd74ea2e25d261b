"""Formulas of the site: TeX between dollars, and in ``math`` blocks, as MathML.

GitHub reads the same pages and typesets both itself. MathML needs no script and no font file: it is
made while MkDocs builds. ``mkdocs.yml`` names this file under ``hooks``.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# As pymdownx.arithmatex leaves them.
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_page_content(content: str, **_: Any) -> str:
    """A page's HTML with its formulas typeset; MkDocs calls it for each page."""
    return FORMULA.sub(_typeset, content)


def _typeset(formula: re.Match[str]) -> str:
    display = "block" if formula["tag"] == "div" else "inline"
    tex = html.unescape(formula["tex"]).strip()
    # Around a formula wider than a phone the page stays, and the formula scrolls.
    return f'<{formula["tag"]} class="formula">{convert(tex, display=display)}</{formula["tag"]}>'
