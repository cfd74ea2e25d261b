"""OpenRLHF's own parser, built by running the argument section of its script and no more."""

from __future__ import annotations

import argparse
import ast
import contextlib
from datetime import datetime
from pathlib import Path
from typing import Any


class _Parsed(Exception):
    """Stops the host's argument section once its parser is complete."""


def parser(package: Path) -> argparse.ArgumentParser:
    path = package / "cli" / "train_ppo_ray.py"
    tree = ast.parse(path.read_text())
    section = next(
        node.body
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
    )
    made: list[argparse.ArgumentParser] = []

    class Parser(argparse.ArgumentParser):
        def parse_args(self, *args: Any, **kwargs: Any) -> Any:
            if not made:
                made.append(self)
                raise _Parsed
            return super().parse_args(*args, **kwargs)

    module = argparse.Namespace(**{**vars(argparse), "ArgumentParser": Parser})
    code = compile(ast.Module(section, type_ignores=[]), str(path), "exec")
    with contextlib.suppress(_Parsed):
        exec(code, {"argparse": module, "datetime": datetime, "__name__": "__main__"})
    return made[0]


def defaults(package: Path) -> dict[str, Any]:
    """Flags and their defaults, as argparse has them; ``None`` for what only a run makes."""
    found: dict[str, Any] = {}
    for action in parser(package)._actions:
        for option in action.option_strings:
            if option.startswith("--") and option != "--help":
                unstable = option.endswith("run_name") or action.default == float("inf")
                found[option[2:]] = None if unstable else action.default
    return found
