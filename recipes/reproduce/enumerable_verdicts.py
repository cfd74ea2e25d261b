"""What HYPOTHESES-enumerable.md predicts of the enumerable task, and what its results say of it.

Nothing is trained here: every number is of a line of `results/enumerable.jsonl`, or exact.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.reproduce import enumerable
from recipes.reproduce.enumerable import (
    BOUNDED,
    CLAMPED,
    GRID,
    K1,
    NO_CLIP,
    OWN,
    UNCORRECTED,
    WHOLE,
    Cell,
    Task,
    forward_step,
    joint,
    reverse_step,
)

SEEDS = 100
STUDENT = 1.9842  # 97.5 % of Student's t with 99 degrees of freedom
ALIKE = 0.1
MEASURES = {
    "reward": "E[r]",
    "kl": "KL(pi‖ref)",
    "kl_forward": "KL(ref‖pi)",
    "entropy": "entropy",
    "to_optimum": "to pi*",
    "to_myopic": "to myopic",
    "to_forward": "to forward",
    "good_in_16": "good in 16",
    "swing_between": "swing between",
    "swing_within": "swing within",
}


# What there is


class Results:
    """The ends of the enumerable task's cells: one number a seed."""

    def __init__(self, path: Path = enumerable.RESULTS) -> None:
        text = path.read_text("utf-8") if path.exists() else ""
        lines = map(json.loads, text.splitlines())
        self.lines: dict[Any, dict[str, Any]] = {enumerable.key(line): line for line in lines}

    def line(self, cell: Cell) -> dict[str, Any]:
        return self.lines[enumerable.key({**dataclasses.asdict(cell), "seeds": SEEDS})]

    def has(self, study: str) -> bool:
        keys = ({**dataclasses.asdict(c), "seeds": SEEDS} for c in GRID if c.study == study)
        return self.lines.keys() >= set(map(enumerable.key, keys))

    def end(self, cell: Cell, measure: str) -> Tensor:
        if measure == "objective":
            return self.end(cell, "reward") - cell.beta * self.end(cell, "kl")
        ends = self.line(cell)["end"][measure]
        return torch.tensor([float(x) for x in ends], dtype=torch.float64)


# How it is compared


