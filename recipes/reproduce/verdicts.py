"""The hypotheses on the host: what was asked, what came out, and the verdict.

Each by the rule of HYPOTHESES.md. Two formulations are compared seed by seed; a run that diverged
counts against its formulation and is never dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import bootstrap

from recipes.reproduce.measures import (
    ACCURACY,
    BOUNDED,
    COEFFICIENTS,
    DIVIDED,
    ENTROPY,
    EXACT,
    FROZEN,
    GRADIENT_NORM,
    K1,
    K2,
    KL,
    KL_ERROR,
    PASS_16,
    SWING,
    UNWEIGHTED,
    WHOLE,
    Measure,
    Runs,
)
from recipes.reproduce.words import LEAST_SEEDS

if TYPE_CHECKING:
    from recipes.reproduce.drive import Row

RESAMPLES = 10_000
POINT = 0.01
DOUBLE = math.log(2)
VERDICTS = ("reproduced", "not reproduced", "not decided", "not decided yet")


# Comparing


@dataclass(frozen=True)
class Effect:
    """A mean difference over seeds, with its percentile bootstrap interval; nan of no seed."""

    mean: float
    low: float
    high: float
    differences: tuple[float, ...]

    @property
    def seeds(self) -> int:
        return len(self.differences)

    def told(
        self, mean: str, form: str, scale: Callable[[float], float] = lambda value: value
    ) -> str:
        if not self.seeds:
            return "no pair of runs yet"
        middle, low, high = (form.format(scale(x)) for x in (self.mean, self.low, self.high))
        if self.seeds == 1:
            return f"{mean.format(middle)} (1 seed)"
        return f"{mean.format(middle)}, {low} to {high} ({self.seeds} seeds)"


def points(found: Effect) -> str:
    """A difference of accuracies, in points."""
    return found.told("{} points", "{:+.1f}", lambda share: 100 * share)


def factor(found: Effect) -> str:
    """A difference of logarithms, as a factor."""
    return found.told("a factor {}", "{:.3g}", math.exp)


def nats(found: Effect) -> str:
    return found.told("{} nats", "{:+.3g}")


def effect(differences: Sequence[float]) -> Effect:
    """Of paired differences, one a seed, the finite ones; the interval of one alone is itself."""
    values = [d for d in differences if math.isfinite(d)]
    mean = low = high = float(np.mean(values)) if values else math.nan
    if len(set(values)) > 1:
        low, high = bootstrap(
            (values,),
            np.mean,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
    return Effect(mean, float(low), float(high), tuple(values))


def contrast(
    runs: Runs, of: Callable[[Row], float], first: str, second: str, updates: int = 4
) -> Effect:
    """first minus second, over the seeds that both have."""
    one, other = runs.of(first, updates), runs.of(second, updates)
    return effect([of(one[seed]) - of(other[seed]) for seed in sorted(one.keys() & other.keys())])


def diverged_pairs(runs: Runs, first: str, second: str, updates: int = 4) -> int:
    """The seeds that both have, and of which a run diverged."""
    one, other = runs.of(first, updates), runs.of(second, updates)
    return sum(
        "diverged" in (one[seed]["status"], other[seed]["status"])
        for seed in one.keys() & other.keys()
    )


def above(found: Effect, threshold: float) -> bool:
    """Whether a difference holds above a threshold: the interval, and every seed."""
    return found.low > threshold and min(found.differences) > threshold


def below(found: Effect, threshold: float) -> bool:
    return found.high < threshold and max(found.differences) < threshold


def within(found: Effect, threshold: float) -> bool:
    """Whether two are alike: the interval lies within the threshold on both sides."""
    return -threshold < found.low and found.high < threshold


def beyond(found: Effect, threshold: float) -> bool:
    return above(found, threshold) or below(found, -threshold)


# The hypotheses


@dataclass(frozen=True)
class Finding:
    """A part of a hypothesis."""

    part: str
    asked: str
    measured: str
    verdict: str
    """One of VERDICTS; `no verdict` where nothing was predicted. Of one seed, by the noise of
    measuring: `as expected`, `not as expected`, `not told apart`."""


def verdict(effects: Sequence[Effect], holds: bool, opposite: bool) -> str:
    if any(found.seeds < LEAST_SEEDS for found in effects):
        return "not decided yet"
    return "reproduced" if holds else "not reproduced" if opposite else "not decided"


def sided(
    part: str,
    asked: str,
    measured: str,
    found: Effect,
    side: Callable[[Effect, float], bool],
    threshold: float = 0.0,
) -> Finding:
    """Whether a difference lies on the predicted side of a threshold: `above` or `below`."""
    other = above if side is below else below
    decided = verdict([found], side(found, threshold), other(found, threshold))
    return Finding(part, asked, measured, decided)


def undecided(finding: Finding, found: Effect, diverged: int) -> Finding:
    """The finding, which pairs with a run that diverged leave open: no number stands for theirs."""
    if not diverged:
        return finding
    measured = f"{finding.measured}; {diverged} more diverged"
    enough = found.seeds + diverged >= LEAST_SEEDS
    return replace(
        finding, measured=measured, verdict="not decided" if enough else "not decided yet"
    )


def alike(part: str, asked: str, accuracy: Effect, log_kl: Effect) -> Finding:
    """Whether accuracies are within 5 points of each other, and KLs within a factor 2."""
    decided = verdict(
        [accuracy, log_kl],
        within(accuracy, 5 * POINT) and within(log_kl, DOUBLE),
        beyond(accuracy, 5 * POINT) or beyond(log_kl, DOUBLE),
    )
    return Finding(part, asked, f"accuracy {points(accuracy)}; KL {factor(log_kl)}", decided)


def findings(runs: Runs) -> list[Finding]:
    """(a), (b), (d) of HYPOTHESES.md on the host, with its thresholds, and (g)."""
    destroyed = contrast(runs, ACCURACY.of, K1, "none")
    kl_k3 = contrast(runs, runs.log_kl, "k3_in_reward", "none")
    harmed = contrast(runs, ACCURACY.of, "k3_in_reward", "none")
    stock = contrast(runs, runs.log_kl, "stock:k3", K2)
    (diverse, entropy, drift), in_reward = (
        [contrast(runs, of, form, K2) for of in (PASS_16.of, ENTROPY.of, runs.log_kl)]
        for form in (WHOLE, "k1_in_reward")
    )
    return [
        alike(
            "a1",
            "k1 as a loss, 1 update: like no KL (5 points, factor 2)",
            contrast(runs, ACCURACY.of, K1, "none", updates=1),
            contrast(runs, runs.log_kl, K1, "none", updates=1),
        ),
        sided(
            "a2",
            "k1 as a loss, 4 updates: at least 10 points below no KL",
            f"accuracy {points(destroyed)}",
            destroyed,
            below,
            -10 * POINT,
        ),
        sided(
            "b1",
            "k3 in the reward does not regularise: KL above half of no KL's",
            f"KL {factor(kl_k3)}",
            kl_k3,
            above,
            -DOUBLE,
        ),
        sided(
            "b2",
            "k3 in the reward is harmful: at least 5 points below no KL",
            f"accuracy {points(harmed)}",
            harmed,
            below,
            -5 * POINT,
        ),
        Finding(
            "c",
            "stock k3 beside k2 as a loss: reported, decides nothing here",
            f"KL {factor(stock)}",
            "no verdict",
        ),
        sided(
            "d1",
            "whole answer against own token: higher pass@16",
            f"pass@16 {points(diverse)}",
            diverse,
            above,
        ),
        undecided(
            sided(
                "d2",
                "whole answer against own token: more entropy",
                f"entropy {nats(entropy)}",
                entropy,
                above,
            ),
            entropy,
            diverged_pairs(runs, WHOLE, K2),
        ),
        sided(
            "d3",
            "whole answer against own token: less drift",
            f"KL {factor(drift)}",
            drift,
            below,
        ),
        Finding(
            "d",
            "k1 in the reward against own token: reported beside d1 to d3, decides nothing",
            f"pass@16 {points(in_reward[0])}; entropy {nats(in_reward[1])}; "
            f"KL {factor(in_reward[2])}",
            "no verdict",
        ),
        at_equal_kl(runs),
    ]


def at_equal_kl(runs: Runs) -> Finding:
    """(g): k2 as a loss less stock k3, at the KL that k2 has at 0.5.

    The line decides. It may miss its own points, so what lies between them is told beside it.
    """

    def curve(kl_type: str, seed: int) -> tuple[list[float], list[float]]:
        """Log KL and accuracy at each coefficient, by rising KL; nothing where one is missing."""
        rows = [runs.of(kl_type, 4, coef).get(seed) for coef in COEFFICIENTS]
        there = [row for row in rows if row is not None]
        if len(there) < len(COEFFICIENTS):
            return [], []
        x, y = zip(*sorted((runs.log_kl(row), ACCURACY.of(row)) for row in there), strict=True)
        return list(x), list(y)

    def line(kl_type: str, seed: int, at: float) -> float:
        """Accuracy at a log KL, on the least-squares line through the coefficients' points."""
        x, y = curve(kl_type, seed)
        return float(np.polyval(np.polyfit(x, y, 1), at)) if x else math.nan

    def between(kl_type: str, seed: int, at: float) -> float:
        """Accuracy at a log KL, on the line through the two points beside it."""
        x, y = curve(kl_type, seed)
        return float(np.interp(at, x, y, math.nan, math.nan)) if x else math.nan

    ends = [(seed, runs.log_kl(row)) for seed, row in sorted(runs.of(K2).items())]
    found, beside = (
        effect([read(K2, seed, at) - read("stock:k3", seed, at) for seed, at in ends])
        for read in (line, between)
    )
    return Finding(
        "g",
        "k2 as a loss and stock k3 at equal KL: alike (2 points)",
        f"accuracy {points(found)}; between neighbouring points {points(beside)}",
        verdict([found], within(found, 2 * POINT), beyond(found, 2 * POINT)),
    )


