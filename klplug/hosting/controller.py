"""klplug's controller of the coefficient behind a host's own interface."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from klplug.controllers import KLController
from klplug.hosting.state import Reference, StateError
from klplug.spec import KLSpec


@dataclass
class MeasuredController:
    """A klplug controller behind a host's interface, fed the KL that was measured.

    Hosts hand their controller the value of whatever estimator was chosen, k2's included. The
    adapter knows better: ``klplug/kl`` under samples of the very policy they came from.
    """

    controller: KLController
    measured: float | None = None

    @property
    def value(self) -> float:
        return self.controller.value

    def update(self, current: float, n_steps: int) -> None:
        self.controller.update(current if self.measured is None else self.measured, n_steps)

    def saved(self, spec: KLSpec, reference: Reference | None) -> dict[str, Any]:
        """What a checkpoint keeps; no reference of a KL that has none."""
        kept = {} if reference is None else {"reference": asdict(reference)}
        return {"kl_type": str(spec), **kept, **self.controller.state_dict()}

    def resume(
        self, saved: Any, spec: KLSpec, reference: Reference | None, kl_ctrl: str, host: str
    ) -> None:
        """Go on from what a checkpoint kept, saying so if another KL or reference was trained with.

        Args:
            saved: ``None`` where a checkpoint has nothing of klplug's.

        Raises:
            StateError: it is not what ``saved`` gave.
        """
        if saved is not None and not (
            isinstance(saved, dict) and {"kl_type", "kl_ctrl"} <= {*saved}
        ):
            raise StateError(f"the state of klplug's controller in a checkpoint is {saved!r}")
        if saved is None or saved["kl_type"] != str(spec):
            before = f"{host}'s own KL" if saved is None else f"kl_type={saved['kl_type']}"
            print(
                f"klplug: WARNING: resuming with kl_type={spec} a run that was trained with "
                f"{before}: the two follow different gradients",
                flush=True,
            )
        other = (saved or {}).get("reference")
        if reference is not None and other and reference.is_another_than(other):
            print(
                f"klplug: WARNING: resuming with the reference {_named(asdict(reference))} a run "
                f"that was trained with {_named(other)}: the KL is to another model from here on",
                flush=True,
            )
        if saved is not None and saved["kl_ctrl"] == kl_ctrl:
            self.controller.load_state_dict(saved)


def _named(reference: dict[str, Any]) -> str:
    weights = reference.get("weights")
    return f"{reference['path']}" + ("" if weights is None else f" (weights {weights[:8]})")
