"""The page: one HTML file that needs no other, and the same pictures as PNGs beside it."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import klplug
from klplug.report.intervals import LEAST, SHARE, Final, final
from klplug.report.runs import (
    KL_ORDER,
    METRICS,
    TITLES,
    Group,
    NoLogs,
    Series,
    groups,
    rolling_mean,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by most colour-blind readers; then again, dashed.
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999",
)  # fmt: skip
LINES = ("-", "--", ":", "-.")
WIDTH, HEIGHT = 5.6, 3.5  # inches, of one plot
WINDOW = 5  # logged steps that a line is the mean of
PAGE = "report.html"
HEADINGS = {
    "kl_k1": "KL to the reference, nats per token: k1",
    "kl_k2": "KL to the reference, nats per token: k2",
    "kl_k3": "KL to the reference, nats per token: k3",
    "kl_abs": "KL to the reference, nats per token: abs",
    "kl_host": "the host's own KL",
    "ess": "effective sample size of the weights",
    "capped_share": "share of weights at the cap",
    "cosine": "cosine of the KL's coefficients to the principled ones",
    "top_share": "share of the KL's gradient from the top 1 % of tokens",
    "frontier": "reward against KL",
}
PANELS = tuple(dict.fromkeys(metric.panel for metric in METRICS))


@dataclass(frozen=True)
class Report:
    """What was written, and what could not be read."""

    page: Path
    pictures: dict[str, Path]
    groups: list[Group]
    finals: dict[str, dict[str, Final]]
    problems: list[str]


def report(folders: Sequence[Path], out: Path) -> Report:
    """Write ``report.html`` and its PNGs into ``out`` from the logs in ``folders``.

    Runs that differ in their seed alone make one line with a band.

    Raises:
        NoLogs: a folder has no log, or nothing in any log could be read.
        OSError: ``out`` can't be written.
    """
    found, problems = groups(folders)
    if not found:
        raise NoLogs("no run could be read:\n  " + "\n  ".join(problems))
    finals = {
        group.label: {
            metric.name: value
            for metric in METRICS
            if (value := final(group.series(metric.name))) is not None
        }
        for group in found
    }
    drawn: dict[str, bytes] = {}
    for panel in PANELS:
        names = [metric.name for metric in METRICS if metric.panel == panel]
        present = [name for name in names if any(group.series(name) for group in found)]
        if present:
            drawn[panel] = _curves(found, present)
    if any(_kl_name(group) and group.series("reward") for group in found):
        drawn["frontier"] = _frontier(found, finals)
    out.mkdir(parents=True, exist_ok=True)
    pictures = {name: out / f"{name}.png" for name in drawn}
    for name, path in pictures.items():
        path.write_bytes(drawn[name])
    page = out / PAGE
    page.write_text(_page(found, finals, drawn, problems), encoding="utf-8")
    return Report(page, pictures, found, finals, problems)


def _style(index: int) -> tuple[str, str]:
    return COLOURS[index % len(COLOURS)], LINES[index // len(COLOURS) % len(LINES)]


def _png(rows: int, columns: int, draw: Callable[[list[Axes]], None]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(color="0.92")
        one.set_axisbelow(True)
    draw(axes)
    buffer = BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    return buffer.getvalue()


def _curves(found: Sequence[Group], names: Sequence[str]) -> bytes:
    def draw(axes: list[Axes]) -> None:
        for one, name in zip_longest(axes, names):
            if name is None:
                one.remove()
                continue
            for index, group in enumerate(found):
                if seeds := group.series(name):
                    _curve(one, seeds, *_style(index))
            one.set_title(HEADINGS.get(name, TITLES[name]), fontsize=10)
            one.set_xlabel("step")

    columns = min(len(names), 2)
    return _png(-(-len(names) // columns), columns, draw)


def _curve(axes: Axes, seeds: Sequence[Series], colour: str, line: str) -> None:
    if len(seeds) == 1:
        (series,) = seeds
        axes.plot(list(series), list(series.values()), ".", color=colour, alpha=0.25, markersize=4)
    smooth = [rolling_mean(series, WINDOW) for series in seeds]
    steps = sorted({step for series in smooth for step in series})
    at = {step: [s[step] for s in smooth if math.isfinite(s.get(step, math.nan))] for step in steps}
    steps = [step for step in steps if at[step]]
    means = [sum(at[step]) / len(at[step]) for step in steps]
    axes.plot(steps, means, line, color=colour, linewidth=1.6)
    if len(seeds) > 1:
        low, high = ([edge(at[step]) for step in steps] for edge in (min, max))
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)


def _kl_name(group: Group) -> str | None:
    return next((name for name in KL_ORDER if group.series(name)), None)


def _frontier(found: Sequence[Group], finals: dict[str, dict[str, Final]]) -> bytes:
    def draw(axes: list[Axes]) -> None:
        (one,) = axes
        for index, group in enumerate(found):
            colour, line = _style(index)
            kl_name = _kl_name(group)
            if kl_name is None:
                continue
            for run in group.runs:
                kl, reward = (
                    rolling_mean(run.metrics.get(name, {}), WINDOW) for name in (kl_name, "reward")
                )
                shared = sorted(kl.keys() & reward.keys())
                one.plot(
                    [kl[s] for s in shared],
                    [reward[s] for s in shared],
                    line,
                    color=colour,
                    alpha=0.35,
                    linewidth=1,
                )
            ended = finals[group.label]
            if kl_name in ended and "reward" in ended:
                one.errorbar(
                    ended[kl_name].mean,
                    ended["reward"].mean,
                    xerr=ended[kl_name].half_width,
                    yerr=ended["reward"].half_width,
                    fmt="o",
                    color=colour,
                    capsize=3,
                )
        one.set_title(HEADINGS["frontier"], fontsize=10)
        one.set(xlabel="KL to the reference, nats per token", ylabel="reward")

    return _png(1, 1, draw)


# ── HTML ────────────────────────────────────────────────────────────────────────────────────────

NOTES = {
    "kl": "k1 and k3 are unbiased under samples of the policy, k2 and abs are not; the host's own "
    "is the value of whatever estimator its settings chose.",
    "ess": "Of the importance weights, as a share of the tokens: 1 where all count the same.",
    "frontier": "A line is a run on its way, a dot with bars where it ended. Higher at the same "
    "KL is better. The KL is k3's estimate, or the host's own where there is no k3.",
}

_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto;
  max-width: 1120px; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.folder { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.swatch { display: inline-block; width: 1.6em; border-top: 3px; margin-right: .5em;
  vertical-align: middle; }
.legend { position: sticky; top: 0; background: #fffd; padding: .5rem 0; }
.legend span.run { margin-right: 1.4em; white-space: nowrap; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr));
  gap: 1.5rem 1rem; }
img { width: 100%; height: auto; } figure { margin: 0; } .wide { grid-column: 1 / -1; }
.problems { background: #fff4e5; border-left: 4px solid #e69f00; padding: .5rem 1rem;
  overflow-wrap: anywhere; }
p.note, figcaption { color: #555; max-width: 46rem; }
"""