def updates_findings(runs: Runs) -> list[Finding]:
    """(e) of HYPOTHESES.md on the host, with 64 updates per rollout."""
    broken = contrast(runs, ACCURACY.of, FROZEN, K2, 64)
    frozen, unweighted = (
        contrast(runs, runs.log(SWING.of), form, K2, 64) for form in (FROZEN, UNWEIGHTED)
    )
    swing = "swing of the KL {}"
    return [
        sided(
            "e1",
            "k1 in the reward, 64 updates: at least 5 points below k2 as a loss",
            f"accuracy {points(broken)}",
            broken,
            below,
            -5 * POINT,
        ),
        sided(
            "e2",
            "k1 in the reward, 64 updates: a larger swing of the KL",
            swing.format(factor(frozen)),
            frozen,
            above,
        ),
        sided(
            "e3",
            "k2 as a loss without its weight, 64 updates: a larger swing of the KL",
            swing.format(factor(unweighted)),
            unweighted,
            above,
        ),
    ]


def spike_findings(runs: Runs) -> list[Finding]:
    """(f) of HYPOTHESES.md on the host, after a spike of the learning rate."""

    def nearer(part: str, stock: str) -> Finding:
        found = contrast(runs, runs.log_kl, BOUNDED, stock)
        asked = f"after a spike, a bounded k2 against {stock}: less KL"
        return sided(part, asked, f"KL {factor(found)}", found, below)

    return [nearer("f1", "stock:k2"), nearer("f2", "stock:k3")]


