"""A host's own KL function out of its source file, without the host and all that it imports."""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Host -> its wheel's file, and the function of it with those that it calls.
KL = {
    "verl": ("verl/trainer/ppo/core_algos.py", ("kl_penalty", "kl_penalty_forward")),
    "openrlhf": ("openrlhf/models/utils.py", ("compute_approx_kl",)),
}


def source(place: Path, host: str) -> str:
    """The text of the file: out of a wheel of the host in ``place``, or of a folder unpacked there.

    Raises:
        FileNotFoundError: neither is there.
    """
    file, _ = KL[host]
    if (place / file).is_file():
        return (place / file).read_text(encoding="utf-8")
    for wheel in sorted(place.glob(f"{host}-*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            # A wheel for one platform keeps its Python files below NAME.data/purelib.
            (inside,) = (n for n in archive.namelist() if n == file or n.endswith(f"/{file}"))
            return archive.read(inside).decode()
    raise FileNotFoundError(f"{place} has neither {file} nor a wheel {host}-*.whl")


def kl_function(place: Path, host: str) -> Callable[..., Any]:
    """``kl_penalty`` of verl or ``compute_approx_kl`` of OpenRLHF, as the file has it.

    Decorators are left off: they register a function and change nothing of it.
    """
    _, names = KL[host]
    kept: list[ast.stmt] = []
    for node in ast.parse(source(place, host)).body:
        constant = isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        if constant or (isinstance(node, ast.FunctionDef) and node.name in names):
            if isinstance(node, ast.FunctionDef):
                node.decorator_list = []
            kept.append(node)
    # Inherited from this file: annotations stay words, as they name what theirs imports.
    code = compile(ast.Module(kept, []), f"{host}'s", "exec")
    scope: dict[str, Any] = {"torch": torch}
    exec(code, scope)
    function: Callable[..., Any] = scope[names[0]]
    return function
