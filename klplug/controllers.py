"""How kl_coef moves over a run: fixed, by a schedule, or towards a target KL.

=========  ==========================================  =======================  ============
kl_ctrl    what moves it                               needs                    may have
=========  ==========================================  =======================  ============
fixed      nothing
linear     the step, on a line to ``kl_end``           ``kl_end``, ``kl_steps``
cosine     the step, on half a cosine to ``kl_end``    ``kl_end``, ``kl_steps``
adaptive   the KL: Ziegler's rule, as an exponent      ``kl_target``            ``kl_horizon``
pid        the KL: a PID outside a band                ``kl_target``            ``kl_band``
=========  ==========================================  =======================  ============

A controller is fed an estimate of KL(pi||ref), ``klplug/kl``, in nats per token, measured by the
host's adapter before the update: never the value of a biased estimator such as k2. It is fed the
number of answers, rows without tokens left out. ``docs/controllers.md`` has them side by side on a
simulated run.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Protocol

from klplug.numerics import number_of

LOWEST, HIGHEST = 1e-4, 1e4
"""Of its start, how far a driven coefficient goes: no drift of the KL calls for more."""


class KLController(Protocol):
    """``value`` is the coefficient now; ``update`` moves it once a step."""

    @property
    def value(self) -> float: ...

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


class ScheduledKL:
    """From ``kl_coef`` to ``end`` in ``steps`` steps, and ``end`` from then on.

    With x the share of the steps that are done, ``linear`` is ``start (1 - x) + end x``, and
    ``cosine`` the same with ``(1 - cos(pi x)) / 2`` for x. The KL moves neither.

    Args:
        kl_ctrl: linear or cosine.
        kl_coef: the coefficient of the first update.
        end: the last coefficient; 0 lets the policy go.
        steps: from the first to the last, as the host counts them: one for each rollout.
    """

    def __init__(self, kl_ctrl: str, kl_coef: float, end: float, steps: float) -> None:
        self.kl_ctrl, self.start, self.end, self.steps = kl_ctrl, kl_coef, end, steps
        self.done = 0

    @property
    def value(self) -> float:
        share = 1.0 if self.done >= self.steps else self.done / self.steps
        if self.kl_ctrl == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        # Not start + (end - start) share, which need not arrive at the end.
        return self.start * (1 - share) + self.end * share

    def update(self, kl: float, n_samples: int) -> None:
        self.done += 1

    def state_dict(self) -> dict[str, Any]:
        return {"kl_ctrl": self.kl_ctrl, "value": self.value, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved step, on the line that this run's configuration draws.

        Raises:
            ValueError: it is no count.
        """
        done = _saved(state, "done")
        if isinstance(done, bool) or not isinstance(done, Integral) or int(done) < 0:
            raise ValueError(
                f"the saved state of the KL controller has done={done!r}, which must be a count of "
                "steps"
            )
        self.done = int(done)


def _fed(name: str, value: Any) -> float:
    """``value`` as a float; a tensor or an array may have it."""
    try:
        number = number_of(value.item() if hasattr(value, "item") else value)
    except (RuntimeError, ValueError):  # it has several
        number = None
    if number is None:
        raise TypeError(f"a KL controller was fed {name}={value!r}, which must be a number")
    return number


def _saved(state: Any, name: str) -> Any:
    if not isinstance(state, Mapping):
        raise ValueError(
            f"the saved state of the KL controller is {state!r}, and must be what state_dict gave"
        )
    return state.get(name)


def _positive(**given: float) -> None:
    for name, number in given.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{name}={number:g} must be finite and positive")


