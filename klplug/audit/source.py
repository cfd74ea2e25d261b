"""A host's code as syntax trees, to tell whether a copy of it applies its KL as a release does."""

from __future__ import annotations

import ast
import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path


def tree(path: Path) -> ast.Module | None:
    """The module in a file; ``None`` where there is no such file.

    Raises:
        SyntaxError: no Python.
    """
    if not path.is_file():
        return None
    return ast.parse(path.read_text(encoding="utf-8", errors="replace"))


def function(module: ast.AST, name: str) -> ast.AST | None:
    """The first function of that name."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return next(
        (n for n in ast.walk(module) if isinstance(n, functions) and n.name == name),
        None,
    )


def calls(module: ast.AST, name: str) -> list[ast.AST]:
    """Where a function is called: the outermost condition around each call, or its statement."""
    return list(_calls(module, name))


def _calls(node: ast.AST, name: str) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not _calling(child, name):
            continue
        mentions = isinstance(child, ast.If) and "kl" in ast.unparse(child.test)
        simple = isinstance(child, ast.stmt) and not hasattr(child, "body")
        if mentions or simple:
            yield child
        else:
            yield from _calls(child, name)


def _calling(node: ast.AST, name: str) -> bool:
    return any(isinstance(n, ast.Call) and _last(n.func) == name for n in ast.walk(node))


def _last(called: ast.expr) -> str:
    if isinstance(called, ast.Attribute):
        return called.attr
    return called.id if isinstance(called, ast.Name) else ""


def taken(function: ast.AST, name: str, value: str) -> ast.AST:
    """A function as it is where its argument ``name`` is ``value``, without the other branches."""
    whole = _Taken(name, value).visit(copy.deepcopy(function))
    assert isinstance(whole, (ast.FunctionDef, ast.AsyncFunctionDef))
    leaves = (ast.Return, ast.Raise)
    end = next((at for at, s in enumerate(whole.body) if isinstance(s, leaves)), len(whole.body))
    whole.body = whole.body[: end + 1]
    return whole


class _Taken(ast.NodeTransformer):
    """Keeps of each condition on one name what its value takes."""

    def __init__(self, name: str, value: str) -> None:
        self.name, self.value = name, value

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.AST]:
        holds = self._holds(node.test)
        if holds is None:
            return self.generic_visit(node)
        kept: list[ast.AST] = []
        for statement in node.body if holds else node.orelse:
            visited = self.visit(statement)
            kept += visited if isinstance(visited, list) else [visited]
        return kept

    def _holds(self, test: ast.expr) -> bool | None:
        if not (
            isinstance(test, ast.Compare)
            and isinstance(test.left, ast.Name)
            and test.left.id == self.name
            and len(test.ops) == 1
        ):
            return None
        try:
            other = ast.literal_eval(test.comparators[0])
        except ValueError:
            return None
        if isinstance(test.ops[0], ast.Eq):
            return bool(other == self.value)
        return self.value in other if isinstance(test.ops[0], ast.In) else None


def digest(node: ast.AST) -> str:
    """The same for code that differs in comments, annotations and what it logs."""
    text = ast.unparse(_Plain().visit(copy.deepcopy(node)))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class _Plain(ast.NodeTransformer):
    """Takes out what computes nothing."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns, node.decorator_list = None, []
        read = {n.id for s in node.body for n in ast.walk(s) if isinstance(n, ast.Name)}
        given = node.args.args
        plain = len(given) - len(node.args.defaults)
        kept = [(a, at) for at, a in enumerate(given) if a.arg in read]
        node.args.defaults = [node.args.defaults[at - plain] for _, at in kept if at >= plain]
        node.args.args = [a for a, _ in kept]
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_Assert(self, node: ast.Assert) -> None:
        return None

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        string = isinstance(node.value, ast.Constant)
        return None if string or _logs(ast.unparse(node)) else node

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        return None if _logs(ast.unparse(node)) else node


def _logs(text: str) -> bool:
    return text.partition("=")[0].partition("(")[0].endswith(
        ("metrics.update", "append_to_dict", "print")
    ) or ("metrics[" in text.partition("=")[0])
