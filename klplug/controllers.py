"""How kl_coef moves over a run: fixed, or adaptive towards a target KL.

A controller is fed an unbiased estimate of KL(pi||ref), in nats per token, measured by the host's
adapter before the update: never the value of a biased estimator such as k2.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

KL_CONTROLLERS = ("fixed", "adaptive")


class KLController(Protocol):
    """``value`` is the coefficient now; ``update`` moves it once a step."""

    value: float

    def update(self, kl: float, n_samples: int) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class FixedKL:
    """The coefficient stays what it was set to."""

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, kl: float, n_samples: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"kl_ctrl": "fixed", "value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A fixed coefficient is what this run's configuration says, whatever was saved."""


class AdaptiveKL:
    """``value *= 1 + clip(kl / target - 1, -0.2, 0.2) * n_samples / horizon``.

    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2.

    Args:
        kl_coef: the coefficient to start from.
        target: KL(pi||ref) to hold, nats per token.
        horizon: samples over which the coefficient can change by about a factor e^0.2.
    """

    def __init__(self, kl_coef: float, target: float, horizon: float) -> None:
        self.value = kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n_samples: int) -> None:
        if not math.isfinite(kl):  # a diverged batch says nothing about how far to move
            return
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n_samples / self.horizon

    def state_dict(self) -> dict[str, Any]:
        return {"kl_ctrl": "adaptive", "value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = float(state["value"])


def kl_controller(
    kl_ctrl: str, kl_coef: float, kl_target: float | None = None, kl_horizon: float | None = None
) -> KLController:
    """The controller that the settings name; 10 000 samples is the default horizon.

    Raises:
        ValueError: an unknown ``kl_ctrl``, an adaptive one without a positive target, a horizon
            that is not positive, or a target with ``fixed``.
    """
    if kl_ctrl not in KL_CONTROLLERS:
        raise ValueError(f"kl_ctrl={kl_ctrl!r} is unknown; allowed: {', '.join(KL_CONTROLLERS)}")
    for name, number in (("kl_target", kl_target), ("kl_horizon", kl_horizon)):
        if number is not None and not (math.isfinite(number) and number > 0):
            raise ValueError(f"{name}={number!r} must be finite and positive")
        if number is not None and kl_ctrl == "fixed":
            raise ValueError(f"{name}={number!r} has no meaning with kl_ctrl=fixed: use adaptive")
    if kl_ctrl == "fixed":
        return FixedKL(kl_coef)
    if kl_target is None:
        raise ValueError("kl_ctrl=adaptive needs a kl_target, in nats per token")
    return AdaptiveKL(kl_coef, kl_target, 10_000 if kl_horizon is None else kl_horizon)
