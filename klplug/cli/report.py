"""``klplug report``: one page on finished runs, from the logs of either host."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from klplug.cli.output import AsJson, console, print_json
from klplug.cli.status import Status, Unreadable
from klplug.report import Report, report
from klplug.report.closed_form import NoSamples
from klplug.report.intervals import Final
from klplug.report.page import final_of
from klplug.report.runs import METRICS, Group, NoLogs


def report_command(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Folders with logs of one or many runs, or logs."),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Where the page goes.")
    ] = Path("klplug-report"),
    samples: Annotated[
        Path | None,
        typer.Option(
            "--samples",
            metavar="FILE",
            help="Answers of the reference, JSON lines with prompt, reward and tokens. Draws the "
            "best policies and best of N beside the runs.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw runs side by side: reward, validation, KL, entropy, length, gradient norm, weights.

    Reads TensorBoard's events, offline W&B files, JSON lines, CSV, and what a console printed.
    """
    try:
        made = report(runs, out, samples)
    except (NoLogs, NoSamples) as error:
        raise Unreadable(str(error)) from error
    except OSError as error:
        raise Unreadable(f"{error.filename or out}: {error.strerror or error}") from error
    if as_json:
        print_json(_document(made))
    else:
        _tell(made)
    raise typer.Exit(Status.FINDINGS if made.problems else Status.CLEAN)


def _document(made: Report) -> dict[str, object]:
    return {
        "page": str(made.page),
        "pictures": {name: str(path) for name, path in made.pictures.items()},
        "runs": [
            {
                "label": group.label,
                "folders": [str(run.folder) for run in group.runs],
                "steps": [run.steps for run in group.runs],
                "final": {k: asdict(v) for k, v in made.finals[group.label].items()},
            }
            for group in made.groups
        ],
        "problems": made.problems,
    }


def _tell(made: Report) -> None:
    titles = {metric.name: metric.title for metric in METRICS}
    table = Table()
    # No name breaks within a word.
    longest = max(len(word) for group in made.groups for word in group.label.split())
    table.add_column("run", min_width=min(longest, 40), overflow="fold")
    for heading in ("seeds", "steps", "reward", "KL, nats per token", "tokens per answer"):
        table.add_column(heading, justify="right")

    def ended(group: Group, metric: str) -> str:
        # The range of one seed's steps is on the page; here it would leave no room for names.
        value = final_of(group, made.finals, metric)
        return (
            f"{value.mean:.4g}"
            if isinstance(value, Final) and value.over == "steps"
            else str(value)
        )

    for group in made.groups:
        name = group.kl_name
        kl = f"{ended(group, name)} ({titles[name].removeprefix('KL, ')})" if name else ""
        steps = str(max(run.steps for run in group.runs))
        table.add_row(
            group.label,
            *(str(len(group.runs)), steps),
            *(ended(group, "reward"), kl, ended(group, "length")),
        )
    out = console()
    out.print(table)
    for problem in made.problems:
        out.print(f"problem: {problem}")
    out.print(f"{made.page}, with {len(made.pictures)} pictures beside it")
