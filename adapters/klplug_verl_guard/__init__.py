"""On guard over the verl plugin: entry point ``klplug_guard`` of the group ``verl.plugins``.

A directory named ``klplug_verl`` or ``klplug`` in the working directory hides the installed package
under ``python -m``: verl then loads the wrong one, or fails and says nothing. So this lies outside
of both. Light: every verl process imports it.
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


# A kl_type or a motion of the reference with options, without quotes that reach Hydra.
_UNQUOTED = re.compile(
    r"[\w.+]*\b(?:kl_type|kl_loss_type|kl_penalty|ref_update)=[\w.*+:-]+(?:,\w+=[^'\"]*)+"
)


def unquoted(argv: Sequence[str]) -> str | None:
    """The word of a command line that asks for klplug, and that Hydra can't read."""
    return next((word for word in argv[1:] if _UNQUOTED.fullmatch(word)), None)


if (_word := unquoted(sys.argv)) is not None:
    _key, _, _value = _word.partition("=")
    refuse(
        f"Hydra can't read {_word}: a value with commas needs quotes of its own. In a shell write "
        f"\"{_key}='{_value}'\""
    )


# A file that each of klplug's packages has.
_MARKS = {"klplug": "spec.py", "klplug_verl": "install.py"}


def shadow(package: str) -> str | None:
    """Where the directory is that hides one of klplug's packages; ``None`` if nothing does."""
    found = importlib.util.find_spec(package)
    if found is None:
        return "nowhere"
    places = [os.path.abspath(place) for place in found.submodule_search_locations or ()]
    if any(os.path.isfile(os.path.join(place, _MARKS[package])) for place in places):
        return None
    return ", ".join(places) or str(found.origin)


if os.environ.get("KLPLUG_DISABLE") != "1":
    for _package in _MARKS:
        _place = shadow(_package)
        if _place is not None:
            refuse(
                f"the package {_package} is found at {_place}, which is not klplug's: a directory "
                "of that name hides it. Rename it, or run from elsewhere"
            )
