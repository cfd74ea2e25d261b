"""The figures of docs/evidence.md, docs/closed-form.md and docs/gradient-study.md.

Each is an SVG for a light and a dark page, the same bytes for the same rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from klplug.report import plots
from recipes.reproduce import gradient_study
from recipes.reproduce.enumerable import BOUNDED, GRID, K1, OWN, WHOLE
from recipes.reproduce.enumerable_verdicts import Results
from recipes.reproduce.measures import ACCURACY, COEFFICIENTS, KL, Runs

if TYPE_CHECKING:
    from recipes.reproduce.drive import Row

Curve = tuple[list[float], list[float]]

SMALL = {"font.size": 9}
# Colours that are told apart without seeing all of them (Okabe and Ito).
OF_TIER_1 = {
    "none": plots.INK,
    K1: "#d55e00",
    "stock:k3": "#e69f00",
    "k3_in_reward": "#cc79a7",
    "k1_in_reward": "#0072b2",
    OWN: "#009e73",
    WHOLE: "#56b4e9",
}
OF_CLOSED_FORM = {
    "none": "0.6",
    K1: "tab:brown",
    "k3_in_reward": "tab:red",
    "k2_in_reward": "tab:pink",
    "k3_as_loss": "tab:orange",
    "stock:verl:k3": "tab:olive",
    OWN: "tab:blue",
    "k1_in_reward": "tab:cyan",
    WHOLE: "tab:green",
}
GRADIENT_LINES = {
    gradient_study.EXACT: ("LOC", plots.INK, "-"),
    OWN: ("LOC", "tab:blue", "-"),
    BOUNDED: ("LOC", "tab:purple", "-"),
    "k3_as_loss": ("LOC", "tab:orange", "-"),
    "stock:verl:k3": ("LOC", "tab:olive", "--"),
    "stock:openrlhf:k2": ("LOC", "tab:gray", "--"),
    WHOLE: ("FULL", "tab:green", "-"),
    "k2_in_reward": ("FULL", "tab:pink", "-"),
    "k3_in_reward": ("FULL", "tab:red", "-"),
    K1: ("LOC", "tab:brown", "-"),
}


@contextmanager
def drawn(file: Path, size: tuple[float, float], **settings: Any) -> Iterator[Figure]:
    """A figure that is written when it is drawn."""
    with matplotlib.rc_context({**plots.settings(file.stem), **settings}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        file.write_text(plots.standalone(plots.text_of(figure, file.stem)), "utf-8")


def numbered(axis: Axis) -> None:
    """A logarithmic axis, whose ticks are then written as they are read."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


# docs/evidence.md


def runs_figure(runs: Runs, file: Path) -> None:
    """Reward, accuracy and KL along the runs."""
    with drawn(file, (10, 3.6)) as figure:
        reward, correct, drift = figure.subplots(1, 3)
        for kl_type in OF_TIER_1:
            rows = list(runs.of(kl_type).values())
            curve(reward, rows, kl_type, rewards)
            curve(correct, rows, kl_type, along("sampled_accuracy"))
            # At the start it is 0, which a logarithmic axis has no place for.
            curve(drift, rows, kl_type, along("kl_nats_per_answer", first=1))
        drift.set_yscale("log")
        drift.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        numbered(drift.yaxis)
        for axes, title in (
            (reward, "reward of the rollouts"),
            (correct, "accuracy, held-out problems"),
            (drift, "KL(pi‖ref), nats per answer"),
        ):
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("rollout")
            axes.grid(alpha=0.3)
        legend = reward.get_legend_handles_labels()
        figure.legend(*legend, loc="outside lower center", ncols=4, fontsize=8)


def rewards(row: Row) -> Curve:
    values = [math.nan if value is None else value for value in row["training"].get("reward", [])]
    return list(range(1, len(values) + 1)), values


def along(name: str, first: int = 0) -> Callable[[Row], Curve]:
    """A measure of the policies that were saved along the run, from the `first` on."""

    def of(row: Row) -> Curve:
        there = [found for found in row["evaluations"][first:] if found.get(name) is not None]
        return [found["step"] for found in there], [found[name] for found in there]

    return of


