"""What is made for a Markdown page: a table, and the places of a page that stay in step with it."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("|" + "".join(f" {cell}".rstrip() + " |" for cell in line) for line in lines)


def filled(page: Path, parts: Mapping[str, str]) -> str:
    """The page with what stands between ``<!-- name -->`` and ``<!-- end -->`` made anew.

    Raises:
        LookupError: The page has no such place.
    """
    text = page.read_text("utf-8")
    for name, made in parts.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(start)
        if not found:
            raise LookupError(f"{page.name} has no place for {name!r}")
        text = f"{before}{start}\n{made}\n\n{end}{rest.partition(end)[2]}"
    return text
