"""`python -m recipes.reproduce GRID`, or `make reproduce`: a grid's runs and their results."""

import argparse
import os
import re
import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from recipes.quickstart import run as quickstart
from recipes.reproduce import gpu
from recipes.reproduce.drive import (
    RESULTS,
    DriveError,
    Row,
    cost,
    drive,
    missing,
    read_rows,
    shown,
)
from recipes.reproduce.ends import NOTES, table
from recipes.reproduce.grid import HERE, Grid, GridError, load
from recipes.shared.settings import RUNS, SettingsError

COMMITTED = HERE / "results"
WIDTH = 140  # where no terminal says how wide it is


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m recipes.reproduce",
        description="Make the runs of a grid that are missing. The same command goes on.",
    )
    add = made.add_argument
    add("grid", help="a name in recipes/reproduce/grids, or a .yaml file like them")
    add("--out", type=Path, help="folder of rows and runs (default: runs/reproduce/GRID)")
    add("--dry-run", action="store_true", help="say what would run and what it costs")
    add("--part", default="1/1", help="2/3: the second of three, each with every third run")
    add("--lock", type=Path, help="a file whose lock is held while a host trains (shared machines)")
    return made


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    # Before torch is loaded; as for the host's processes, see cpu_shim.environment.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        grid = part(load(arguments.grid), arguments.part)
        known = [row for path in sorted(COMMITTED.glob("*.jsonl")) for row in timed_rows(path)]
        check_served(grid)
        folder = (arguments.out or RUNS / "reproduce" / grid.name).absolute()
        if arguments.dry_run:
            dry_run(grid, read_rows(folder / RESULTS), known)
            return 0
        check_installed(grid)
        from recipes.reproduce.measure import measured_run

        make = gpu.measured_run if is_gpu(grid) else partial(measured_run, lock=arguments.lock)
        failed = drive(grid, folder, make, say, known=known)
        if rows := read_rows(folder / RESULTS):
            tell(table(grid, rows, known))
    except (GridError, DriveError) as error:
        print(f"reproduce: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("reproduce: interrupted; the same command goes on", file=sys.stderr)
        return 130
    if failed:
        print(f"reproduce: {failed} runs failed; the same command makes them again")
    return 1 if failed else 0


def part(grid: Grid, asked: str) -> Grid:
    """One of several parts of a grid, for as many drivers with a folder each.

    Raises:
        GridError: It is not I/N with I from 1 to N.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", asked)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise GridError(f"--part {asked}: a part and their number are needed, as 2/3")
    if count > len(grid.runs):
        raise GridError(f"--part {asked}: {grid.name} has {len(grid.runs)} runs")
    return replace(grid, runs=grid.runs[number - 1 :: count])


def check_served(grid: Grid) -> None:
    """Each formulation once.

    Raises:
        GridError: klplug does not serve one of them on its host.
    """
    check = gpu.check_served if is_gpu(grid) else quickstart.check_served
    formulations = {(run.host, run.kl_type, run.kl_coef, run.updates): run for run in grid.runs}
    for run in formulations.values():
        try:
            check(run)
        except SettingsError as error:
            raise GridError(f"{grid.name}: {error}") from error
        except PackageNotFoundError:  # a dry run where its host is not installed
            return


def check_installed(grid: Grid) -> None:
    """Else each run would fail after its first minute.

    Raises:
        DriveError: The grid's host is not here.
    """
    for host in sorted({run.host for run in grid.runs}):
        if find_spec(host) is None:
            raise DriveError(
                f"{grid.name}: {host} is not installed here ({sys.prefix}). Take its own "
                f"environment: make .venv-{host}, then .venv-{host}/bin/python -m recipes.reproduce"
            )


def is_gpu(grid: Grid) -> bool:
    return isinstance(grid.runs[0], gpu.GpuRun)


def timed_rows(path: Path) -> list[Row]:
    """Rows of a results file that are a host's runs; other studies have files of their own form."""
    try:
        return [row for row in read_rows(path) if "cpu_seconds" in row]
    except DriveError:
        return []


def say(text: str) -> None:
    print(text, flush=True)


def tell(ends: Table) -> None:
    """The ends of the runs, on a line each, however narrow what is written to."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(ends)
    console.print(NOTES, highlight=False)


def dry_run(grid: Grid, rows: list[Row], known: list[Row]) -> None:
    to_make = missing(grid, rows)
    for number, run in enumerate(grid.runs, start=1):
        say(f"{number:3} {shown(run)}{' (made)' * (run not in to_make)}")
    if to_make:
        say(cost([*rows, *known], to_make))


if __name__ == "__main__":
    sys.exit(main())