def curve(axes: Axes, rows: Sequence[Row], kl_type: str, of: Callable[[Row], Curve]) -> None:
    """Each seed thin; their mean, where all have a value, thick."""
    if not rows:
        return
    colour = OF_TIER_1[kl_type]
    for row in rows:
        axes.plot(*of(row), color=colour, linewidth=0.6, alpha=0.35)
    seeds = [dict(zip(*of(row), strict=True)) for row in rows]
    steps = sorted(set.intersection(*map(set, seeds)))
    means = [statistics.fmean(seed[step] for seed in seeds) for step in steps]
    axes.plot(steps, means, label=kl_type, color=colour, linewidth=1.6)


def frontier_figure(runs: Runs, file: Path) -> None:
    """Accuracy against KL at the end of each run."""
    with drawn(file, (7, 4)) as figure:
        axes = figure.subplots()
        for kl_type, colour in OF_TIER_1.items():
            coefs = (0.5,) if kl_type == "none" else COEFFICIENTS
            rows = [row for coef in coefs for row in runs.of(kl_type, 4, coef).values()]
            rows = [row for row in rows if row["status"] == "done"]
            size = [20 + 30 * (row["settings"]["kl_coef"] or 0.0) for row in rows]
            x, y = list(map(KL.of, rows)), list(map(ACCURACY.of, rows))
            axes.scatter(x, y, s=size, color=colour, label=kl_type, alpha=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        numbered(axes.xaxis)
        axes.set(xlabel="KL(pi‖ref), nats per answer", ylabel="accuracy")
        told = "the end of each run with 4 updates; larger dots: larger kl_coef"
        axes.set_title(told, fontsize=10)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize=8)


# docs/closed-form.md and docs/gradient-study.md


def closed_form_figure(results: Results, file: Path) -> None:
    where = {
        "to_optimum": "to pi* = ref exp(r/beta)/Z",
        "to_myopic": "to the myopic policy",
        "to_forward": "to the forward policy",
    }
    with drawn(file, (11, 3.6), **SMALL) as figure:
        panels = figure.subplots(1, 3, sharey=True)
        for panel, (name, title) in zip(panels, where.items(), strict=True):
            for cell in (c for c in GRID if c.study == "closed"):
                line, colour = results.line(cell), OF_CLOSED_FORM[cell.kl_type]
                low, middle, high = zip(*line["curve"][name], strict=True)
                panel.plot(line["at"], middle, color=colour, label=cell.kl_type, linewidth=1.4)
                panel.fill_between(line["at"], low, high, color=colour, alpha=0.12, lw=0)
            panel.set(yscale="log", xlabel="update", title=f"KL {title}")
            numbered(panel.yaxis)
        panels[0].set(ylabel="nats per answer")
        beside(figure, panels[0])


def gradient_figure(lines: Sequence[dict[str, Any]], file: Path) -> None:
    policies = list(dict.fromkeys(line["policy"] for line in lines))
    with drawn(file, (11, 3.8), **SMALL) as figure:
        panels = figure.subplots(1, len(policies), sharey=True)
        for panel, policy in zip(panels, policies, strict=True):
            here = {line["form"]: line for line in lines if line["policy"] == policy}
            for form, (target, colour, style) in GRADIENT_LINES.items():
                cosines = here[form][target]["cosine"]
                sizes = [int(n) for n in cosines]
                low, middle, high = zip(*cosines.values(), strict=True)
                name = f"{form} ({target})"
                panel.plot(sizes, middle, style, color=colour, marker=".", label=name)
                panel.fill_between(sizes, low, high, color=colour, alpha=0.12, lw=0)
            panel.axhline(1, color="#808080", alpha=0.4, linewidth=0.8)
            kl = here[OWN]["kl_per_answer"]
            title = f"fine-tuned {policy}: KL {kl:.2g} nats"
            panel.set(xscale="log", xlabel="answers", title=title)
            panel.set_xticks(sizes, [str(n) for n in sizes])
            panel.minorticks_off()
        panels[0].set(ylabel="cosine with the exact gradient")
        beside(figure, panels[0])


def beside(figure: Figure, panel: Axes) -> None:
    """One panel's legend, for all of them."""
    names = panel.get_legend_handles_labels()
    figure.legend(*names, loc="outside right center", fontsize=8)
