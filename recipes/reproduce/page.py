"""docs/evidence.md, its figures and README's table: `python -m recipes.reproduce.page`.

Nothing in the page is written by hand but its sentences: each number is of `results/GRID*.jsonl` of
the grids tier1, exact and smollm2, each verdict follows HYPOTHESES.md's rule. What is missing is
said to be missing.
"""

import argparse
import json
import math
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.stats import bootstrap

from klplug.report import plots
from recipes.reproduce.drive import DriveError, Row, is_of, missing, read_rows, seconds_of, shown
from recipes.reproduce.ends import spread
from recipes.reproduce.grid import HERE, load
from recipes.reproduce.words import (
    COLUMNS,
    ENUMERATED,
    FORMULATIONS,
    HOW,
    INTRODUCTION,
    LEAST_SEEDS,
    NOT_TRIED,
    ON_EXACT,
    ON_LANGUAGE,
    READ,
    RULE,
    TOLD,
)
from recipes.shared.settings import REPOSITORY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = HERE / "results"
PAGE = REPOSITORY / "docs" / "evidence.md"
CLOSED_FORM = REPOSITORY / "docs" / "closed-form.md"
README = REPOSITORY / "README.md"
IN_README = re.compile(r"(?<=<!-- evidence -->\n).*(?=<!-- /evidence -->)", re.DOTALL)
IMAGES = REPOSITORY / "docs" / "img"

RESAMPLES = 10_000
LOST = 0.5  # of the first rollout's reward: a rollout below it is lost
MAIN = {"kl_coef": 0.5, "updates": 4}
ORDER = (
    *("none", "k1_as_loss,ratio=none", "stock:k3", "k3_in_reward", "k1_in_reward"),
    *("k2_as_loss", "k2_as_loss,horizon=sequence"),
)
# Colours that are told apart without seeing all of them (Okabe and Ito).
COLOURS = (plots.INK, "#d55e00", "#e69f00", "#cc79a7", "#0072b2", "#009e73", "#56b4e9")


# What a row says


def accuracy(row: Row) -> float:
    """pass@1 at temperature 1 at the end; 0 of a run that diverged."""
    return end("sampled_accuracy", diverged=0.0)(row)


def end(name: str, diverged: float = math.nan) -> Callable[[Row], float]:
    """A measure of the last evaluation, and what it is of a run that diverged."""

    def value(row: Row) -> float:
        if row["status"] == "diverged":
            return diverged
        found: Any = row["evaluations"][-1]
        for key in name.split("/"):
            found = found[key]
        return float(found)

    return value


def lost(row: Row) -> float:
    """The share of rollouts whose mean reward is below half of the first one's."""
    rewards = [reward or 0.0 for reward in row["training"]["reward"]]
    missing = row["settings"]["steps"] - len(rewards)  # a run that diverged has fewer
    return (sum(r < LOST * rewards[0] for r in rewards) + missing) / row["settings"]["steps"]


def gradient_norm(row: Row) -> float:
    """The median over the steps."""
    norms = [norm for norm in row["training"].get("actor_grad_norm", []) if norm is not None]
    return float(np.median(norms)) if norms else math.nan