class _Driven:
    """A coefficient that a KL moves: positive, and held within [1e-4, 1e4] of its start, where it
    says so once at either end."""

    kl_ctrl: str

    def __init__(self, kl_coef: float, target: float) -> None:
        _positive(kl_coef=kl_coef, target=target)
        self.value = self._start = kl_coef
        self.target = target
        self._said: set[str] = set()

    @property
    def _ends(self) -> tuple[float, float]:
        least = min(self._start, sys.float_info.min)
        return max(self._start * LOWEST, least), min(self._start * HIGHEST, sys.float_info.max)

    def _move(self, by: float, kl: float) -> None:
        """Multiply the coefficient by ``e^by``: in logarithms, where no exponent is too large."""
        if not abs(by) > 0:  # not even by rounding, nor by what is no number
            return
        log_value = math.log(self.value) + by
        lowest, highest = self._ends
        for end, met in (
            (lowest, log_value <= math.log(lowest)),
            (highest, log_value >= math.log(highest)),
        ):
            if met:
                self._say(
                    f"kl_coef={end:.3g}",
                    f"is as far as the {self.kl_ctrl} controller goes from its start "
                    f"{self._start:g}; the KL is {kl:.3g}, kl_target {self.target:g}",
                )
                self.value = end
                return
        self.value = math.exp(log_value)

    def _say(self, what: str, about: str) -> None:
        if what not in self._said:
            self._said.add(what)
            print(f"klplug: WARNING: {what} {about}", flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"kl_ctrl": self.kl_ctrl, "value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved coefficient; from the nearer end, said, if it is beyond this start's.

        Raises:
            ValueError: it is not a positive, finite number.
        """
        value = _saved(state, "value")
        number = number_of(value)
        if number is None or not 0 < number <= sys.float_info.max:
            raise ValueError(
                f"the saved state of the KL controller has value={value!r}, which must be a "
                "positive number"
            )
        lowest, highest = self._ends
        self.value = min(max(number, lowest), highest)
        if self.value != number:
            self._say(
                f"kl_coef={self.value:.3g}",
                f"is as far as the {self.kl_ctrl} controller goes from its start "
                f"{self._start:g}; the saved state has {number:g}",
            )


class AdaptiveKL(_Driven):
    """``value *= exp(clip(kl / target - 1, -0.2, 0.2) * n_samples / horizon)``.

    Ziegler's rule, ``1 + x`` in place of ``exp(x)``, to first order; his turns negative from 5
    horizons a step on.

    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2.

    Args:
        kl_coef: the coefficient to start from.
        target: KL(pi||ref) to hold, nats per token.
        horizon: answers over which the coefficient can change by a factor e^0.2. Where a step has
            more, it changes by more in one step.

    Raises:
        ValueError: one of them is not finite and positive.
    """

    kl_ctrl = "adaptive"

    def __init__(self, kl_coef: float, target: float, horizon: float) -> None:
        super().__init__(kl_coef, target)
        _positive(horizon=horizon)
        self.horizon = horizon

    def update(self, kl: float, n_samples: int) -> None:
        """Move the coefficient by one step's KL, nats per token, of so many answers.

        Raises:
            TypeError: either is no number.
        """
        kl, answers = _fed("kl", kl), _fed("n_samples", n_samples)
        if not math.isfinite(kl):  # a diverged batch says nothing about how far to move
            return
        pace = max(0.0, answers) / self.horizon
        if pace > 1:
            self._say(
                "kl_horizon",
                f"{self.horizon:g} is less than the {answers:.15g} answers of a step. It is "
                f"counted in answers, so kl_coef can change by e^{0.2 * pace:.3g} in one step",
            )
        self._move(min(max(kl / self.target - 1, -0.2), 0.2) * pace, kl)


class PIDKL(_Driven):
    """A PID on how far the KL is outside of a band around its target, on the log of kl_coef.

    With e the distance of ``kl / target`` to the band [1 - band, 1 + band], 0 inside and at most 1,
    each step multiplies the coefficient by ``exp(PROPORTIONAL (e - e') + INTEGRAL e)``, e' being
    the step before's. Written as steps, it has no sum that winds up while the coefficient is at a
    bound. In the band nothing pulls, so noise within it moves nothing. Steps count, not answers.

    The derivative's gain is 0: any other was slower on the simulated runs of
    ``docs/controllers.md``, on which the two gains are chosen.

    Source: a band and a PID are SAFE's; it moves a threshold of the KL by them, this the
    coefficient.

    Args:
        kl_coef: the coefficient to start from.
        target: KL(pi||ref) to hold, nats per token.
        band: half the width of the band, as a share of the target.
    """

    kl_ctrl = "pid"
    PROPORTIONAL, INTEGRAL = 0.3, 0.03

    def __init__(self, kl_coef: float, target: float, band: float) -> None:
        super().__init__(kl_coef, target)
        self.band = band
        self._before: float | None = None

    def update(self, kl: float, n_samples: int) -> None:
        """Move the coefficient by one step's KL, nats per token; without answers there is none.

        Raises:
            TypeError: either is no number.
        """
        kl, answers = _fed("kl", kl), _fed("n_samples", n_samples)
        if not (math.isfinite(kl) and answers > 0):
            return
        off = kl / self.target - 1
        error = math.copysign(min(max(abs(off) - self.band, 0.0), 1.0), off)
        # The KL of a run starts at 0, which is no fall.
        rise = 0.0 if self._before is None else error - self._before
        self._before = error
        self._move(self.PROPORTIONAL * rise + self.INTEGRAL * error, kl)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "error": self._before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved coefficient and the last step's error.

        Raises:
            ValueError: they are no numbers.
        """
        error = _saved(state, "error")
        before = number_of(error)
        if error is not None and (before is None or not -1 <= before <= 1):
            raise ValueError(
                f"the saved state of the KL controller has error={error!r}, which must be a number "
                "from -1 to 1"
            )
        super().load_state_dict(state)
        self._before = before


SETTINGS = {
    "kl_target": "the KL to hold, nats per token",
    "kl_horizon": "answers to adapt over (10000)",
    "kl_band": "half the width of the band, as a share of kl_target (0.2)",
    "kl_end": "the last coefficient",
    "kl_steps": "steps of the host until then, one for each rollout",
}
"""What a controller may be told, in words, for command lines and documentation."""


@dataclass(frozen=True)
class Control:
    """One ``kl_ctrl``: how it is made, the settings that it needs, and those it has a default for.

    Attributes:
        make: from ``kl_coef`` and the settings, in that order.
        driven: whether the KL moves it, so that there must be one to measure.
    """

    make: Callable[..., KLController]
    needs: tuple[str, ...] = ()
    defaults: Mapping[str, float] = field(default_factory=dict)
    driven: bool = False


CONTROLS = {
    "fixed": Control(FixedKL),
    "adaptive": Control(AdaptiveKL, ("kl_target",), {"kl_horizon": 10_000}, driven=True),
    "linear": Control(functools.partial(ScheduledKL, "linear"), ("kl_end", "kl_steps")),
    "cosine": Control(functools.partial(ScheduledKL, "cosine"), ("kl_end", "kl_steps")),
    "pid": Control(PIDKL, ("kl_target",), {"kl_band": 0.2}, driven=True),
}
KL_CONTROLLERS = tuple(CONTROLS)


def kl_controller(
    kl_ctrl: str,
    kl_coef: float,
    kl_target: float | None = None,
    kl_horizon: float | None = None,
    *,
    kl_end: float | None = None,
    kl_steps: float | None = None,
    kl_band: float | None = None,
) -> KLController:
    """The controller that the settings name.

    Raises:
        TypeError: a setting that is no number.
        ValueError: an unknown ``kl_ctrl``; a setting that it needs and has not, or has no use for;
            a number that can't be; or a start that is not positive where it moves.
    """
    if not isinstance(kl_ctrl, str) or kl_ctrl not in CONTROLS:
        raise ValueError(f"kl_ctrl={kl_ctrl!r} is unknown; allowed: {', '.join(KL_CONTROLLERS)}")
    asked: dict[str, Any] = {
        "kl_coef": kl_coef,
        "kl_target": kl_target,
        "kl_horizon": kl_horizon,
        "kl_band": kl_band,
        "kl_end": kl_end,
        "kl_steps": kl_steps,
    }
    control = CONTROLS[kl_ctrl]
    given: dict[str, float] = {}
    for name, value in asked.items():
        number = number_of(value)
        if number is not None:
            given[name] = number
        elif value is not None or name == "kl_coef":
            raise TypeError(f"{name} must be a number, got {value!r}")
    start = given.pop("kl_coef")
    for name, number in given.items():
        least, allowed = _ALLOWED.get(name, (math.ulp(0.0), "positive"))
        if not (math.isfinite(number) and number >= least):
            raise ValueError(f"{name}={number:g} must be finite and {allowed}")
        if name not in (*control.needs, *control.defaults):
            takers = [k for k, c in CONTROLS.items() if name in (*c.needs, *c.defaults)]
            raise ValueError(
                f"{name}={number:g} has no meaning with kl_ctrl={kl_ctrl}: it is for "
                f"{', '.join(takers)}"
            )
    if (band := given.get("kl_band", 0)) >= 1:
        raise ValueError(f"kl_band={band:g} must be below 1: it is a share of kl_target")
    if not math.isfinite(start):
        raise ValueError(f"kl_coef={start:g} must be finite")
    if kl_ctrl != "fixed" and not start > 0:
        raise ValueError(f"kl_ctrl={kl_ctrl} needs a positive kl_coef to start from, got {start:g}")
    for name in control.needs:
        if name not in given:
            raise ValueError(f"kl_ctrl={kl_ctrl} needs a {name}, {SETTINGS[name]}")
    settings = {name: given[name] for name in control.needs}
    settings |= {name: given.get(name, number) for name, number in control.defaults.items()}
    return control.make(start, *settings.values())


_ALLOWED = {
    "kl_end": (0.0, "not negative"),
    "kl_band": (0.0, "not negative"),
    "kl_steps": (1.0, "at least 1"),
}
