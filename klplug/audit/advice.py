"""The part of an edit that is alike on every host."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from klplug.audit.settings import Settings, scalar
from klplug.hosting.settings import Edit


def advised(
    kl_type: str,
    kl_coef: str,
    kl_target: Any,
    decided: Iterable[str],
    words: Callable[[str, str], tuple[str, ...]],
    settings: Settings,
) -> list[Edit]:
    """klplug's keys in the place of all that they decide.

    Args:
        kl_type: What to follow.
        kl_coef: Its coefficient, as it is written.
        kl_target: Of the host's own controller, where it moved the coefficient: it becomes
            klplug's.
        decided: The host's keys that a kl_type decides.
        words: How the host's command line sets a key to a text.
        settings: What the command has.
    """
    added: dict[str, tuple[str, Any]] = {
        "klplug.kl_type": (kl_type, kl_type),
        "klplug.kl_coef": (kl_coef, scalar(kl_coef)),
    }
    if kl_target:
        added["klplug.kl_ctrl"] = ("adaptive", "adaptive")
        added["klplug.kl_target"] = (str(kl_target), kl_target)
    deleted = [Edit(key) for key in decided if settings.wrote(key)]
    return deleted + [Edit(k, words(k, text), value) for k, (text, value) in added.items()]
