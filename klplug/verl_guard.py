"""On guard over the verl plugin: entry point ``klplug_guard`` of the group ``verl.plugins``.

A directory named ``klplug_verl`` in the working directory hides the installed package under
``python -m``: verl then loads the wrong one, or fails and says nothing. So this lives in the other
package; one of the two is always there to notice. Light: every verl process imports it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Sequence

# +klplug.kl_type=..., or a full kl_type in one of verl's own keys.
_ASKED = re.compile(r"[+~]*klplug[.=]|.*\b(kl_loss_type|kl_penalty)=.*_(as_loss|in_reward)\b")


def asked(argv: Sequence[str]) -> bool:
    """Whether a command line asks for klplug."""
    return any(_ASKED.match(word) for word in argv[1:])


def refuse(problem: str) -> None:
    """Say what is wrong, and end the process if its command line asks for klplug."""
    level = "error" if asked(sys.argv) else "WARNING"
    print(f"klplug: {level}: {problem}", file=sys.stderr, flush=True)
    if asked(sys.argv):
        raise SystemExit(2)


def shadow() -> str | None:
    """Where the package that hides the adapter is; ``None`` if nothing does."""
    package = importlib.util.find_spec("klplug_verl")
    if package is None:
        return "nowhere"
    places = [os.path.abspath(place) for place in package.submodule_search_locations or ()]
    if any(os.path.isfile(os.path.join(place, "plugin.py")) for place in places):
        return None
    return ", ".join(places) or str(package.origin)


if os.environ.get("KLPLUG_DISABLE") != "1":
    _shadow = shadow()
    if _shadow is not None:
        refuse(
            f"the package klplug_verl is found at {_shadow}, which is not klplug's: a directory of "
            "that name hides it. Rename it, or run from elsewhere"
        )
