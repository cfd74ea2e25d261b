"""How a command of verl's is made to follow a ``kl_type``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from klplug.audit.settings import Settings, scalar
from klplug.hosting.settings import Edit
from klplug_verl.host import WITHOUT_PLUGINS
from klplug_verl.keys import (
    CTRL_TARGET,
    CTRL_TYPE,
    DECIDED,
    KL_COEF,
    KL_CTRL,
    KL_TARGET,
    KL_TYPE,
    LOSS_COEF,
    LOSS_TYPE,
    USE_LOSS,
    USE_REWARD,
)


def edit(kl_type: str, kl_coef: str, settings: Settings) -> list[Edit]:
    """klplug's keys in the place of all that they decide.

    verl's own controller, where it moved a KL in the reward, becomes klplug's.
    """
    added = {KL_TYPE: (kl_type, kl_type), KL_COEF: (kl_coef, scalar(kl_coef))}
    target = settings[CTRL_TARGET].value
    if settings.on(USE_REWARD) and settings[CTRL_TYPE].value == "adaptive" and target:
        added |= {KL_CTRL: ("adaptive", "adaptive"), KL_TARGET: (str(target), target)}
    deleted = [Edit(key) for key in DECIDED if settings.wrote(key)]
    return [
        *deleted,
        *(Edit(k, (_override(k, text),), value) for k, (text, value) in added.items()),
    ]


def _override(key: str, text: str) -> str:
    """A word of Hydra's, which takes a bare comma or equals sign for its own."""
    return f"+{key}='{text}'" if set(text) & set(",=") else f"+{key}={text}"


def written(words: Iterable[str]) -> str:
    """Words as they are typed into a shell."""
    return " ".join(f'"{word}"' if "'" in word else word for word in words)


def how(settings: Settings) -> str:
    if settings.table.version.startswith(WITHOUT_PLUGINS):
        return "with klplug, and VERL_USE_EXTERNAL_MODULES=klplug_verl in the environment"
    return "with klplug"


def without_klplug(kl_type: str, kl_coef: str, settings: Any) -> Iterator[tuple[str, str]]:
    """What verl itself has that comes near."""
    if kl_type == "k2_as_loss" and not settings.table.version.startswith("0.7."):
        words = (f"{USE_LOSS}=True", f"{LOSS_TYPE}=k3+", f"{LOSS_COEF}={kl_coef}")
        yield "without klplug, and without a weight for reused samples", " ".join(words)
