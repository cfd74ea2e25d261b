"""The command ``klplug``: needs the extra ``cli``, which the core does not.

Every command is also a function to import, and prints one JSON document under ``--json``.
"""

from __future__ import annotations

import io
import sys

from klplug.cli.status import Status, Unreadable

__all__ = ["Status", "Unreadable", "main"]


# The extra that each package comes with which a command may lack.
EXTRAS = {
    "typer": "cli",
    "rich": "cli",
    "yaml": "cli",
    "jinja2": "report",
    "matplotlib": "report",
    "scipy": "report",
    "tensorboard": "report",
    "google": "report",
    "torch": "torch",
}


def main() -> None:
    """Run ``klplug`` with the process's arguments, and exit with a ``Status``."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: a name may be bytes
    try:
        from klplug.cli.app import app

        app(prog_name="klplug")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        _end(f"there is no module {package}: pip install 'klplug[{EXTRAS[package]}]'")
    except (Unreadable, OSError) as error:  # no room for what is printed, say
        _end(str(error))


def _end(message: str) -> None:
    print(f"klplug: error: {message}", file=sys.stderr)
    raise SystemExit(Status.UNREADABLE)
