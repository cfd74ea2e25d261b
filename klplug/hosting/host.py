"""What every process of every host does."""

from __future__ import annotations

import os

import klplug
from klplug.spec import KLSpec


def announce(process: str, spec: KLSpec, kl_coef: float) -> None:
    """The one line by which a process says that klplug is active in it."""
    print(
        f"klplug {klplug.__version__} active in {process} (pid {os.getpid()}): "
        f"kl_type={spec} kl_coef={kl_coef:g}",
        flush=True,
    )