@dataclass(frozen=True)
class Interval:
    """Mean over seeds and its 95 % t-interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> Interval:
        mean = float(values.mean())
        half = STUDENT * float(values.std()) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half)

    def __str__(self) -> str:
        return f"{self.mean:+.3g} ({self.low:+.3g} to {self.high:+.3g})"


@dataclass(frozen=True)
class Compared:
    """One comparison: what was predicted, what came out."""

    what: str
    interval: Interval
    verdict: str  # holds, fails, not decided


def compared(what: str, interval: Interval, holds: bool, fails: bool) -> Compared:
    return Compared(what, interval, "holds" if holds else "fails" if fails else "not decided")


def more(what: str, larger: Tensor, smaller: Tensor | float) -> Compared:
    interval = Interval.of(larger - smaller)
    return compared(what, interval, interval.low > 0, interval.high < 0)


def alike(what: str, one: Tensor, other: Tensor) -> Compared:
    interval = Interval.of(one - other)
    band = ALIKE * max(abs(float(one.mean())), abs(float(other.mean())))
    inside = -band < interval.low and interval.high < band
    return compared(what, interval, inside, interval.low > band or interval.high < -band)


@dataclass(frozen=True)
class Study:
    """The results of one study; a cell is named by its kl_type and by what is varied."""

    name: str
    results: Results

    def cell(self, kl_type: str, **settings: Any) -> Cell:
        """The one cell of GRID with these settings."""
        asked = {"study": self.name, "kl_type": kl_type, **settings}
        found = [c for c in GRID if all(getattr(c, key) == asked[key] for key in asked)]
        if len(found) != 1:
            raise LookupError(f"{len(found)} cells are {asked}")
        return found[0]

    def end(self, measure: str, kl_type: str, **settings: Any) -> Tensor:
        return self.results.end(self.cell(kl_type, **settings), measure)

    def more(self, what: str, measure: str, larger: str, smaller: str, **settings: Any) -> Compared:
        one, other = (self.end(measure, form, **settings) for form in (larger, smaller))
        return more(what, one, other)

    def alike(self, what: str, measure: str, one: str, other: str, **settings: Any) -> Compared:
        return alike(what, *(self.end(measure, form, **settings) for form in (one, other)))


# What was predicted, a study a function


def closed_form(s: Study) -> Iterator[Compared]:
    optimal = ("k1_in_reward", WHOLE)
    others = [c.kl_type for c in GRID if c.study == "closed" and c.kl_type not in optimal]
    for right, other in product(optimal, others):
        yield s.more(f"`{other}` ends further from pi* than `{right}`", "to_optimum", other, right)
    where = {
        "to_optimum": "pi*",
        "to_myopic": "the myopic policy",
        "to_forward": "the forward policy",
    }
    for form, far, near in (
        (OWN, "to_optimum", "to_myopic"),
        ("k3_as_loss", "to_optimum", "to_forward"),
        ("k3_as_loss", "to_myopic", "to_forward"),
    ):
        what = f"`{form}` ends further from {where[far]} than from {where[near]}"
        yield more(what, s.end(far, form), s.end(near, form))
    for other in ("k3_in_reward", "k2_in_reward", K1, "none"):
        yield s.more(f"`{other}` ends further from pi* than `{OWN}`", "to_optimum", other, OWN)


def study_a(s: Study) -> Iterator[Compared]:
    for name in ("reward", "kl"):
        what = f"1 update: `{K1}` like `none` in {MEASURES[name]}"
        yield s.alike(what, name, K1, "none", updates=1)
    for n in (4, 16):
        what = f"{n} updates: `{K1}` has more KL(ref‖pi) than `none`"
        yield s.more(what, "kl_forward", K1, "none", updates=n)
    for n, name in product((1, 4, 16), ("reward", "kl")):
        what = f"{n} update{'s' * (n > 1)}: `k1_as_loss` like `none` in {MEASURES[name]}"
        yield s.alike(what, name, "k1_as_loss", "none", updates=n)


def study_b(s: Study) -> Iterator[Compared]:
    for beta in (0.1, 0.3):
        for far, near in (
            ("k3_in_reward", "none"),
            ("k2_in_reward", "none"),
            ("none", "k1_in_reward"),
        ):
            what = f"beta {beta}: `{far}` has more KL(ref‖pi) than `{near}`"
            yield s.more(what, "kl_forward", far, near, beta=beta)
            what = f"beta {beta}: `{far}` has a lower lowest log-probability than `{near}`"
            yield s.more(what, "lowest", near, far, beta=beta)
        what = f"beta {beta}: `k1_in_reward` has more of E[r] - beta KL than `k3_in_reward`"
        yield s.more(what, "objective", "k1_in_reward", "k3_in_reward", beta=beta)


def kl(task: Task, log_p: Tensor) -> Tensor:
    """KL(pi‖ref) of whole answers, seed by seed."""
    return (log_p.exp() * (log_p - joint(task.ref))).sum(-1)


def study_c(s: Study) -> Iterator[Compared]:
    """On which side was computed from the fixed points, not from any run."""
    shares = ((0.02, "rare"), (0.8, "common"))
    for tokens, (share, word), beta in product((1, 4), shares, (0.1, 0.3, 0.6)):
        here = {"beta": beta, "share": share, "tokens": tokens}
        task = Task.drawn(s.cell(OWN, **here), SEEDS)
        at_k2, at_k3 = (kl(task, task.myopic(of(beta))) for of in (reverse_step, forward_step))
        which = "more" if at_k3.mean() > at_k2.mean() else "less"
        for form in ("k3_as_loss", *(["stock:verl:k3"] if beta == 0.3 else [])):
            at = f"{tokens} token{'s' * (tokens > 1)}, {word}, beta {beta}:"
            pair = (form, OWN) if which == "more" else (OWN, form)
            yield s.more(f"{at} `{form}` has {which} KL(pi‖ref) than `{OWN}`", "kl", *pair, **here)


def study_d(s: Study) -> Iterator[Compared]:
    for beta in (0.1, 0.3):
        which, pair = ("more", (WHOLE, OWN)) if beta == 0.3 else ("less", (OWN, WHOLE))
        for tokens in (2, 4, 8):
            at, here = f"{tokens} tokens, beta {beta}:", {"tokens": tokens, "beta": beta}
            yield s.more(f"{at} the own token has more KL(pi‖ref)", "kl", OWN, WHOLE, **here)
            yield s.more(f"{at} it ends further from pi*", "to_optimum", OWN, WHOLE, **here)
            yield s.more(f"{at} the whole answer has {which} entropy", "entropy", *pair, **here)
            if beta == 0.3:
                what = f"{at} `k1_in_reward` like the whole answer in KL(pi‖ref)"
                yield s.alike(what, "kl", "k1_in_reward", WHOLE, **here)
        gaps = {
            n: s.end("kl", OWN, tokens=n, beta=beta) - s.end("kl", WHOLE, tokens=n, beta=beta)
            for n in (2, 4, 8)
        }
        for short, long in ((2, 4), (4, 8)):
            what = f"beta {beta}: the difference of KL grows from {short} to {long} tokens"
            yield more(what, gaps[long], gaps[short])


def study_e(s: Study) -> Iterator[Compared]:
    for form in (UNCORRECTED, "k1_in_reward"):
        what = f"1 update: `{form}` like `{OWN}` in the swing between rollouts"
        yield s.alike(what, "swing_between", form, OWN, updates=1)
    for form in (UNCORRECTED, "k1_in_reward"):
        what = f"64 updates: `{form}` swings more within a rollout than `{OWN}`"
        yield s.more(what, "swing_within", form, OWN, updates=64)


def start_of(c: Cell) -> Tensor:
    """KL(ref‖pi) before the first update, one number a seed."""
    _, _, levels = next(enumerable.train(c, SEEDS))
    return enumerable.measured(Task.drawn(c, SEEDS), levels, {})["kl_forward"]


def study_f(s: Study) -> Iterator[Compared]:
    for form in ("stock:verl:k3", "stock:openrlhf:k2", "stock:openrlhf:k3", OWN, BOUNDED):
        far = s.cell(form, start=3.0)
        left = s.results.end(far, "kl_forward") / start_of(far)
        if form.startswith("stock"):
            yield more(f"`{form}`: more than half of KL(ref‖pi) is left", left, 0.5)
        else:
            yield more(f"`{form}`: less than a tenth is left", 0.1 - left, 0.0)
    for form in CLAMPED:
        what = f"after the spike `{BOUNDED}` has more of E[r] - beta KL than `{form}`"
        yield s.more(what, "objective", BOUNDED, form, spike=100.0)


def beta_at(task: Task, wanted: Tensor) -> Tensor:
    """The beta' at which pi*(beta') has this KL(pi‖ref), seed by seed, by bisection in log.

    0 where no pi* has as much: theirs is bounded, by minus the log of the good answers' mass.
    """
    low, high = torch.full_like(wanted, math.log(1e-3)), torch.full_like(wanted, math.log(1e3))
    for _ in range(60):
        middle = (low + high) / 2
        above = kl(task, task.optimum(middle.exp().unsqueeze(-1))) > wanted
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    found = ((low + high) / 2).exp()
    return torch.where(found < 1.01e-3, 0.0, found)


def gap(results: Results, c: Cell) -> Tensor:
    """Reward lost against the best policy of the same KL, seed by seed."""
    task = Task.drawn(c, SEEDS)
    beta = beta_at(task, results.end(c, "kl")).clamp(min=1e-3)
    best = task.optimum(beta.unsqueeze(-1)).exp()
    return (best * task.reward).sum(-1) - results.end(c, "reward")


def study_g(s: Study) -> Iterator[Compared]:
    optimal, mild, wrong = (WHOLE, "k1_in_reward"), (OWN, "stock:verl:k3"), "k3_in_reward"
    for beta in (0.1, 0.2, 0.4):
        gaps = {c.kl_type: gap(s.results, c) for c in GRID if c.study == "g" and c.beta == beta}
        pairs = [(other, right) for right in optimal for other in mild]
        pairs += [(wrong, other) for other in (OWN, *optimal, "stock:verl:k3")]
        for large, small in pairs:
            what = f"beta {beta}: `{large}` has a larger gap than `{small}`"
            yield more(what, gaps[large], gaps[small])


def study_h(s: Study) -> Iterator[Compared]:
    for share, beta in product((0.05, 0.5), (0.1, 0.3)):
        cells = (
            s.cell(form, share=share, beta=beta)
            for form in ("k1_in_reward", "k1_in_reward,reward_norm=group")
        )
        absolute, group = (beta_at(Task.drawn(c, SEEDS), s.results.end(c, "kl")) for c in cells)
        at = f"{share:.0%} good, beta {beta}: effective beta"
        yield more(f"{at} larger under `reward_norm=group`", group, absolute)
        what = f"{at} nearer to beta under `reward_norm=group`"
        yield more(what, (absolute - beta).abs(), (group - beta).abs())


def study_clip(s: Study) -> Iterator[Compared]:
    for tokens, form in product((2, 4), (OWN, WHOLE)):
        where = {OWN: "the myopic policy", WHOLE: "pi*"}[form]
        end = {OWN: "to_myopic", WHOLE: "to_optimum"}[form]
        clipped = s.end(end, form, tokens=tokens, clip=0.2)
        for other, clip, how in (
            (f"{form},head=combined", 0.2, "`head=combined`"),
            (form, NO_CLIP, "no clip"),
        ):
            what = f"{tokens} tokens: `{form}` ends nearer to {where} with {how}"
            yield more(what, clipped, s.end(end, other, tokens=tokens, clip=clip))


STUDIES: dict[str, Callable[[Study], Iterator[Compared]]] = {
    "closed": closed_form,
    "a": study_a,
    "b": study_b,
    "c": study_c,
    "d": study_d,
    "e": study_e,
    "f": study_f,
    "g": study_g,
    "h": study_h,
    "clip": study_clip,
}


def comparisons(results: Results, study: str) -> list[Compared]:
    """Of a study that was run as a whole; else none."""
    return list(STUDIES[study](Study(study, results))) if results.has(study) else []
