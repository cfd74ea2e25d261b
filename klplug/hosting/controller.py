"""klplug's controller of the coefficient behind a host's own interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from klplug.controllers import KLController
from klplug.spec import KLSpec


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
