"""klplug's controller of the coefficient behind a host's own interface."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from klplug.controllers import KLController
from klplug.hosting.state import Reference, StateError
from klplug.spec import KLSpec

APART = 0.02
"""Nats per token, beyond which a KL is none of a model with itself: that of a bfloat16 copy to a
float32 one is 3e-4, and that of a sampler in bfloat16 to its trainer below 0.01."""


@dataclass
class MeasuredController:
    """A klplug controller behind a host's interface, fed the KL that was measured.

    Hosts hand their controller the value of whatever estimator was chosen, k2's included. The
    adapter knows better: ``klplug/kl`` under samples of the very policy they came from, and how
    many answers they are.

    ``fresh``: the policy has not been updated yet, as far as is known.
    """

    controller: KLController
    measured: float | None = None
    answers: int | None = None
    fresh: bool = True

    @property
    def value(self) -> float:
        return self.controller.value

    def measure(self, kl: float, from_reference: bool) -> None:
        """Take a step's KL, and say so where it is not 0 before the first update.

        Args:
            kl: ``klplug/kl`` before the update.
            from_reference: whether the policy starts as the model that the KL is to.
        """
        self.measured = kl
        if self.fresh and from_reference and abs(kl) > APART:
            _warn(
                f"before the first update the KL is {kl:.3g} nats per token. Policy and reference "
                "are one model then, so it should be near 0. Something differs: an adapter, the "
                "dtype, the temperature, the inputs or the weights"
            )
        self.fresh = False

    def update(self, current: float, n_steps: int) -> None:
        self.controller.update(
            current if self.measured is None else self.measured,
            n_steps if self.answers is None else self.answers,
        )

    def saved(self, spec: KLSpec, models: Mapping[str, Reference]) -> dict[str, Any]:
        """What a checkpoint keeps, of ``Asked.models`` too."""
        kept = {role: model.kept for role, model in models.items()}
        return {"kl_type": str(spec), **kept, **self.controller.state_dict()}

    def resume(
        self,
        saved: Any,
        spec: KLSpec,
        models: Mapping[str, Reference],
        kl_ctrl: str,
        host: str,
    ) -> None:
        """Go on from what a checkpoint kept, saying so if another KL, coefficient, reference,
        teacher or file of stored answers was trained with.

        Args:
            saved: ``None`` where a checkpoint has nothing of klplug's.

        Raises:
            ValueError: it is not what ``saved`` gave.
        """
        self.fresh = False
        if saved is not None and not _is_state(saved):
            raise StateError(f"the state of klplug's controller in a checkpoint is {saved!r}")
        if saved is None or saved["kl_type"] != str(spec):
            before = f"{host}'s own KL" if saved is None else f"kl_type={saved['kl_type']}"
            _warn(
                f"resuming with kl_type={spec} a run that was trained with {before}: the two "
                "follow different gradients"
            )
        if saved is None:
            return
        reference, other = models.get("reference"), saved.get("reference")
        if reference is not None and other and "step" in other:
            print(
                f"klplug: the reference goes on as the checkpoint has it, last moved after step "
                f"{other['step']}, and not from {reference.path}",
                flush=True,
            )
        else:
            _compare("reference", reference, other)
        _compare("teacher", models.get("teacher"), saved.get("teacher"))
        _compare_answers(models.get("source"), saved.get("source"))
        here, there = self.value, saved.get("value")
        if saved["kl_ctrl"] != kl_ctrl:
            _warn(
                f"resuming with kl_ctrl={kl_ctrl} a run that was trained with "
                f"kl_ctrl={saved['kl_ctrl']}: the coefficient, {there} there, starts from "
                f"kl_coef={here:g}"
            )
            return
        self.controller.load_state_dict(saved)
        if kl_ctrl == "fixed" and saved["kl_type"] == str(spec) and there != here:
            _warn(f"resuming with kl_coef={here:g} a run that was trained with kl_coef={there}")
        elif self.value != here:
            print(
                f"klplug: the coefficient goes on from {self.value:g}, as the checkpoint has it, "
                f"and not from kl_coef={here:g}",
                flush=True,
            )


def _is_state(saved: Any) -> bool:
    """Whether it has the shape of what ``saved`` gives; the controller reads its numbers."""
    if not (isinstance(saved, dict) and {"kl_type", "kl_ctrl"} <= {*saved}):
        return False
    models = (saved.get(name) for name in ("reference", "teacher", "source"))
    return all(m is None or (isinstance(m, dict) and "path" in m) for m in models)


def _compare(name: str, model: Reference | None, saved: dict[str, Any] | None) -> None:
    if model is not None and saved and model.is_another_than(saved):
        _warn(
            f"resuming with the {name} {_named(model.kept)} a run that was trained with "
            f"{_named(saved)}. The KL is to another model from here on"
        )


def _compare_answers(source: Reference | None, saved: dict[str, Any] | None) -> None:
    """One ``kl_type`` acts on stored answers, or on the policy's own."""
    if source is None and saved is None:
        return
    if source is None or saved is None or source.is_another_than(saved):
        here, there = (
            "the policy's own answers" if kept is None else f"the answers of {_named(kept)}"
            for kept in (None if source is None else source.kept, saved)
        )
        _warn(f"resuming with a KL on {here} a run that was trained with one on {there}")


def _warn(words: str) -> None:
    print(f"klplug: WARNING: {words}", flush=True)


def _named(reference: dict[str, Any]) -> str:
    weights = reference.get("weights")
    return f"{reference['path']}" + ("" if weights is None else f" (weights {weights[:8]})")