def swing(row: Row) -> float:
    """Standard deviation of the mean log-ratio over the last third of the rollouts, nats per token.

    Not of the host's `kl`, another quantity for each estimator. nan of a run that diverged.
    """
    logged = row["training"].get("klplug/k1", [])
    last = [value for value in logged if value is not None][-(row["settings"]["steps"] // 3) :]
    if row["status"] == "diverged" or len(last) < 2:
        return math.nan
    return float(np.std(last, ddof=1))


def cpu_seconds(row: Row) -> float:
    """Of the whole run, its evaluations included, for each rollout."""
    return float(row["cpu_seconds"] / row["settings"]["steps"])


@dataclass(frozen=True)
class Measure:
    """A column of the table."""

    heading: str
    of: Callable[[Row], float]
    form: str


ACCURACY = Measure("accuracy", accuracy, "{:.1%}")
KL = Measure("KL(pi‖ref)", end("kl_nats_per_answer"), "{:.3g}")
KL_ERROR = Measure("its error", end("kl_standard_error"), "{:.2g}")
ENTROPY = Measure("entropy", end("entropy_nats_per_answer"), "{:.3g}")
GREEDY = Measure("greedy", end("accuracy", diverged=0.0), "{:.1%}")


def pass_at(k: int) -> Measure:
    return Measure(f"pass@{k}", end(f"pass_at/{k}", diverged=0.0), "{:.1%}")


PASS_16 = pass_at(16)
CORRECT = (ACCURACY, GREEDY, pass_at(8), PASS_16)
ABLE = (*CORRECT, Measure("rollouts lost", lost, "{:.0%}"))
TOKENS = Measure("tokens", end("response_tokens"), "{:.1f}")
MOVED = (
    KL,
    Measure("KL(ref‖pi)", end("forward_kl_nats_per_answer"), "{:.3g}"),
    ENTROPY,
    TOKENS,
    Measure("gradient norm", gradient_norm, "{:.2g}"),
)
SWING = Measure("swing", swing, "{:.2g}")
CPU_SECONDS = Measure("CPU-seconds a rollout", cpu_seconds, "{:.1f}")


def mean_and_range(values: Sequence[float], form: str) -> str:
    """The mean, and the lowest and highest seed; of the finite ones."""
    return spread([value for value in values if math.isfinite(value)], form)


# Comparing


@dataclass(frozen=True)
class Effect:
    """A mean difference over seeds, with its percentile bootstrap interval."""

    mean: float
    low: float
    high: float
    differences: tuple[float, ...]

    @property
    def seeds(self) -> int:
        return len(self.differences)


def effect(differences: Sequence[float]) -> Effect:
    """Of paired differences, one a seed; the interval of one alone is itself."""
    values = np.asarray(differences, dtype=float)
    low = high = float(values.mean())
    if len(values) > 1 and np.ptp(values) > 0:
        found = bootstrap(
            (values,),
            np.mean,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        low, high = float(found.low), float(found.high)
    return Effect(float(values.mean()), low, high, tuple(values.tolist()))


Verdict = Literal[
    "reproduced",
    "not reproduced",
    "not decided",
    "not decided yet",
    "no verdict",
    # Of one seed, by the noise of measuring:
    "as expected",
    "not as expected",
    "not told apart",
]


def above(found: Effect | None, threshold: float) -> bool:
    """Whether a difference holds above a threshold: the interval, and every seed."""
    return (
        found is not None
        and found.seeds >= LEAST_SEEDS
        and found.low > threshold
        and min(found.differences) > threshold
    )


def below(found: Effect | None, threshold: float) -> bool:
    return found is not None and above(negative(found), -threshold)


def negative(found: Effect) -> Effect:
    return Effect(-found.mean, -found.high, -found.low, tuple(-d for d in found.differences))


def within(found: Effect | None, threshold: float) -> bool:
    """Whether two are alike: the interval lies within the threshold on both sides."""
    return (
        found is not None
        and found.seeds >= LEAST_SEEDS
        and -threshold < found.low
        and found.high < threshold
    )


def beyond(found: Effect | None, threshold: float) -> bool:
    return above(found, threshold) or below(found, -threshold)


def verdict(effects: Sequence[Effect | None], holds: bool, opposite: bool) -> Verdict:
    if any(found is None or found.seeds < LEAST_SEEDS for found in effects):
        return "not decided yet"
    if holds:
        return "reproduced"
    return "not reproduced" if opposite else "not decided"


ORDER_OF_VERDICTS: tuple[Verdict, ...] = (
    "reproduced",
    "not reproduced",
    "not decided",
    "not decided yet",
)


class Runs:
    """The rows of a grid, looked up by what was varied."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    def of(self, kl_type: str, updates: int = 4, kl_coef: float | None = 0.5) -> dict[int, Row]:
        """Seed to row."""
        coef = None if kl_type == "none" else kl_coef
        asked = {"kl_type": kl_type, "updates": updates, "kl_coef": coef}
        found = (r for r in self.rows if all(r["settings"][k] == v for k, v in asked.items()))
        return {row["settings"]["seed"]: row for row in found}

    def log(self, of: Callable[[Row], float]) -> Callable[[Row], float]:
        """A measure's logarithm; of a run that diverged, that of the runs with as many updates
        whose measure is the largest.
        """

        def value(row: Row) -> float:
            if row["status"] != "diverged":
                return math.log(found) if (found := of(row)) > 0 else math.nan
            updates = row["settings"]["updates"]
            beside = (of(r) for r in self.rows if r["settings"]["updates"] == updates)
            return max((math.log(found) for found in beside if found > 0), default=math.nan)

        return value

    def log_kl(self, row: Row) -> float:
        return self.log(KL.of)(row)

    def effect(
        self, of: Callable[[Row], float], first: str, second: str, updates: int = 4
    ) -> Effect | None:
        """first minus second, over the seeds that both have; None where there is none."""
        one, other = self.of(first, updates), self.of(second, updates)
        seeds = sorted(set(one) & set(other))
        differences = [of(one[seed]) - of(other[seed]) for seed in seeds]
        finite = [d for d in differences if math.isfinite(d)]
        return effect(finite) if finite else None


def points(found: Effect | None) -> str:
    """A difference of accuracies, in points."""
    if found is None:
        return "no pair of runs yet"
    if found.seeds == 1:
        return f"{100 * found.mean:+.1f} points (1 seed)"
    low, high = 100 * found.low, 100 * found.high
    return f"{100 * found.mean:+.1f} points, {low:+.1f} to {high:+.1f} ({found.seeds} seeds)"


def factor(found: Effect | None) -> str:
    """A difference of logarithms, as a factor."""
    if found is None:
        return "no pair of runs yet"
    if found.seeds == 1:
        return f"a factor {math.exp(found.mean):.3g} (1 seed)"
    low, high = math.exp(found.low), math.exp(found.high)
    return f"a factor {math.exp(found.mean):.3g}, {low:.3g} to {high:.3g} ({found.seeds} seeds)"


def nats(found: Effect | None) -> str:
    if found is None:
        return "no pair of runs yet"
    if found.seeds == 1:
        return f"{found.mean:+.3g} nats (1 seed)"
    return f"{found.mean:+.3g} nats, {found.low:+.3g} to {found.high:+.3g} ({found.seeds} seeds)"


# The hypotheses


@dataclass(frozen=True)
class Finding:
    """A part of a hypothesis: what was asked, what came out, and the verdict."""

    part: str
    asked: str
    measured: str
    verdict: Verdict


POINT = 0.01
DOUBLE = math.log(2)
K1, WHOLE = "k1_as_loss,ratio=none", "k2_as_loss,horizon=sequence"
SAMPLED, EXACT = "k2_as_loss", "k2_as_loss,vocab=exact"  # the second is exact_as_loss


def alike(part: str, asked: str, right: Effect | None, log_kl: Effect | None) -> Finding:
    """Whether accuracies are within 5 points of each other, and KLs within a factor 2."""
    return Finding(
        part,
        asked,
        f"accuracy {points(right)}; KL {factor(log_kl)}",
        verdict(
            [right, log_kl],
            within(right, 5 * POINT) and within(log_kl, DOUBLE),
            beyond(right, 5 * POINT) or beyond(log_kl, DOUBLE),
        ),
    )


def findings(runs: Runs) -> list[Finding]:
    """(a), (b), (d) of HYPOTHESES.md on the host, with its thresholds, and (g)."""
    destroyed = runs.effect(accuracy, K1, "none")
    kl_k3 = runs.effect(runs.log_kl, "k3_in_reward", "none")
    harmed = runs.effect(accuracy, "k3_in_reward", "none")
    diverse, entropy, drift = against_own_token(runs, WHOLE)
    in_reward = against_own_token(runs, "k1_in_reward")
    return [
        alike(
            "a1",
            "k1 as a loss, 1 update: like no KL (5 points, factor 2)",
            runs.effect(accuracy, K1, "none", updates=1),
            runs.effect(runs.log_kl, K1, "none", updates=1),
        ),
        Finding(
            "a2",
            "k1 as a loss, 4 updates: at least 10 points below no KL",
            f"accuracy {points(destroyed)}",
            verdict([destroyed], below(destroyed, -10 * POINT), above(destroyed, -10 * POINT)),
        ),
        Finding(
            "b1",
            "k3 in the reward does not regularise: KL above half of no KL's",
            f"KL {factor(kl_k3)}",
            verdict([kl_k3], above(kl_k3, -DOUBLE), below(kl_k3, -DOUBLE)),
        ),
        Finding(
            "b2",
            "k3 in the reward is harmful: at least 5 points below no KL",
            f"accuracy {points(harmed)}",
            verdict([harmed], below(harmed, -5 * POINT), above(harmed, -5 * POINT)),
        ),
        Finding(
            "c",
            "stock k3 beside k2 as a loss: reported, decides nothing here",
            f"KL {factor(runs.effect(runs.log_kl, 'stock:k3', 'k2_as_loss'))}",
            "no verdict",
        ),
        Finding(
            "d1",
            "whole answer against own token: higher pass@16",
            f"pass@16 {points(diverse)}",
            verdict([diverse], above(diverse, 0), below(diverse, 0)),
        ),
        Finding(
            "d2",
            "whole answer against own token: more entropy",
            f"entropy {nats(entropy)}",
            verdict([entropy], above(entropy, 0), below(entropy, 0)),
        ),
        Finding(
            "d3",
            "whole answer against own token: less drift",
            f"KL {factor(drift)}",
            verdict([drift], below(drift, 0), above(drift, 0)),
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


def against_own_token(
    runs: Runs, kl_type: str
) -> tuple[Effect | None, Effect | None, Effect | None]:
    """pass@16, entropy and log KL of a form of whole answers, less those of `k2_as_loss`."""
    return (
        runs.effect(PASS_16.of, kl_type, SAMPLED),
        runs.effect(ENTROPY.of, kl_type, SAMPLED),
        runs.effect(runs.log_kl, kl_type, SAMPLED),
    )


COEFFICIENTS = (0.05, 0.5, 2.0)


def at_equal_kl(runs: Runs) -> Finding:
    """(g): k2 as a loss less stock k3, at the KL that k2 has at 0.5."""

    def line(kl_type: str, seed: int, at: float) -> float | None:
        """Accuracy at a log KL, on the least-squares line through the coefficients' points."""
        rows = [runs.of(kl_type, 4, coef).get(seed) for coef in COEFFICIENTS]
        there = [row for row in rows if row is not None]
        if len(there) < len(COEFFICIENTS):
            return None
        x, y = [runs.log_kl(row) for row in there], [accuracy(row) for row in there]
        slope, start = np.polyfit(x, y, 1)
        return float(start + slope * at)

    differences = []
    for seed, row in sorted(runs.of("k2_as_loss").items()):
        at = runs.log_kl(row)
        ours, stock = line("k2_as_loss", seed, at), line("stock:k3", seed, at)
        if ours is not None and stock is not None:
            differences.append(ours - stock)
    found = effect(differences) if differences else None
    return Finding(
        "g",
        "k2 as a loss and stock k3 at equal KL: alike (2 points)",
        f"accuracy {points(found)}",
        verdict([found], within(found, 2 * POINT), beyond(found, 2 * POINT)),
    )


def exact_findings(runs: Runs) -> list[Finding]:
    """(x) of HYPOTHESES.md: the KL over the vocabulary less the sampled one."""

    def smaller(part: str, what: str, of: Callable[[Row], float], updates: int) -> Finding:
        found = runs.effect(runs.log(of), EXACT, SAMPLED, updates)
        return Finding(
            part,
            f"{updates} updates: a smaller {what}",
            f"{what} {factor(found)}",
            verdict([found], below(found, 0), above(found, 0)),
        )

    return [
        alike(
            "x1",
            "4 updates: alike (5 points, factor 2)",
            runs.effect(accuracy, EXACT, SAMPLED),
            runs.effect(runs.log_kl, EXACT, SAMPLED),
        ),
        smaller("x2", "gradient norm", gradient_norm, 4),
        smaller("x3", "swing of the KL", swing, 16),
        smaller("x4", "swing of the KL", swing, 64),
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
            measured, beyond_noise = "KL of a run that diverged", larger
        else:
            difference = KL.of(one) - KL.of(other)
            error = math.hypot(KL_ERROR.of(one), KL_ERROR.of(other))
            measured = f"KL {difference:+.3g} nats, error {error:.2g} (1 seed)"
            beyond_noise = int(math.copysign(abs(difference) > 2 * error, difference))
        found: tuple[Verdict, ...] = ("not told apart", "as expected", "not as expected")
        return Finding(part, asked, measured, found[sign * beyond_noise])

    return [
        compared("l1", "k1 as a loss ends with more KL than no KL", K1, 1),
        compared("l2", "k2 as a loss ends with less KL than no KL", SAMPLED, -1),
    ]


# The page


def tables(
    runs: Runs,
    kl_types: Sequence[str],
    updates: int,
    kl_coef: float,
    moved: Sequence[Measure] = MOVED,
    able: Sequence[Measure] = ABLE,
) -> list[str]:
    """What each formulation's policy is able to do, and below how far it has moved."""
    first, second = (table(runs, kl_types, updates, kl_coef, of) for of in (able, moved))
    return [*first, "", *second]


def table(
    runs: Runs,
    kl_types: Sequence[str],
    updates: int,
    kl_coef: float,
    measures: Sequence[Measure],
) -> list[str]:
    """A line a formulation: seeds, then each measure's mean with its lowest and highest seed."""
    headings = ["kl_type", "seeds", *(measure.heading for measure in measures)]
    lines = ["| " + " | ".join(headings) + " |", "| --- |" + " --- |" * (len(headings) - 1)]
    for kl_type in kl_types:
        rows = list(runs.of(kl_type, updates, kl_coef).values())
        diverged = sum(row["status"] == "diverged" for row in rows)
        seeds = f"{len(rows)}" + (f", {diverged} diverged" if diverged else "")
        values = (mean_and_range([m.of(row) for row in rows], m.form) for m in measures)
        lines.append(f"| `{kl_type}` | {seeds} | " + " | ".join(values) + " |")
    return lines


def exact_lines(rows: Sequence[Row], beside: Runs) -> list[str]:
    """The section on `grids/exact.yaml`; k2 with 4 updates is tier 1's."""
    runs = Runs([*rows, *beside.of(SAMPLED).values()])
    moved = [*(m for m in MOVED if m.heading != "tokens"), SWING, CPU_SECONDS]
    lines = ["## The exact KL beside the sampled one", "", *ON_EXACT.splitlines(), ""]
    lines += verdict_table(exact_findings(runs))
    for updates in sorted({row["settings"]["updates"] for row in rows}):
        lines += ["", f"With {updates} updates per rollout:", ""]
        lines += tables(runs, (SAMPLED, EXACT), updates, 0.5, moved)
    return [*lines, "", *provenance(rows), "", *missing_lines("exact", rows)]


def language_lines(rows: Sequence[Row]) -> list[str]:
    """The section on `grids/smollm2.yaml`."""
    runs = Runs(rows)
    able, moved = (ACCURACY, GREEDY, pass_at(4)), (KL, KL_ERROR, *MOVED[1:])
    lines = ["## A language model", "", *ON_LANGUAGE.splitlines(), "", start_line(rows, able), ""]
    lines += [*verdict_table(language_findings(runs)), ""]
    lines += [*tables(runs, ("none", K1, SAMPLED), 4, 0.5, moved, able), ""]
    return [*lines, *provenance(rows), "", *missing_lines("smollm2", rows)]


def tally_line(found: Sequence[Finding]) -> str:
    """How often each verdict was reached, a negative one as plainly as a positive one."""
    counts = Counter(finding.verdict for finding in found if finding.verdict != "no verdict")
    told = [f"{count} {word}" for word in ORDER_OF_VERDICTS if (count := counts[word])]
    total = sum(counts.values())
    return f"Of {total} predictions that were written before the runs: {', '.join(told)}."


def verdict_table(found: Sequence[Finding]) -> list[str]:
    return [
        "| | hypothesis | measured | verdict |",
        "| --- | --- | --- | --- |",
        *(f"| {f.part} | {f.asked} | {f.measured} | **{f.verdict}** |" for f in found),
    ]


def short_table(runs: Runs) -> str:
    """README's: accuracy and KL of each formulation, lowest and highest seed; how verdicts fell."""
    lines = [
        "| `kl_type` | seeds | accuracy | KL(pi‖ref), nats per answer |",
        "| --- | --- | --- | --- |",
    ]
    for kl_type in ORDER:
        rows = list(runs.of(kl_type).values())
        values = (mean_and_range([m.of(row) for row in rows], m.form) for m in (ACCURACY, KL))
        lines.append(f"| `{kl_type}` | {len(rows)} | {' | '.join(values)} |")
    return "\n".join(["", *lines, "", tally_line(findings(runs)), "", ""])


def start_line(rows: Sequence[Row], able: Sequence[Measure]) -> str:
    """What all runs start from."""
    start = {**rows[0], "status": "done", "evaluations": rows[0]["evaluations"][:1]}
    measured = (f"{m.heading} {m.form.format(m.of(start))}" for m in (*able, ENTROPY, TOKENS))
    return f"The policy before training: {', '.join(measured)}."


def missing_lines(name: str, rows: Sequence[Row]) -> list[str]:
    """The seeds of a grid that are not there, a line a formulation; empty where all are."""
    lost_seeds: dict[str, list[int]] = {}
    for run in missing(load(name), rows):
        coef = "" if run.kl_coef is None else f", kl_coef {run.kl_coef:g}"
        asked = f"`{run.kl_type}`{coef}, {run.updates} update{'s' * (run.updates > 1)}"
        lost_seeds.setdefault(asked, []).append(run.seed)
    if not lost_seeds:
        return []
    lines = (
        f"- {asked}: seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        for asked, seeds in lost_seeds.items()
    )
    return [f"Runs of the grid `{name}` that were not made yet:", "", *lines, ""]


def made_with(cells: Sequence[Row]) -> list[str]:
    """Versions and hours of the enumerable task's settings."""
    versions = Counter((cell["klplug"], cell["torch"], cell["seeds"]) for cell in cells)
    hours = sum(cell["process_seconds"] for cell in cells) / 3600
    return [
        *(
            f"- {count} settings of {seeds} seeds with klplug {klplug}, torch {torch}"
            for (klplug, torch, seeds), count in versions.most_common()
        ),
        f"- {hours:.1f} CPU-hours",
    ]


def frozen(row: Row) -> tuple[tuple[str, Any], ...]:
    """A row's machine, to be counted."""
    gpus = tuple(row["machine"]["gpus"] or ())
    return tuple({**row["machine"], "gpus": gpus}.items())


def provenance(rows: Sequence[Row]) -> list[str]:
    """Commits, versions, machines and hours of the rows; the most frequent first."""
    commits = Counter((row["commit"], row["changed"]) for row in rows)
    lines = []
    for (commit, changed), count in commits.most_common():
        label = ", with changes that were not committed" if changed else ""
        lines.append(f"- {count} runs of commit `{(commit or 'unknown')[:12]}`{label}")
    versions = Counter(tuple(sorted(row["versions"].items())) for row in rows)
    for found, count in versions.most_common():
        lines.append(f"- {count} runs with {', '.join(f'{k} {v}' for k, v in found)}")
    for machine, count in Counter(map(frozen, rows)).most_common():
        held = dict(machine)
        lines.append(
            f"- {count} runs on {held['cpu']}, {held['cores']} cores, {held['memory_gib']:g} GiB, "
            f"{', '.join(held['gpus']) if held['gpus'] else 'no GPU'}"
        )
    hours = sum(map(seconds_of, rows)) / 3600
    cpu = sum(row["cpu_seconds"] for row in rows) / 3600
    load = [row["load"]["before"] for row in rows]
    lines.append(
        f"- {cpu:.1f} CPU-hours, {hours:.1f} hours of runs; the machine's load was "
        f"{min(load):.1f} to {max(load):.1f} (other work beside it)"
    )
    return lines


def told_lines(found: Sequence[Finding]) -> list[str]:
    """A paragraph for each hypothesis: what was asked, and what came out on both tasks."""
    parts, lines = {finding.part: finding for finding in found}, []
    for letter, told in TOLD.items():
        host = " ".join(sentence(parts[part], *sentences) for part, sentences in told.parts.items())
        if not host and letter != "c":
            host = NOT_TRIED
        text = f"**({letter}) {told.title}.** {told.asked}"
        text += f" *On the host*: {host}" if host else ""
        lines += [*wrapped(f"{text} *On the enumerable task*: {told.enumerable}"), ""]
    return lines


def sentence(found: Finding, reproduced: str, opposite: str, undecided: str) -> str:
    if found.verdict == "not decided yet":
        return f"{found.part} has too few runs yet."
    said = {"reproduced": reproduced, "not reproduced": opposite}.get(found.verdict, undecided)
    return said.format(found.measured.partition(",")[0])


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)


COMPARISONS = re.compile(
    r"<!-- verdicts (?P<study>[a-h]) -->\n(?P<table>.*?)<!-- end -->", re.DOTALL
)


def enumerable_lines(closed_form: str) -> list[str]:
    """How many comparisons hold, fail and are not decided, from the page that has them all."""
    lines = ["| | hypothesis | holds | fails | not decided |", "| --- | --- | --- | --- | --- |"]
    for match in COMPARISONS.finditer(closed_form):
        told, table = TOLD[match["study"]], match["table"]
        counts = (
            len(re.findall(rf"\| {word} \|$", table, re.MULTILINE))
            for word in ("holds", "fails", "not decided")
        )
        name = f"[{told.title}](closed-form.md#{told.anchor})"
        lines.append(f"| {match['study']} | {name} | {' | '.join(map(str, counts))} |")
    return lines


def page(
    rows: Sequence[Row],
    exact: Sequence[Row] = (),
    language: Sequence[Row] = (),
    closed_form: str = "",
    cells: Sequence[Row] = (),
) -> str:
    """The page's text.

    Args:
        rows: Of tier 1, any number.
        exact: Of the grid `exact`, any number; without one there is no section on it.
        language: Of the grid `smollm2`, the same.
        closed_form: The text of docs/closed-form.md, for its counts.
        cells: The lines of results/enumerable.jsonl.
    """
    runs = Runs(rows)
    found = findings(runs)
    lines = [
        "<!-- Made by `python -m recipes.reproduce.page` from recipes/reproduce/results. -->",
        "",
        "# Evidence",
        "",
        *INTRODUCTION.splitlines(),
        "",
        *FORMULATIONS.splitlines(),
        "",
        *READ.splitlines(),
        "",
        "## Verdicts on the host",
        "",
        tally_line(found),
        "",
        *verdict_table(found),
        "",
        *RULE.splitlines(),
        "",
        "## Verdicts on the enumerable task",
        "",
        *ENUMERATED.splitlines(),
        "",
        *enumerable_lines(closed_form),
        "",
        "## What came out, in words",
        "",
        *told_lines(found),
        "## Tier 1: seven formulations, kl_coef 0.5, 4 updates per rollout",
        "",
    ]
    if rows:
        lines += tier1_lines(rows)
    else:
        lines += ["No run was made yet.", ""]
    if exact:
        lines += exact_lines(exact, runs)
    if language:
        lines += language_lines(language)
    if rows and (absent := missing_lines("tier1", rows)):
        lines += ["## Missing", "", *absent]
    if rows:
        lines += ["## Made with", "", "Tier 1:", "", *provenance(rows), ""]
    if cells:
        lines += ["The enumerable task:", "", *made_with(cells), ""]
    return "\n".join([*lines, *HOW.splitlines(), ""])


def tier1_lines(rows: Sequence[Row]) -> list[str]:
    """The tables of `grids/tier1.yaml`, and its two figures."""
    runs = Runs(rows)
    lines = [
        start_line(rows, CORRECT),
        "",
        *tables(runs, ORDER, 4, 0.5),
        "",
        *COLUMNS.splitlines(),
        "",
        "![Reward of the rollouts; accuracy and KL of the saved policies](img/evidence-runs.svg)",
        "",
        "![Accuracy against KL at the end of each run](img/evidence-frontier.svg)",
        "",
    ]
    if any(row["settings"]["updates"] == 1 for row in rows):
        lines += ["## One update per rollout", "", *tables(runs, ("none", K1), 1, 0.5), ""]
    for coef in COEFFICIENTS:
        if coef != 0.5 and (runs.of(SAMPLED, 4, coef) or runs.of("stock:k3", 4, coef)):
            lines += [f"## kl_coef {coef:g}, 4 updates per rollout", ""]
            lines += [*tables(runs, ("stock:k3", SAMPLED), 4, coef), ""]
    return lines


# Figures


def figures(rows: Sequence[Row], folder: Path) -> None:
    """SVG, the same bytes for the same rows, for a light and a dark page."""
    import matplotlib

    for name, draw in (("evidence-runs", curves_of_runs), ("evidence-frontier", frontier)):
        with matplotlib.rc_context(plots.settings(name)):
            picture = plots.standalone(plots.text_of(draw(Runs(rows)), name))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.svg").write_text(picture, "utf-8")


def curves_of_runs(runs: Runs) -> "Figure":
    """Reward, accuracy and KL along the runs."""
    from matplotlib.figure import Figure

    colour = dict(zip(ORDER, COLOURS, strict=True))
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    reward, correct, drift = figure.subplots(1, 3)
    for kl_type in ORDER:
        there = list(runs.of(kl_type).values())
        style = {"color": colour[kl_type], "linewidth": 1.6}
        curve(reward, there, style, kl_type, rewards)
        curve(correct, there, style, kl_type, along("sampled_accuracy"))
        # At the start it is 0, which a logarithmic axis has no place for.
        curve(drift, there, style, kl_type, along("kl_nats_per_answer", first=1))
    drift.set_yscale("log")
    logarithmic(drift.yaxis)
    for axes, title in (
        (reward, "reward of the rollouts"),
        (correct, "accuracy, held-out problems"),
        (drift, "KL(pi‖ref), nats per answer"),
    ):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("rollout")
        axes.grid(alpha=0.3)
    handles, labels = reward.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def frontier(runs: Runs) -> "Figure":
    """Accuracy against KL at the end of each run."""
    from matplotlib.figure import Figure

    colour = dict(zip(ORDER, COLOURS, strict=True))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    kl = end("kl_nats_per_answer")
    for kl_type in ORDER:
        there = [row for coef in COEFFICIENTS for row in runs.of(kl_type, 4, coef).values()]
        there = list({id(row): row for row in there if row["status"] == "done"}.values())
        size = [20 + 30 * (row["settings"]["kl_coef"] or 0.0) for row in there]
        x, y = [kl(row) for row in there], [accuracy(row) for row in there]
        axes.scatter(x, y, s=size, color=colour[kl_type], label=kl_type, alpha=0.8)
    axes.set_xscale("log")
    logarithmic(axes.xaxis)
    axes.set_xlabel("KL(pi‖ref), nats per answer")
    axes.set_ylabel("accuracy")
    axes.set_title("the end of each run with 4 updates; larger dots: larger kl_coef", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def logarithmic(axis: Any) -> None:
    """Ticks at 1, 2 and 5 of each decade, written as they are read."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


Curve = tuple[list[float], list[float]]


def rewards(row: Row) -> Curve:
    values = [math.nan if value is None else value for value in row["training"]["reward"]]
    return list(range(1, len(values) + 1)), values


def along(name: str, first: int = 0) -> Callable[[Row], Curve]:
    """A measure of the policies that were saved along the run, from the `first` on."""

    def of(row: Row) -> Curve:
        there = [found for found in row["evaluations"][first:] if found.get(name) is not None]
        return [found["step"] for found in there], [found[name] for found in there]

    return of


def curve(
    axes: Any, rows: Sequence[Row], style: dict[str, Any], label: str, of: Callable[[Row], Curve]
) -> None:
    """Each seed thin; their mean, where all have a value, thick."""
    curves = [of(row) for row in rows]
    for x, y in curves:
        axes.plot(x, y, color=style["color"], linewidth=0.6, alpha=0.35)
    if not curves:
        return
    common = sorted(set.intersection(*(set(x) for x, _ in curves)))
    means = [np.mean([dict(zip(x, y, strict=True))[step] for x, y in curves]) for step in common]
    axes.plot(common, means, label=label, **style)


def rows_of(name: str, folder: Path) -> list[Row]:
    """Of a grid's results, `NAME.jsonl` and files that begin so; each a run of the grid, once.

    Raises:
        DriveError: A row is of another form, of no run of the grid, or of one that is there.
    """
    grid, rows = load(name), []
    for path in sorted(folder.glob(f"{name}*.jsonl")):
        for place, row in enumerate(read_rows(path), start=1):
            run = next((run for run in grid.runs if is_of(row, run, grid)), None)
            if run is None:
                raise DriveError(f"{path}, line {place}: the grid {name} has no such run")
            if any(is_of(other, run, grid) for other in rows):
                raise DriveError(f"{path}, line {place}: a second row of {shown(run)}")
            rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="docs/evidence.md from the committed rows.")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of tier1*.jsonl and so on"
    )
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--images", type=Path, default=IMAGES)
    parser.add_argument("--readme", type=Path, default=README)
    arguments = parser.parse_args(argv)
    if not arguments.results.is_dir():
        parser.error(f"--results {arguments.results}: no such folder")
    try:
        rows, exact, language = (
            rows_of(name, arguments.results) for name in ("tier1", "exact", "smollm2")
        )
    except DriveError as error:
        print(f"page: error: {error}", file=sys.stderr)
        return 2
    closed_form = CLOSED_FORM.read_text("utf-8")
    enumerated = arguments.results / "enumerable.jsonl"
    lines = enumerated.read_text("utf-8").splitlines() if enumerated.is_file() else []
    cells = [json.loads(line) for line in lines]
    arguments.page.write_text(page(rows, exact, language, closed_form, cells), "utf-8")
    if rows:
        figures(rows, arguments.images)
        text = arguments.readme.read_text("utf-8")
        made = IN_README.sub(lambda _: short_table(Runs(rows)), text)
        arguments.readme.write_text(made, "utf-8")
    print(f"{arguments.page}: {len(rows) + len(exact) + len(language)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
