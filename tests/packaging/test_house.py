"""The house: which floor may import what, and that nothing below ``klplug/`` names a host."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Floor: what it may import beside the standard library, inside functions too. One that ends in .py
# is held to its own line. The table stands in CONTRIBUTING.md.
ALLOWED = {
    "klplug": ("torch",),
    "klplug/catalogue.py": ("klplug", "klplug.hosting"),
    "klplug/__main__.py": ("klplug.cli",),
    "klplug/hosting": ("klplug", "torch", "wrapt", "ray", "transformers"),
    "klplug/audit": ("klplug", "klplug.hosting", "yaml"),
    "klplug/report": (
        *("klplug", "klplug.hosting", "matplotlib", "jinja2", "markupsafe", "scipy"),
        *("tensorboard", "google", "wandb"),
    ),
    "klplug/cli": (
        *("klplug", "klplug.hosting", "klplug.audit", "klplug.report"),
        *("typer", "rich", "matplotlib", "torch", "ray"),
    ),
    "adapters/klplug_openrlhf": (
        *("klplug", "klplug.hosting", "klplug.audit", "torch", "wrapt", "ray", "openrlhf"),
        "deepspeed",
    ),
    "adapters/klplug_verl": (
        *("klplug", "klplug.hosting", "klplug.audit", "klplug_verl_guard"),
        *("torch", "wrapt", "yaml", "hydra", "omegaconf", "verl"),
    ),
    "adapters/klplug_verl_guard": (),
    "adapters/hydra_plugins": ("klplug_verl_guard",),
}
# Rooms of an adapter that the audit reads a command with: they load neither torch nor the host.
LIGHT = ("host", "keys", "plan", "refusals", "command", "reading", "edit", "sources")
LIGHT_MAY = ("klplug", "klplug.hosting", "klplug.audit", "yaml")

FILES = sorted(
    path.relative_to(ROOT)
    for folder in ("klplug", "adapters")
    for path in (ROOT / folder).rglob("*.py")
)


def floor(path: Path) -> str:
    """The row of the table that a file is held to."""
    if str(path) in ALLOWED:
        return str(path)
    if path.parts[0] == "klplug" and len(path.parts) == 2:
        return "klplug"
    return "/".join(path.parts[:2])


def package(name: str) -> str:
    """What a table says for a dotted name: a floor of klplug's, or a top-level package."""
    first, *rest = name.split(".")
    inner = f"klplug.{rest[0]}" if first == "klplug" and rest else first
    return inner if inner.replace(".", "/") in ALLOWED else first


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """The packages that a file imports, and where."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports by a relative name"
            names = [node.module or ""]
        for name in names:
            if name.partition(".")[0] not in sys.stdlib_module_names:
                yield package(name), node.lineno


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_floor_imports_what_it_may(path: Path) -> None:
    row = floor(path)
    own = package(row.removeprefix("adapters/").replace("/", "."))
    allowed = {*ALLOWED[row], own} if not row.endswith(".py") else {*ALLOWED[row]}
    if row.startswith("adapters/klplug_") and path.stem in LIGHT:
        allowed = {*LIGHT_MAY, own}
    wrong = [
        f"{path}:{line} imports {name}" for name, line in imported(path) if name not in allowed
    ]
    assert not wrong


def test_every_right_in_the_table_is_used() -> None:
    used: dict[str, set[str]] = {row: set() for row in ALLOWED}
    for path in FILES:
        used[floor(path)] |= {name for name, _ in imported(path)}
    # The host itself is imported by name, where its hooks are put.
    unused = {row: set(ALLOWED[row]) - used[row] - {"openrlhf"} for row in ALLOWED}
    assert not {row: names for row, names in unused.items() if names}


def table() -> str:
    """The table as CONTRIBUTING.md has it."""
    lines = ["| floor | may import, beside its own and the standard library |", "| --- | --- |"]
    lines += [
        f"| `{row}` | {', '.join(f'`{name}`' for name in names) or 'nothing'} |"
        for row, names in ALLOWED.items()
    ]
    lines.append(
        f"| {', '.join(f'`{room}.py`' for room in LIGHT)} of an adapter | "
        f"{', '.join(f'`{name}`' for name in LIGHT_MAY)} |"
    )
    return "\n".join(lines)


def test_contributing_holds_the_table() -> None:
    # python -m tests.packaging.test_house prints it.
    assert table() in (ROOT / "CONTRIBUTING.md").read_text()


HOSTS = re.compile("verl|openrlhf", re.IGNORECASE)
# Words that only have a host's name in them.
INNOCENT = re.compile("overl(?:ap|ong|y)", re.IGNORECASE)


def _docstrings(source: str) -> set[int]:
    """The lines of docstrings."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for item in body if isinstance(body, list) else ():
            is_text = isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant)
            if is_text and isinstance(item.value.value, str):
                lines |= set(range(item.lineno, (item.end_lineno or item.lineno) + 1))
    return lines


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] == "klplug"], ids=str)
def test_nothing_below_klplug_names_a_host(path: Path) -> None:
    source = (ROOT / path).read_text()
    told = _docstrings(source)
    named = [
        f"{path}:{token.start[0]}: {token.string.strip()}"
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.start[0] not in told and HOSTS.search(INNOCENT.sub("", token.string))
    ]
    assert not named


def test_no_other_file_below_klplug_names_a_host() -> None:
    others = (
        p
        for p in (ROOT / "klplug").rglob("*")
        # That of other frameworks names the modules by which they are told apart.
        if p.is_file() and p.suffix not in (".py", ".pyc") and p.name != "frameworks.json"
    )
    assert not [path for path in others if HOSTS.search(path.name + path.read_text())]


if __name__ == "__main__":
    print(table())
