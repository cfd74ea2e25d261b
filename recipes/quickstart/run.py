"""A quickstart run from end to end: policy, evaluation, host, evaluation, files."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from rich.console import Console

from recipes import cpu_shim
from recipes.cpu_shim.deepspeed_ops import compiled_ops
from recipes.quickstart import smollm2
from recipes.quickstart.problems import Row, write_rows
from recipes.quickstart.progress import LogTail, Metrics, StepLine, json_line
from recipes.quickstart.settings import HERE, Settings
from recipes.quickstart.summary import (
    baselines,
    curves,
    next_steps,
    read_metrics,
    summary,
    table,
)
from recipes.shared import refused
from recipes.shared.folder import FolderError, held, keep, other
from recipes.shared.processes import HostProcesses
from recipes.shared.settings import CACHE, REPOSITORY, RUNS

RECORD, WHAT = "settings.json", "quickstart run"
FILES = (RECORD, "prompts.jsonl", "log.txt", "metrics.jsonl", "summary.json", "curves.png")
TRAINED = "policy"
ERROR = re.compile(r"\b\w*(Error|Exception)\b: |error: ")
# Colours, progress bars, and the carets under a traceback's lines.
NOISE = re.compile(r"\x1b\[[\d;]*m|^.*\d%\|.*$|^[\s^~]+$")
SHOWN_LINES = 15
POLL = 0.3  # seconds


class RunError(RuntimeError):
    """The host failed; the message holds what the user needs."""


class Phases:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - started


def shown(path: Path) -> str:
    """A path as the user would write it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def claim_folder(settings: Settings, out: Path | None, overwrite: bool) -> tuple[Path, str]:
    """The folder for this run, emptied of an earlier one; and what was done, if anything.

    A folder that the user named and that holds another run is theirs to decide about. In the
    default place, an earlier run of other settings makes way under a name of its own.

    Raises:
        FolderError: The named folder holds a run of other settings, or something else.
    """
    folder = (settings.default_out if out is None else out).expanduser().resolve()
    option, own, told = f"OUT={shown(folder)}", settings.as_dict(), ""
    try:
        earlier = held(folder, RECORD, option, WHAT)
    except FolderError:
        if folder.is_file() or (out is not None and not overwrite):
            raise
        earlier = {}
    if earlier is not None and earlier != own and not overwrite:
        if out is not None:
            raise FolderError(f"{other(earlier, own, option, WHAT)}, or OVERWRITE=1")
        aside = free_name(folder, earlier.get("kl_type", "earlier"))
        folder.rename(aside)
        told = f"the run that was in {shown(folder)} is now in {shown(aside)}"
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / TRAINED, ignore_errors=True)
    keep(folder, RECORD, own)
    return folder, told


def free_name(folder: Path, kl_type: str) -> Path:
    """folder-k2_as_loss, folder-k2_as_loss-2, ...: the first that is not taken."""
    name = f"{folder.name}-{re.sub(r'[^A-Za-z0-9_.=-]+', '_', kl_type)}"
    names = (name if number == 1 else f"{name}-{number}" for number in range(1, 10**6))
    return next(folder.with_name(n) for n in names if not folder.with_name(n).exists())


def host_side(settings: Settings) -> ModuleType:
    """The module of the host: its `host_version`, `command`, `step_metrics`, `trained_policy`."""
    return import_module(f"recipes.quickstart.{settings.host}")


def check_served(settings: Settings) -> None:
    """Else the host would refuse it, minutes later.

    Raises:
        SettingsError: klplug does not serve the kl_type in this run.
    """
    with TemporaryDirectory() as scratch:
        prompts = Path(scratch) / "prompts.jsonl"
        write_rows(prompts, [{"question": "?", "answer": "#### 0"}])
        command = host_side(settings).command(
            settings, settings.recipe, settings.model, prompts, Path(scratch) / TRAINED
        )
    refused.check_served(settings.kl_type, command)


def policy_folder(settings: Settings, log: Path) -> Path | str:
    """The starting policy, which is also the reference.

    Raises:
        RunError: The named model cannot be made.
    """
    if settings.model == "tiny":
        return HERE / "policy"
    if settings.model == "smollm2":
        made = CACHE / "models" / smollm2.FOLDER
        if not made.is_dir():
            # A process of its own: what it says goes to the log, and its memory is given back.
            command = [sys.executable, "-m", smollm2.__name__, "--cache", str(made.parent)]
            with log.open("ab") as output:
                done = subprocess.run(
                    command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT
                )
            if done.returncode:
                raise RunError(f"MODEL=smollm2 could not be made:\n{last_lines(log)}")
        return made
    folder = Path(settings.model).expanduser()
    return folder.resolve() if folder.is_dir() else settings.model


def asked(rows: Iterable[Row], settings: Settings) -> list[Row]:
    """The problems with the recipe's instruction in each question."""
    instruction = settings.recipe.instruction
    return [{**row, "question": row["question"] + instruction} for row in rows]


def write_prompts(settings: Settings, path: Path) -> None:
    """Exactly as many questions as the steps take, so that the host makes exactly those steps."""
    from recipes.quickstart.data import MADE, load_problems

    count = settings.steps * settings.recipe.prompts
    # What is too short comes round again.
    source = {"count": count, "seed": settings.seed} if settings.data in MADE else {}
    rows = load_problems(settings.data, "train", gsm8k_path=settings.gsm8k, **source)
    write_rows(path, islice(cycle(asked(rows, settings)), count))


