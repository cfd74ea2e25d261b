"""A host's sources against an adapter's hooks, read without importing them.

For releases whose dependencies are not here: the same rows, found in the syntax tree.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

from klplug.hosting.patching import Hook


def missing(folder: Path, hooks: Iterable[Hook]) -> list[str]:
    """What of ``hooks`` the package in ``folder`` does not have, each with what is there."""
    return [fault for hook in hooks if (fault := _fault(folder, hook)) is not None]


def _fault(folder: Path, hook: Hook) -> str | None:
    found = _parameters(folder, hook.module, hook.name)
    if found is not None and set(hook.parameters) <= set(found):
        return None
    if hook.otherwise is not None:
        return _fault(folder, hook.otherwise)
    if found is None:
        return f"{hook.path} is not there"
    lacking = [name for name in hook.parameters if name not in found]
    return f"{hook.path} has no {', '.join(lacking)}: ({', '.join(found)})"


def _parameters(folder: Path, module: str, name: str) -> list[str] | None:
    """Of a function that ``module`` defines or imports by name; ``None`` where it has none."""
    path = folder.joinpath(*module.split("."))
    file, package = path.with_suffix(".py"), module.rpartition(".")[0]
    if not file.exists():
        file, package = path / "__init__.py", module
    if not file.exists():
        return None
    owner, _, function = name.rpartition(".")
    body = ast.parse(file.read_text(encoding="utf-8")).body
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name == owner:
            return _of(node.body, function)
        if isinstance(node, ast.ImportFrom) and not owner:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _parameters(folder, _absolute(node, package), alias.name)
    return None if owner else _of(body, function)


def _of(body: list[ast.stmt], name: str) -> list[str] | None:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
            given = node.args
            return [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return None


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    return ".".join(
        [*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])]
    )