def _page(
    found: Sequence[Group],
    finals: dict[str, dict[str, Final]],
    drawn: dict[str, bytes],
    problems: Sequence[str],
) -> str:
    parts = [
        "<h1>klplug report</h1>",
        '<div class="legend">' + " ".join(map(_legend, range(len(found)), found)) + "</div>",
        _problems(problems),
        "<h2>Final values</h2>",
        _final_table(found, finals),
        f'<p class="note">Means over the last {SHARE:.0%} of each run, at least {LEAST} logged '
        "steps, with 95 % intervals (Student's t): over seeds where there are several; of a single "
        "seed (*) over its steps, which says nothing of another seed.</p>",
    ]
    parts.append('<h2>Curves</h2><div class="grid">')
    parts += [_figure(name, drawn[name]) for name in ("frontier", *PANELS) if name in drawn]
    parts.append("</div>")
    parts.append(
        f'<p class="note">Lines: means of {WINDOW} logged steps; dots: each step of a single seed; '
        "bands: from the lowest to the highest seed.</p>"
    )
    parts += [
        "<h2>Runs</h2>",
        _run_table(found),
        f"<p class='note'>klplug {klplug.__version__}</p>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>klplug report</title><style>{_CSS}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _swatch(index: int) -> str:
    colour, line = _style(index)
    style = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "double"}[line]
    return f'<span class="swatch" style="border-top-style:{style};border-color:{colour}"></span>'


def _legend(index: int, group: Group) -> str:
    return f'<span class="run">{_swatch(index)}{html.escape(group.label)}</span>'


def _problems(problems: Sequence[str]) -> str:
    if not problems:
        return ""
    items = "".join(f"<li>{html.escape(problem)}</li>" for problem in problems)
    return f'<div class="problems"><b>Not everything could be read</b><ul>{items}</ul></div>'


def _final_table(found: Sequence[Group], finals: dict[str, dict[str, Final]]) -> str:
    names = [m.name for m in METRICS if any(m.name in ended for ended in finals.values())]
    head = "".join(f"<th>{html.escape(TITLES[name])}</th>" for name in names)
    rows = []
    for index, group in enumerate(found):
        ended = finals[group.label]
        cells = "".join(f"<td>{_cell(ended.get(name))}</td>" for name in names)
        label = _swatch(index) + html.escape(group.label)
        rows.append(f"<tr><td>{label}</td><td>{len(group.runs)}</td>{cells}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr><th>run</th><th>seeds</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(value: Final | None) -> str:
    if value is None:
        return ""
    return html.escape(str(value)) + ("*" if value.over == "steps" else "")


def _figure(name: str, png: bytes) -> str:
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    about = html.escape(HEADINGS.get(name, name.replace("_", " ")))
    note = f"<figcaption>{html.escape(NOTES[name])}</figcaption>" if name in NOTES else ""
    wide = ' class="wide"' if name == "kl" else ""
    return f'<figure{wide} id="{name}"><img src="{source}" alt="{about}">{note}</figure>'


def _run_table(found: Sequence[Group]) -> str:
    rows = [
        f"<tr><td>{html.escape(group.label)}</td><td>{run.steps}</td>"
        f'<td class="folder">{html.escape(str(run.folder))}</td></tr>'
        for group in found
        for run in group.runs
    ]
    return (
        '<div class="scroll"><table><thead><tr><th>run</th><th>steps</th>'
        f'<th class="folder">folder</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )
