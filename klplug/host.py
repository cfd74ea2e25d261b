"""What the adapters share beside patching: the same words, the same state, on every host."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import klplug
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


def announce(process: str, spec: KLSpec, kl_coef: float) -> None:
    """The one line by which a process says that klplug is active in it."""
    print(
        f"klplug {klplug.__version__} active in {process} (pid {os.getpid()}): "
        f"kl_type={spec} kl_coef={kl_coef:g}",
        flush=True,
    )


@dataclass
class MeasuredController:
    """A klplug controller behind a host's interface, fed the KL that was measured.

    Hosts hand their controller the value of whatever estimator was chosen, k2's included. The
    adapter knows better: k3 under samples of the very policy they came from.
    """

    controller: KLController
    measured: float | None = None

    @property
    def value(self) -> float:
        return self.controller.value

    def update(self, current: float, n_steps: int) -> None:
        self.controller.update(current if self.measured is None else self.measured, n_steps)

    def saved(self, spec: KLSpec) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"kl_type": str(spec), **self.controller.state_dict()}

    def resume(self, saved: dict[str, Any] | None, spec: KLSpec, kl_ctrl: str, host: str) -> None:
        """Go on from what a checkpoint kept, saying so if it was another formulation's."""
        if saved is None or saved["kl_type"] != str(spec):
            before = f"{host}'s own KL" if saved is None else f"kl_type={saved['kl_type']}"
            print(
                f"klplug: WARNING: resuming with kl_type={spec} a run that was trained with "
                f"{before}: the two follow different gradients",
                flush=True,
            )
        if saved is not None and saved["kl_ctrl"] == kl_ctrl:
            self.controller.load_state_dict(saved)
