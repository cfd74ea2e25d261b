"""What a user set, checked: the same words on every host."""

from __future__ import annotations

from dataclasses import dataclass

from klplug.controllers import KLController, kl_controller
from klplug.spec import KLSpec


class SettingsError(ValueError):
    """The command line asks for something that can't be, said before anything starts."""


@dataclass(frozen=True)
class Settings:
    """What a user set, checked; each adapter's plan adds what its hooks need to know."""

    spec: KLSpec
    kl_coef: float
    kl_ctrl: str = "fixed"
    kl_target: float | None = None
    kl_horizon: float | None = None
    divides_by_length: bool = False

    def controller(self) -> KLController:
        return kl_controller(self.kl_ctrl, self.kl_coef, self.kl_target, self.kl_horizon)


def is_local(name: str) -> bool:
    """Whether a model or data set is meant as a path: a hub's names have one slash at most."""
    if "://" in name:
        return False
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
