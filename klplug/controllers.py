"""How kl_coef moves over a run: fixed, or adaptive towards a target KL.

A controller is fed an estimate of KL(pi||ref), ``klplug/kl``, in nats per token, measured by the
host's adapter before the update: never the value of a biased estimator such as k2. It is fed the
number of answers, rows without tokens left out.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

KL_CONTROLLERS = ("fixed", "adaptive")
LOWEST, HIGHEST = 1e-4, 1e4
"""Of its start, how far an adaptive coefficient goes: no drift of the KL calls for more."""


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
    """``value *= exp(clip(kl / target - 1, -0.2, 0.2) * n_samples / horizon)``.

    Ziegler's rule, ``1 + x`` in place of ``exp(x)``, to first order; his turns negative from 5
    horizons a step on. Always positive, and held within [1e-4, 1e4] of its start, where it says so
    once at either end.

    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2.

    Args:
        kl_coef: the coefficient to start from.
        target: KL(pi||ref) to hold, nats per token.
        horizon: answers over which the coefficient can change by a factor e^0.2. Where a step has
            more, it changes by more in one step.
    """

    def __init__(self, kl_coef: float, target: float, horizon: float) -> None:
        self.value = self._start = kl_coef
        self.target = target
        self.horizon = horizon
        self._said: set[str] = set()

    def update(self, kl: float, n_samples: int) -> None:
        """Move the coefficient by one step's KL, nats per token, of so many answers."""
        if not math.isfinite(kl):  # a diverged batch says nothing about how far to move
            return
        pace = n_samples / self.horizon
        if pace > 1:
            self._say(
                "kl_horizon",
                f"{self.horizon:g} is less than the {n_samples} answers of a step, and is counted "
                f"in answers: kl_coef can change by e^{0.2 * pace:.3g} in one step",
            )
        # By logarithms, in which no exponent is too large.
        log_value = math.log(self.value) + min(max(kl / self.target - 1, -0.2), 0.2) * pace
        lowest, highest = self._start * LOWEST, self._start * HIGHEST
        for end, met in (
            (lowest, log_value <= math.log(lowest)),
            (highest, log_value >= math.log(highest)),
        ):
            if met:
                self._say(
                    f"kl_coef={end:.3g}",
                    f"is as far as the adaptive controller goes from its start {self._start:g}; "
                    f"the KL is {kl:.3g}, kl_target {self.target:g}",
                )
        log_value = min(max(log_value, math.log(lowest)), math.log(highest))
        self.value = math.exp(log_value)

    def _say(self, what: str, about: str) -> None:
        if what not in self._said:
            self._said.add(what)
            print(f"klplug: WARNING: {what} {about}", flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"kl_ctrl": "adaptive", "value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved coefficient.

        Raises:
            ValueError: it is not a positive, finite number.
        """
        value = state.get("value")
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(
                f"the saved state of the KL controller has value={value!r}, which must be a "
                "positive number"
            )
        self.value = float(value)


def kl_controller(
    kl_ctrl: str, kl_coef: float, kl_target: float | None = None, kl_horizon: float | None = None
) -> KLController:
    """The controller that the settings name; 10 000 samples is the default horizon.

    Raises:
        ValueError: an unknown ``kl_ctrl``, an adaptive one without a positive target, a horizon
            or a starting coefficient that is not positive, or a target with ``fixed``.
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
    if not 0 < kl_coef < math.inf:
        raise ValueError(
            f"kl_ctrl=adaptive needs a positive kl_coef to start from, got {kl_coef!r}"
        )
    if kl_target is None:
        raise ValueError("kl_ctrl=adaptive needs a kl_target, in nats per token")
    return AdaptiveKL(kl_coef, kl_target, 10_000 if kl_horizon is None else kl_horizon)
