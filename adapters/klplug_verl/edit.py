"""How a command of verl's is made to follow a ``kl_type``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from klplug.audit.advice import advised
from klplug.audit.settings import Settings
from klplug.audit.tables import before
from klplug.hosting.settings import Edit
from klplug_verl.host import WITHOUT_PLUGINS
from klplug_verl.keys import (
    CTRL_TARGET,
    CTRL_TYPE,
    DECIDED,
    LOSS_COEF,
    LOSS_TYPE,
    USE_LOSS,
    USE_REWARD,
)
from klplug_verl.sources import SUBTRACTED


def edit(kl_type: str, kl_coef: str, settings: Settings) -> list[Edit]:
    """klplug's keys in the place of all that they decide.

    verl's own controller, where it moved a KL in the reward, becomes klplug's.
    """
    moves = settings.on(USE_REWARD) and settings[CTRL_TYPE].value == "adaptive"
    target = settings[CTRL_TARGET].value if moves else None
    return advised(kl_type, kl_coef, target, DECIDED, _override, settings)


def _override(key: str, text: str) -> tuple[str, ...]:
    """A word of Hydra's, which takes a bare comma or equals sign for its own."""
    return (f"+{key}='{text}'" if set(text) & set(",=") else f"+{key}={text}",)


def written(words: Iterable[str]) -> str:
    """Words as they are typed into a shell."""
    return " ".join(f'"{word}"' if "'" in word else word for word in words)


def how(settings: Settings) -> str:
    if settings.table.version.startswith(WITHOUT_PLUGINS):
        return "with klplug, and VERL_USE_EXTERNAL_MODULES=klplug_verl in the environment"
    return "with klplug"


def without_klplug(kl_type: str, kl_coef: str, settings: Any) -> Iterator[tuple[str, str]]:
    """What verl itself has that comes near."""
    if kl_type != "k2_as_loss":
        return
    source = settings.table.source
    name = "k3+"
    if before(settings.table.like, (0, 8)):  # k2 is a name since 0.4
        name = "mse" if before(settings.table.like, (0, 4)) else "k2"
    words = (f"{USE_LOSS}=True", f"{LOSS_TYPE}={name}", f"{LOSS_COEF}={kl_coef}")
    how = "without klplug, and without a weight for reused samples"
    if source is not None and SUBTRACTED in source.facts:
        how = "once its update_policy adds the KL loss, in the place of subtracting it"
    yield how, " ".join(words)
