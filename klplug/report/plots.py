"""The pictures, as SVG whose text and axes take the colour of the page around them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from klplug.report.closed_form import ClosedForm
from klplug.report.intervals import Final
from klplug.report.runs import Group, Metric, Series, rolling_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by most colour-blind readers; then again, dashed. The page's
# own colour stands for their black, which a dark page would swallow.
INK = "#010203"
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK, "#999999",
)  # fmt: skip
LINES = ("-", "--", ":", "-.")
WIDTH, HEIGHT = 5.6, 3.4  # inches
APART = 30.0  # largest over smallest from which on an axis is logarithmic


def style(index: int) -> tuple[str, str]:
    """A run's colour and kind of line."""
    return COLOURS[index % len(COLOURS)], LINES[index // len(COLOURS) % len(LINES)]


def settings(name: str) -> dict[Any, Any]:
    """Matplotlib's, for a picture whose identifiers are its own by ``name``."""
    inked = ("text.color", "xtick.color", "ytick.color", "axes.edgecolor", "axes.labelcolor")
    return {
        **dict.fromkeys((*inked, "axes.titlecolor"), INK),
        "axes.formatter.limits": (-4, 5),
        "axes.formatter.useoffset": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.family": "sans-serif",
        "legend.frameon": False,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": name,
        "text.parse_math": False,  # a tag with a dollar in it is no formula
    }


def svg(name: str, draw: Callable[[Axes], None]) -> str:
    """A picture of one pair of axes, to stand inside of a page."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(settings(name)):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        axes.grid(color="#808080", alpha=0.2)
        axes.set_axisbelow(True)
        draw(axes)
        return text_of(figure, name)


def text_of(figure: Figure, name: str) -> str:
    """A figure, made under ``settings(name)``, as SVG."""
    made = StringIO()
    figure.savefig(made, format="svg", transparent=True, metadata={"Date": None})
    text = made.getvalue()[made.getvalue().index("<svg") :]
    # Identifiers are the page's: no two pictures may share one.
    own = re.sub(r"[^a-z0-9]", "-", name.lower())
    text = re.sub(r'(id="|xlink:href="#|url\(#)', rf"\g<1>{own}-", text)
    return text.replace(INK, "currentColor")


def standalone(picture: str) -> str:
    """A picture as a file of its own, light or dark as its reader's screen is."""
    style = (
        "<style>svg { color: #222; background: #fff }"
        "@media (prefers-color-scheme: dark) { svg { color: #ddd; background: #16181c } }</style>"
    )
    return picture.replace(">", f">{style}", 1) + "\n"


def curves(metric: Metric, found: Sequence[Group]) -> str:
    """One metric over the steps, a line per group, a band from its lowest to its highest seed."""

    def draw(axes: Axes) -> None:
        for index, group in enumerate(found):
            if seeds := group.series(metric.name):
                _curve(axes, seeds, metric.steps, *style(index))
        axes.set_title(metric.title, fontsize=10)
        axes.set_xlabel("step")
        every = [
            value
            for group in found
            for series in group.series(metric.name)
            for value in rolling_mean(series, metric.steps).values()
            if math.isfinite(value)
        ]
        _set_scale(axes, metric, every)

    return svg(metric.name, draw)


def _set_scale(axes: Axes, metric: Metric, values: Sequence[float]) -> None:
    """Shares on [0, 1]; a KL, and whatever spans decades, logarithmic: one run hides no other."""
    low, high = metric.bounds
    if math.isfinite(low) and math.isfinite(high):
        # A cosine shows its negative half only where it goes there.
        low = low if min(values, default=0.0) < 0 else max(low, 0.0)
        margin = 0.03 * (high - low)
        axes.set_ylim(low - margin, high + margin)
        return
    sizes = sorted(abs(value) for value in values if value != 0)
    if not sizes:
        return
    typical = sizes[len(sizes) // 2]
    if metric.kl and min(values) > 0 and sizes[-1] > APART * sizes[0]:
        axes.set_yscale("log")
    elif sizes[-1] > APART * typical:
        axes.set_yscale("symlog", linthresh=typical)
        if sizes[-1] < 100 * typical:  # else a tick of each decade is enough
            from matplotlib.ticker import SymmetricalLogLocator

            axes.yaxis.set_major_locator(
                SymmetricalLogLocator(base=10, linthresh=typical, subs=(1, 2, 5))
            )
    else:
        return
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def _curve(axes: Axes, seeds: Sequence[Series], width: int, colour: str, line: str) -> None:
    if len(seeds) == 1 and width > 1:
        (series,) = seeds
        axes.plot(list(series), list(series.values()), ".", color=colour, alpha=0.25, markersize=4)
    smooth = [rolling_mean(series, width) for series in seeds]
    steps = sorted({step for series in smooth for step in series})
    at = {step: [s[step] for s in smooth if math.isfinite(s.get(step, math.nan))] for step in steps}
    steps = [step for step in steps if at[step]]
    means = [sum(at[step]) / len(at[step]) for step in steps]
    axes.plot(
        steps, means, line, color=colour, linewidth=1.6, marker="." if len(steps) == 1 else ""
    )
    if len(seeds) > 1:
        low, high = ([edge(at[step]) for step in steps] for edge in (min, max))
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)


def frontier(
    found: Sequence[Group],
    finals: dict[str, dict[str, Final]],
    best: ClosedForm | None = None,
) -> str:
    """Reward against KL: each run on its way, and where it ended; beside it what is possible."""

    def draw(axes: Axes) -> None:
        every: list[float] = []
        for index, group in enumerate(found):
            colour, line = style(index)
            name, ended = group.kl_name, finals[group.label]
            if name is None:
                continue
            for run in group.runs:
                kl, reward = (
                    rolling_mean(run.metrics.get(metric, {}), Metric.steps)
                    for metric in (name, "reward")
                )
                shared = [
                    step
                    for step in sorted(kl.keys() & reward.keys())
                    if math.isfinite(kl[step]) and math.isfinite(reward[step])
                ]
                path = [kl[step] for step in shared], [reward[step] for step in shared]
                axes.plot(*path, line, color=colour, alpha=0.5, linewidth=1)
                every += path[0]
            if name in ended and "reward" in ended:
                x, y = ended[name], ended["reward"]
                # No estimate of these is of a KL below zero, and no bar goes there.
                low = max(x.low, 0.0) if x.mean > 0 else x.low
                # The mean of equal values may round to beside them.
                axes.errorbar(
                    x.mean,
                    y.mean,
                    xerr=[[max(x.mean - low, 0.0)], [max(x.high - x.mean, 0.0)]],
                    yerr=[[max(y.mean - y.low, 0.0)], [max(y.high - y.mean, 0.0)]],
                    fmt="o",
                    color=colour,
                    capsize=3,
                )
        if best is not None:
            possible = [p.kl for p in best.frontier], [p.reward for p in best.frontier]
            axes.plot(*possible, "--", color=INK, linewidth=1, label="ref exp(r/beta)/Z")
            sampled = [p.kl for p in best.best_of], [p.reward for p in best.best_of]
            axes.plot(*sampled, "x", color=INK, markersize=5, label="best of N")
            for point in best.best_of:
                axes.annotate(f" {point.n}", (point.kl, point.reward), color=INK, fontsize=8)
            axes.legend(labelcolor=INK, fontsize=8, loc="lower right")
            every += possible[0]
        axes.set_title("reward against KL", fontsize=10)
        axes.set(xlabel="KL to the reference, nats per token", ylabel="reward")
        positive = sorted(value for value in every if value > 0)
        if positive and positive[-1] > APART * positive[len(positive) // 2]:
            axes.set_xscale("symlog", linthresh=positive[len(positive) // 2])
            axes.xaxis.set_major_formatter("{x:g}")

    return svg("frontier", draw)
