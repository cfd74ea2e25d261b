"""The page of each finding: its text, which comes with the package, and its address."""

from __future__ import annotations

import importlib.metadata
from functools import cache
from pathlib import Path

_FOLDER = "docs/findings"


def text(id: str) -> str:
    """The page of a finding, as Markdown."""
    package = Path(__file__).resolve().parents[1]
    # A wheel holds the pages; in a checkout they stand among the documentation.
    for folder in (package / "audit" / "data" / "findings", package.parent / _FOLDER):
        if (folder / f"{id}.md").is_file():
            return (folder / f"{id}.md").read_text(encoding="utf-8")
    raise FileNotFoundError(f"no page of {id}: this installation of klplug lacks {_FOLDER}")


def address(id: str) -> str:
    """Where the page stands on the web."""
    return f"{_site()}{_FOLDER}/{id}.md"


@cache
def _site() -> str:
    """Where the documentation's folder stands, from the metadata; empty without any."""
    try:
        urls = importlib.metadata.metadata("klplug").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    index: str = dict(url.split(", ", 1) for url in urls)["Documentation"]
    return index.removesuffix("docs/index.md")
