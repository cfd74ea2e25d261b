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
from klplug.report.runs import KL_ORDER, TITLES, NoLogs


def report_command(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders with logs of one or many runs in them."),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Where the page goes.")
    ] = Path("klplug-report"),
    as_json: AsJson = False,
) -> None:
    """Draw runs side by side: reward, KL, entropy, length, gradient norm, weights, the frontier."""
    try:
        made = report(runs, out)
    except NoLogs as error:
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
    names = ["reward", next((k for k in KL_ORDER if _any(made, k)), "kl_k3"), "length"]
    table = Table()
    table.add_column("run")
    for heading in ("seeds", "steps", *(TITLES[name] for name in names)):
        table.add_column(heading, justify="right")
    for group in made.groups:
        ended = made.finals[group.label]
        values = (str(ended[name]) if name in ended else "" for name in names)
        steps = str(max(run.steps for run in group.runs))
        table.add_row(group.label, str(len(group.runs)), steps, *values)
    out = console()
    out.print(table)
    for problem in made.problems:
        out.print(f"not read: {problem}")
    out.print(f"{made.page}, with {len(made.pictures)} pictures beside it")


def _any(made: Report, name: str) -> bool:
    return any(name in ended for ended in made.finals.values())
