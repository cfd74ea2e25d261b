"""The page: one HTML file that needs no other, and the same pictures as SVG files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import klplug
from klplug.report import plots
from klplug.report.closed_form import ClosedForm, closed_form
from klplug.report.intervals import SHARE, Final, final
from klplug.report.runs import SEED, Group, Metric, NoLogs, groups, metrics_of

PAGE, TEMPLATE = "report.html", "page.html.jinja"
BORDERS = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "double"}
NOTES = {
    "frontier": "A line is a run on its way, a dot where it ended. Higher at the same KL is "
    "better. The KL is the first that a run has: klplug's estimate, k3, k1, k2, the trainer's own.",
    "kl_k1": "Unbiased under samples of the policy.",
    "kl_k2": "Biased: no KL, but k2's value.",
    "kl_k3": "Unbiased under samples of the policy; noisy where the policy has sharpened.",
    "kl_host": "The value of whatever estimator its settings chose, so no KL in general.",
    "ess": "Of the importance weights, as a share of the tokens: 1 where all count the same.",
}
# Of summary.json, where a run has one: key, title, whether it is a share.
SUMMARY = (
    ("accuracy_before", "accuracy before", True),
    ("accuracy_after", "accuracy after", True),
    ("kl_last", "exact KL at the end, nats per answer", False),
    ("klplug_active", "klplug active", False),
    ("seconds", "seconds", False),
)


@dataclass(frozen=True)
class Report:
    """What was written, and what is wrong with the runs or could not be read."""

    page: Path
    pictures: dict[str, Path]
    groups: list[Group]
    finals: dict[str, dict[str, Final]]
    problems: list[str]


def report(folders: Sequence[Path], out: Path, samples: Path | None = None) -> Report:
    """Write ``report.html`` and its pictures into ``out`` from the logs in ``folders``.

    Runs that differ in their seed alone make one line with a band. With ``samples``, answers of the
    reference with rewards, reward against KL has the closed form beside the runs.

    Raises:
        NoSamples: ``samples`` has none, or a line that is none.
        NoLogs: a folder has no log, or nothing in any log could be read.
        OSError: ``out`` can't be written.
        ModuleNotFoundError: matplotlib, Jinja2 or scipy is missing.
    """
    best = None if samples is None else closed_form(samples)
    found, problems = groups(folders)
    if not found:
        raise NoLogs("no run could be read:\n  " + "\n  ".join(problems))
    metrics = metrics_of(found)
    finals = {
        group.label: {
            metric.name: value
            for metric in metrics
            if (value := final(group.series(metric.name), metric.steps)) is not None
        }
        for group in found
    }
    drawn = {}
    if any(group.kl_name and group.series("reward") for group in found):
        drawn["frontier"] = plots.frontier(found, finals, best)
    elif best is not None:
        problems.append(f"{samples}: no run has both a reward and a KL to draw it beside")
    drawn |= {metric.name: plots.curves(metric, found) for metric in metrics}
    titles = {metric.name: metric.title for metric in metrics} | {"frontier": "reward against KL"}
    notes = NOTES if best is None else NOTES | {"frontier": NOTES["frontier"] + _note(best)}
    page = _page(found, finals, drawn, titles, problems, notes)
    out.mkdir(parents=True, exist_ok=True)
    pictures = {name: out / f"{name.replace('/', '_')}.svg" for name in drawn}
    for name, path in pictures.items():
        path.write_text(plots.standalone(drawn[name]), encoding="utf-8")
    (out / PAGE).write_text(page, encoding="utf-8", errors="backslashreplace")
    return Report(out / PAGE, pictures, found, finals, problems)


def _note(best: ClosedForm) -> str:
    return (
        f" Dashed: the best policy at each KL, ref exp(r/beta)/Z, from {best.prompts} prompts with "
        f"{best.answers} answers of the reference or more. It can't see beyond a KL of "
        f"log {best.answers} nats per answer. Crosses: best of N, whose KL is at most "
        "log N - (N-1)/N."
    )


def _page(
    found: Sequence[Group],
    finals: dict[str, dict[str, Final]],
    drawn: dict[str, str],
    titles: dict[str, str],
    problems: Sequence[str],
    notes: Mapping[str, str],
) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("klplug.report", ""), autoescape=True, undefined=StrictUndefined
    )
    styles = [plots.style(index) for index in range(len(found))]
    differing, shared = _settings(found)
    return environment.get_template(TEMPLATE).render(
        version=klplug.__version__,
        runs=[
            {
                "label": group.label,
                "colour": colour.replace(plots.INK, "currentColor"),
                "border": BORDERS[line],
            }
            for group, (colour, line) in zip(found, styles, strict=True)
        ],
        problems=problems,
        finals=[
            ("seeds", [len(group.runs) for group in found]),
            ("steps", [max(run.steps for run in group.runs) for group in found]),
            *(
                (titles[name], [final_of(group, finals, name) for group in found])
                for name in drawn
                if name != "frontier"
            ),
        ],
        summaries=_summaries(found),
        differing=differing,
        shared=shared,
        # Drawn by matplotlib from numbers and these titles, which it escapes.
        pictures=[
            {"name": name, "title": titles[name], "note": notes.get(name), "svg": Markup(svg)}
            for name, svg in drawn.items()
        ],
        folders=[
            {
                "label": group.label,
                "steps": run.steps,
                "hours": "" if run.seconds is None else f"{run.seconds / 3600:.2f}",
                "folder": str(run.folder),
            }
            for group in found
            for run in group.runs
        ],
        share=f"{SHARE:.0%}".replace("%", " %"),
        steps=Metric.steps,
    )


def final_of(group: Group, finals: dict[str, dict[str, Final]], metric: str) -> Final | str:
    """A cell of a table: nothing where a run never logged a metric, nan where it has no end."""
    return finals[group.label].get(metric, "nan" if group.series(metric) else "")


def _summaries(found: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Of every group what its runs' summaries say, the seeds one after the other."""
    rows = []
    for key, title, is_share in SUMMARY:
        cells = [
            ", ".join(_shown(run.summary.get(key), is_share) for run in group.runs if run.summary)
            for group in found
        ]
        if any(cells):
            rows.append((title, cells))
    return rows


def _shown(value: Any, is_share: bool = False) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, (int, float)):
        return f"{value:.1%}".replace("%", " %") if is_share else f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _settings(found: Sequence[Group]) -> tuple[list[tuple[str, list[str]]], str]:
    """Settings in which groups differ, as rows, and those that all share, in one line."""
    # Of a group's runs the first speaks for all: they differ in their seed alone.
    settings = [group.runs[0].settings for group in found]
    keys = [key for key in dict.fromkeys(k for one in settings for k in one) if key != SEED]
    rows = [(key, [_shown(one[key]) if key in one else "" for one in settings]) for key in keys]
    # A log alone says nothing of its settings, and differs in none.
    said = [index for index, one in enumerate(settings) if one]
    alike = [key for key, cells in rows if len({cells[index] for index in said}) == 1]
    line = ", ".join(f"{key} {cells[said[0]]}" for key, cells in rows if key in alike)
    return [row for row in rows if row[0] not in alike], line
