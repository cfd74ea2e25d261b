"""Ready-to-run recipes; never part of the installed package."""

import sys
from types import TracebackType

# What the extra `recipes` brings, and what it stands on.
EXTRA = {
    "datasets",
    "math_verify",
    "matplotlib",
    "psutil",
    "rich",
    "scipy",
    "typer",
    "yaml",
    "wrapt",
}


def in_a_line(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """An excepthook: a missing package of the extra `recipes` needs no traceback."""
    missing = (getattr(error, "name", None) or "").partition(".")[0]
    if kind is not ModuleNotFoundError or missing not in EXTRA:
        sys.__excepthook__(kind, error, traceback)
        return
    how = "pip install '.[recipes]' in this checkout (make quickstart does so by itself)"
    print(f"recipes: error: there is no module {missing}: {how}", file=sys.stderr)


if sys.argv[:1] == ["-m"]:  # python -m recipes.ANYTHING, which is not imported yet
    sys.excepthook = in_a_line