def strength_findings(runs: Runs) -> list[Finding]:
    """(h) of HYPOTHESES.md, on verl."""
    found = contrast(runs, runs.log_kl, DIVIDED, FROZEN)
    asked = "verl: in-reward KL over the group's standard deviation against absolute: less KL"
    return [sided("h1", asked, f"KL {factor(found)}", found, below)]


def exact_findings(runs: Runs, verl: Runs) -> list[Finding]:
    """(x) of HYPOTHESES.md: the KL over the vocabulary less the sampled one, on both hosts."""

    def same(part: str, runs: Runs, where: str) -> Finding:
        accuracy = contrast(runs, ACCURACY.of, EXACT, K2)
        log_kl = contrast(runs, runs.log_kl, EXACT, K2)
        return alike(part, f"{where}: alike (5 points, factor 2)", accuracy, log_kl)

    def smaller(part: str, runs: Runs, where: str, measure: Measure, updates: int = 4) -> Finding:
        found = contrast(runs, runs.log(measure.of), EXACT, K2, updates)
        what = "swing of the KL" if measure is SWING else measure.heading
        asked = f"{where}: a smaller {what}"
        return sided(part, asked, f"{what} {factor(found)}", found, below)

    return [
        same("x1", runs, "4 updates"),
        smaller("x2", runs, "4 updates", GRADIENT_NORM),
        smaller("x3", runs, "16 updates", SWING, 16),
        smaller("x4", runs, "64 updates", SWING, 64),
        same("x5", verl, "verl, 4 updates"),
        smaller("x6", verl, "verl, 4 updates", GRADIENT_NORM),
    ]


def language_findings(runs: Runs) -> list[Finding]:
    """(l) of HYPOTHESES.md: one seed, so only the noise of measuring a KL is known."""

    def compared(part: str, asked: str, kl_type: str, sign: int) -> Finding:
        one, other = (runs.of(form).get(1) for form in (kl_type, "none"))
        if one is None or other is None:
            return Finding(part, asked, "no pair of runs yet", "not decided yet")
        if "diverged" in (one["status"], other["status"]):
            # Both: neither is larger.
            larger = (one["status"] == "diverged") - (other["status"] == "diverged")
            measured = "KL of a run that diverged"
        else:
            difference = KL.of(one) - KL.of(other)
            error = math.hypot(KL_ERROR.of(one), KL_ERROR.of(other))
            larger = (difference > 2 * error) - (difference < -2 * error)
            measured = f"KL {difference:+.3g} nats, error {error:.2g} (1 seed)"
        told = ("not told apart", "as expected", "not as expected")  # the last is at -1
        return Finding(part, asked, measured, told[sign * larger])

    return [
        compared("l1", "k1 as a loss ends with more KL than no KL", K1, 1),
        compared("l2", "k2 as a loss ends with less KL than no KL", K2, -1),
    ]
