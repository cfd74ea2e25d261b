"""The command ``klplug``: needs the extra ``cli``, which the core does not.

Every command is also a function to import, and prints one JSON document under ``--json``.
"""

from __future__ import annotations

import sys

from klplug.cli.status import Status, Unreadable

__all__ = ["Status", "Unreadable", "main"]


def main() -> None:
    """Run ``klplug`` with the process's arguments, and exit with a ``Status``."""
    try:
        from klplug.cli.app import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich", "yaml"):
            raise
        _end(f"the command line needs {package}: pip install 'klplug[cli]'")
    try:
        app(prog_name="klplug")
    except Unreadable as error:
        _end(str(error))


def _end(message: str) -> None:
    print(f"klplug: error: {message}", file=sys.stderr)
    raise SystemExit(Status.UNREADABLE)
