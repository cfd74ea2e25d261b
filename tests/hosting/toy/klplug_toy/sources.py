"""What the installed toy trainer is."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def table(package: Path) -> dict[str, Any]:
    from toyrl.train import parser

    flags = [action for action in parser()._actions if action.option_strings != ["-h", "--help"]]
    defaults = {action.option_strings[0][2:]: action.default for action in flags}
    return {"defaults": defaults, "choices": {}, "switches": {}}
