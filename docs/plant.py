"""A run that is simulated, for ``docs/controllers.md``: how the KL answers to its coefficient.

The KL of the optimum falls as 1 / kl_coef^2, which is what ref exp(r / kl_coef) / Z has where it is
near ref. A run goes there as a first-order lag: ``kl += (gain / kl_coef^2 - kl) / lag``, with the
coefficient of ``delay`` steps ago. What is measured is that times a noise of mean 1. Halfway the
gain trebles: the task has found something new to reach for.
"""

from __future__ import annotations

import contextlib
import io
import math
import random
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from klplug import kl_controller
from klplug.report.plots import COLOURS, INK

STEPS, JUMP, ANSWERS, SEEDS = 400, 200, 1024, 20
NEAR = 0.25  # of the target, what counts as held

CONTROLLERS: dict[str, dict[str, Any]] = {
    "fixed": {"kl_ctrl": "fixed"},
    "linear to half": {"kl_ctrl": "linear", "kl_end": 0.5, "kl_steps": STEPS},
    "cosine to half": {"kl_ctrl": "cosine", "kl_end": 0.5, "kl_steps": STEPS},
    "adaptive": {"kl_ctrl": "adaptive", "kl_target": 1.0},
    "adaptive, kl_horizon=1024": {"kl_ctrl": "adaptive", "kl_target": 1.0, "kl_horizon": 1024},
    "pid": {"kl_ctrl": "pid", "kl_target": 1.0},
}


@dataclass(frozen=True)
class Plant:
    """One kind of run. The target is 1; with ``gain`` 1 the first coefficient is the right one."""

    lag: float = 10.0
    delay: int = 0
    noise: float = 0.0
    gain: float = 1.0

    def run(self, settings: dict[str, Any], seed: int) -> list[float]:
        """The true KL of each step."""
        drawn, controller = random.Random(seed), kl_controller(kl_coef=1.0, **settings)
        coefficients, kl, kls = [controller.value] * (self.delay + 1), 0.0, []
        with contextlib.redirect_stdout(io.StringIO()):  # its warnings
            for step in range(STEPS):
                coefficients.append(controller.value)
                gain = self.gain * (3 if step >= JUMP else 1)
                # A coefficient of 0 or nearly so lets the KL go as far as this plant goes.
                kl += (min(gain / coefficients[-1 - self.delay] ** 2, 1e3) - kl) / self.lag
                kls.append(kl)
                noise = math.exp(self.noise * drawn.gauss(0, 1) - self.noise**2 / 2)
                controller.update(kl * noise, ANSWERS)
        return kls


PLANTS = {
    "the first coefficient is right": Plant(),
    "it is 10 times too small": Plant(gain=100.0),
    "noise of 20 %": Plant(noise=0.2),
    "noise, and a delay of 10 steps": Plant(noise=0.2, delay=10),
    "noise, the delay, and 4 times the lag": Plant(noise=0.2, delay=10, lag=40.0),
}


def settled(kls: list[float]) -> int:
    """The steps until the KL is near the target for good; all of them where it never is."""
    off = [step for step, kl in enumerate(kls, 1) if abs(kl - 1) > NEAR]
    return off[-1] if off else 0


def rows() -> Iterable[tuple[str, ...]]:
    for kind, plant in PLANTS.items():
        for name, settings in CONTROLLERS.items():
            runs = [plant.run(settings, seed) for seed in range(SEEDS)]
            cells = [kind, f"`{name}`" if name in ("fixed", "adaptive", "pid") else name]
            for half in ([run[:JUMP] for run in runs], [run[JUMP:] for run in runs]):
                steps = [settled(part) for part in half]
                failed = sum(step == len(half[0]) for step in steps)
                cells.append("never" if failed == SEEDS else f"{statistics.median(steps):.0f}")
                cells.append(f"{failed} of {SEEDS}")
            cells.append(f"{statistics.median(max(run) for run in runs):.2f}")
            yield tuple(cells)


def picture(axes: Any) -> None:
    """The KL under each controller: noise, and a delay of ten steps."""
    plant = PLANTS["noise, and a delay of 10 steps"]
    for colour, (name, settings) in zip(COLOURS, CONTROLLERS.items(), strict=False):
        axes.plot(plant.run(settings, 0), color=colour, label=name, linewidth=1.2)
    axes.axhspan(1 - NEAR, 1 + NEAR, color="#808080", alpha=0.2)
    axes.set(yscale="log", ylim=(0.05, 30), xlabel="step", ylabel="KL over its target")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.figure.legend(frameon=False, labelcolor=INK, loc="outside lower center", ncols=2)