def evaluation(settings: Settings, policy: Path | str, reference: Path | str) -> dict[str, Any]:
    import torch
    from transformers import logging

    from recipes.quickstart.data import MADE, load_problems
    from recipes.quickstart.evaluate import evaluate

    logging.disable_progress_bar()  # it would tear the live line
    recipe = settings.recipe
    torch.set_num_threads(recipe.threads)
    source = {"count": recipe.test_problems} if settings.data in MADE else {}
    rows = load_problems(settings.data, "test", gsm8k_path=settings.gsm8k, **source)
    return evaluate(
        policy,
        reference,
        asked(rows[: recipe.test_problems], settings),
        max_new_tokens=recipe.max_new_tokens,
        batch_size=128 if recipe.threads == 1 else 16,
        seed=settings.seed,
    )


def train(
    settings: Settings, folder: Path, model: Path | str, line: StepLine, phases: Phases
) -> list[Metrics]:
    """Runs the host and follows its log; every step's metrics, also written as they come.

    Raises:
        RunError: The host failed, or ended before its last step.
    """
    log = folder / "log.txt"
    log.touch()
    side = host_side(settings)
    command = side.command(
        settings, settings.recipe, model, folder / "prompts.jsonl", folder / TRAINED
    )
    with ExitStack() as stack:
        host = stack.enter_context(HostProcesses())
        variables = cpu_shim.environment(settings.host, settings.ranks, settings.recipe.threads)
        environment = host.environment(variables)
        if settings.host == "openrlhf":
            with phases.timed("ops"):
                try:
                    stack.enter_context(compiled_ops(environment, log, line.phase))
                except RuntimeError as error:
                    raise RunError(f"{error}\n{last_lines(log)}") from error
        line.phase(f"starting {settings.host} (one to two minutes)")
        with phases.timed("training"):
            process = host.start(command, environment, folder, log)
            texts = follow(process, LogTail(log))
            steps = list(record(map(side.step_metrics, texts), line, folder / "metrics.jsonl"))
    if process.returncode:
        raise RunError(
            f"{settings.host} failed (exit status {process.returncode}). {shown(log)} ends with:\n"
            f"{last_lines(log)}"
        )
    if not steps or steps[-1]["step"] != settings.steps:
        raise RunError(
            f"{settings.host} ended well, yet its log has {len(steps)} of {settings.steps} steps: "
            f"see {shown(log)}"
        )
    return steps


def follow(process: subprocess.Popen[bytes], tail: LogTail) -> Iterator[str]:
    """The lines of the log, until the process has ended and the log is read."""
    ended = False
    while not ended:
        ended = process.poll() is not None
        yield from tail
        if not ended:
            time.sleep(POLL)


def record(found: Iterable[Metrics | None], line: StepLine, path: Path) -> Iterator[Metrics]:
    """The steps among what was found, each written and shown as it comes."""
    with path.open("w") as file:
        for metrics in found:
            if metrics is not None:
                file.write(json_line(metrics))
                file.flush()
                line.step(metrics)
                yield metrics


def last_lines(log: Path) -> str:
    """The last error in the log and what follows it, or just its end."""
    with log.open(errors="replace") as file:
        quiet = (NOISE.sub("", line.rstrip())[:300] for line in file)
        lines = list(deque((line for line in quiet if line.strip()), maxlen=2000))
    errors = [i for i, line in enumerate(lines) if ERROR.search(line)]
    end = lines[-SHOWN_LINES:]
    if errors and errors[-1] < len(lines) - SHOWN_LINES:
        return "\n".join([lines[errors[-1]], "...", *end])
    return "\n".join(end)


def quickstart(settings: Settings, out: Path | None, overwrite: bool, console: Console) -> None:
    """The whole run.

    Raises:
        FolderError: The folder cannot be used.
        SettingsError: klplug does not serve the kl_type on this host.
        RunError: The host failed.
    """
    check_served(settings)
    side = host_side(settings)
    folder, told = claim_folder(settings, out, overwrite)
    if told:
        console.print(told, highlight=False)
    coef = "" if settings.kl_coef is None else f", kl_coef {settings.kl_coef:g}"
    console.print(
        f"{settings.host} {side.host_version()}, {settings.model} on {settings.data}: "
        f"{settings.kl_type}{coef}, {settings.steps} steps. Log: {shown(folder / 'log.txt')}",
        highlight=False,
    )
    phases = Phases()
    with StepLine(console, settings.steps) as line:
        line.phase("preparing policy and problems")
        with phases.timed("preparation"):
            model = policy_folder(settings, folder / "log.txt")
            write_prompts(settings, folder / "prompts.jsonl")
        line.phase("evaluating the policy before")
        with phases.timed("evaluation_before"):
            before = evaluation(settings, model, model)
        steps = train(settings, folder, model, line, phases)
        trained = side.trained_policy(folder / TRAINED, settings)
        line.phase("evaluating the policy after")
        with phases.timed("evaluation_after"):
            after = evaluation(settings, trained, model)
    made = summary(settings, side.host_version(), steps, before, after, phases.seconds)
    (folder / "summary.json").write_text(json.dumps(made, indent=2) + "\n")
    stock = baselines(made, RUNS)
    beside = {of["kl_type"]: read_metrics(where / "metrics.jsonl") for where, of in stock.items()}
    curves(settings, steps, folder / "curves.png", beside)
    console.print(table([made, *stock.values()]))
    files = ("summary.json", "metrics.jsonl", "curves.png", "log.txt")
    console.print(f"{shown(folder)}: {', '.join(files)} ({made['seconds']:.0f} s)", highlight=False)
    console.print(next_steps(made, folder, list(stock)), highlight=False)
