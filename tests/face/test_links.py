"""Every link, anchor, test and file that the documents name is there, on GitHub and on the site."""

from __future__ import annotations

import re
import subprocess
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/**/*.md"))
    if not path.name.startswith(".")
)
LINK = re.compile(r"(?<!\\)\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")


def prose(path: Path) -> str:
    """A page without its code blocks, where brackets are code."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(path: Path) -> set[str]:
    """Anchors of a page that are the same under GitHub's rule and Python-Markdown's."""
    shared = set()
    for heading in re.findall(r"^#{1,6} (.+)$", prose(path), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip()
        github = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
        markdown = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
        shared |= {github} & {markdown}
    return shared


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        if not path.is_relative_to(ROOT):
            assert target.startswith("../../"), f"{page.name}: {link} leaves the repository"
            continue  # a page of the repository's host, as GitHub resolves it
        assert path.exists(), f"{page.name}: {link}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{page.name}: {link}"


def test_every_test_that_a_page_names_is_there() -> None:
    defined = {
        (path.name, name)
        for path in ROOT.glob("tests/**/test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    files, names = {file for file, _ in defined}, {name for _, name in defined}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for file, name in re.findall(r"(test_\w+\.py)::(test_\w+)", text):
            assert (file, name) in defined, f"{page.name}: {file}::{name}"
        for file in re.findall(r"\btest_\w+\.py\b", text):
            assert file in files, f"{page.name}: {file}"
        for name in re.findall(r"`(test_\w+)`", text):
            assert name in names, f"{page.name}: {name}"


def test_every_file_that_a_page_names_is_there() -> None:
    tracked = set(
        subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.split()
    )
    if not tracked:
        pytest.skip("not a git checkout")
    rooms = r"adapters|benchmarks|docs|klplug(?=/[\w/]+\.py)|recipes|requirements|tests"
    for page in PAGES:
        if page.name.startswith(("CHANGELOG", "HYPOTHESES")):
            continue  # of the past, or of what is to come
        for name in re.findall(rf"`((?:{rooms})/[\w./-]+)`", page.read_text(encoding="utf-8")):
            if re.search(r"[A-Z]{2}|/results/\w+\.jsonl", name):
                continue  # a placeholder, as adapters/klplug_HOST, or what a grid of runs leaves
            path = name.rstrip("/")
            found = path in tracked or any(file.startswith(f"{path}/") for file in tracked)
            assert found, f"{page.name}: {name}"
