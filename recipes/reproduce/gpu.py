"""A grid's runs on GPUs: the recipes' own launcher and evaluation, each in a process of its own.

What the quickstart's grids measure over the whole vocabulary (KL, entropy) is not measured here.
The hosts' own estimates along the run are kept.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from recipes import estimates
from recipes.quickstart.progress import json_line
from recipes.quickstart.run import Phases, RunError, host_side, last_lines
from recipes.recipe import Recipe, checked, load, with_kl
from recipes.reproduce.measure import Diverged, Steps, columns, commit, finite
from recipes.shared import refused
from recipes.shared.folder import keep
from recipes.shared.processes import HostProcesses

RECIPE, BEGUN = "run.yaml", "begun.json"
# The data set on which a recipe's policy is evaluated.
EVALUATED = {"gsm8k": "gsm8k", "math": "math500", "openr1-math": "math500"}


@dataclass(frozen=True)
class GpuRun:
    """A recipe with a seed, a KL and a number of updates of its own."""

    host: str
    base: str
    """The recipe's name in `configs/`."""
    kl_type: str
    kl_coef: float | None
    updates: int
    seed: int

    @cached_property
    def recipe(self) -> Recipe:
        """Checked.

        Raises:
            SettingsError: Names what cannot be.
        """
        recipe = with_kl(load(self.base), self.kl_type, self.kl_coef)
        return checked(replace(recipe, updates=self.updates, seed=self.seed))

    @property
    def model(self) -> str:
        return self.recipe.model

    @property
    def data(self) -> str:
        return self.recipe.data

    @property
    def steps(self) -> int:
        return self.recipe.steps

    @property
    def gpu_hours(self) -> float:
        """Estimated, not measured: see `recipes.estimates`."""
        return estimates.time(self.recipe)[-1].value * self.recipe.gpus

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "model": self.model, "data": self.data, "steps": self.steps}


def recipe_file(run: GpuRun) -> str:
    """The run as a recipe of its own, for the launcher."""
    own = {key: getattr(run, key) for key in ("kl_type", "kl_coef", "updates", "seed")}
    return yaml.safe_dump({"include": [run.base], **own}, sort_keys=False)


def check_served(run: GpuRun) -> None:
    """Else the launcher would refuse it, when the runs before it are made.

    Raises:
        SettingsError: klplug does not serve the kl_type in this run.
    """
    words = host(run).command(run.recipe, Path("data"), Path("out"))
    refused.check_served(run.kl_type, [sys.executable, "-m", *words])


def host(run: GpuRun) -> ModuleType:
    return import_module(f"recipes.{run.host}.host")


def trained_policy(run: GpuRun, out: Path) -> Path:
    """Where the recipe's last checkpoint, or its policy, lies."""
    if run.host == "openrlhf":
        return out / "policy"
    last = int((out / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    return out / "checkpoints" / f"global_step_{last}" / "actor" / "huggingface"


def measured_run(run: GpuRun, folder: Path, problems: int, samples: int) -> dict[str, Any]:
    """Trains and evaluates; an interrupted call goes on from the launcher's last checkpoint.

    Raises:
        RunError: The launcher, its host or the evaluation failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE).write_text(recipe_file(run))
    log, out, phases = folder / "log.txt", folder / "run", Phases()
    earlier = begun(folder, log)
    status, reason = "done", None
    evaluations: list[dict[str, Any]] = []
    try:
        with phases.timed("training"), finite(lambda: logged(run, log)):
            launched([f"recipes.{run.host}", str(folder / RECIPE)], {"OUT": str(out)}, log)
        policy = trained_policy(run, out)
        words = ["--recipe", run.base, "--data", EVALUATED[run.data]]
        words += ["--samples", str(samples), "--n", str(problems)]
        with phases.timed("evaluation"):
            out = folder / "evaluation"
            launched(["recipes.evaluate", str(policy), *words, "--out", str(out)], {}, log)
        metrics = json.loads((out / "summary.json").read_text())["metrics"]
        steps = logged(run, log)
        last = steps[-1]["step"] if steps else run.steps
        evaluations.append({"step": last, **measured(metrics)})
    except Diverged as error:
        status, reason = "diverged", str(error)
    seconds = {"earlier_calls": earlier["seconds"]} if earlier["seconds"] else {}
    return {
        "status": status,
        "reason": reason,
        "seconds": {k: round(value, 1) for k, value in (seconds | phases.seconds).items()},
        "evaluations": evaluations,
        "training": columns(logged(run, log)),
        "commit": earlier["commit"],
        "changed": earlier["changed"] or commit() != (earlier["commit"], False),
    }


def begun(folder: Path, log: Path) -> dict[str, Any]:
    """Of a run's calls: the commit of the first, whether a later one had another, and seconds.

    The seconds are of those before this one. A call that was killed ended with the last line of its
    log.
    """
    here, changed = commit()
    made = {"commit": here, "changed": changed, "seconds": 0.0}
    if (folder / BEGUN).exists():
        made = json.loads((folder / BEGUN).read_text())
        made["seconds"] += max(0.0, log.stat().st_mtime - made["at"])
        made["changed"] |= (here, changed) != (made["commit"], False)
    log.touch()
    keep(folder, BEGUN, made | {"at": time.time()})
    return made


def logged(run: GpuRun, log: Path) -> Steps:
    """The steps that the host has logged, a repeated one as the last call had it."""
    step_metrics = host_side(run).step_metrics
    with log.open(errors="replace") as lines:
        steps = {m["step"]: m for line in lines if (m := step_metrics(line)) is not None}
    return [json.loads(json_line(steps[step])) for step in sorted(steps)]


def measured(metrics: dict[str, Any]) -> dict[str, Any]:
    """The evaluation's summary in the words of the quickstart's."""
    means = {name: found["mean"] for name, found in metrics.items()}
    return {
        "accuracy": means["greedy"],
        "sampled_accuracy": means["pass@1"],
        "pass_at": {name[5:]: mean for name, mean in means.items() if name.startswith("pass@")},
        "kl_nats_per_answer": None,
    }


def launched(words: list[str], variables: dict[str, str], log: Path) -> None:
    """A module's process, and with it all that it starts, from start to end."""
    with HostProcesses() as processes:
        environment = processes.environment({**variables, "DRY_RUN": ""})
        command = [sys.executable, "-m", *words]
        process = processes.start(command, environment, Path(os.getcwd()), log)
        if process.wait():
            raise RunError(f"{words[0]} failed ({process.returncode}):\n{last_lines(log)}")
