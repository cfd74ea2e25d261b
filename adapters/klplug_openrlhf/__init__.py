"""klplug for OpenRLHF: ``python -m klplug_openrlhf --klplug.kl_type k2_as_loss ...``.

The launcher needs nothing else. ``apply``, ``restore`` and ``status`` are for code that drives
OpenRLHF's trainers itself. Importing this package is cheap: Ray's workers import it at start.
"""

from __future__ import annotations

__all__ = ["apply", "check", "restore", "status"]


def check() -> None:
    """Raise ``HookError`` if a hooked OpenRLHF function has moved or changed."""
    from klplug_openrlhf.hooks import PATCH

    PATCH.check()


def apply() -> None:
    """Replace OpenRLHF's KL in this process, all hooks or none; modules not loaded yet follow."""
    from klplug_openrlhf.hooks import PATCH

    PATCH.check()
    PATCH.apply()


def restore() -> None:
    """Put OpenRLHF's own functions back."""
    from klplug_openrlhf.hooks import PATCH

    PATCH.restore()


def status() -> dict[str, bool]:
    """For every hooked path, whether klplug's function is the one that runs there."""
    from klplug_openrlhf.hooks import PATCH

    return PATCH.status()
