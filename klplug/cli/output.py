"""How commands speak: text on a terminal, or one JSON document."""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]

WIDTH = 120  # where no terminal says how wide it is


def console() -> Console:
    """Standard output, with a known width in pipes and files, printing text as it is."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    # No markup: E[k2] is mathematics.
    return Console(width=WIDTH if piped else None, highlight=False, markup=False, emoji=False)


def print_json(document: Any) -> None:
    """``document`` as JSON that any reader takes: numbers that are not finite become null."""
    as_it_is = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(_finite(document), indent=2, ensure_ascii=not as_it_is, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
