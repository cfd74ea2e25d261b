"""One run of a grid: the quickstart's own training, and what its policies are worth."""

import fcntl
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from recipes.quickstart import run as quickstart
from recipes.quickstart.progress import Metrics, StepLine
from recipes.quickstart.settings import Settings
from recipes.shared.settings import REPOSITORY

# Of the samples of every evaluation: all policies face the same draw of problems and numbers.
SEED = 0
BATCH = 512
# What is kept of each training step; the names are those of the hosts' logs.
KEPT = (
    "reward",
    "group_reward_std",
    "response_length",
    "actor_grad_norm",
    "kl",
    "ppo_kl",
    "ppo_clip_ratio",
    "klplug/k1",
    "klplug/k2",
    "klplug/k3",
    "klplug/ess",
    "klplug/capped_share",
)
# A policy that has become nan shows in these, or in what its host dies of.
TELLING = ("reward", "actor_grad_norm", "policy_loss")
NOT_FINITE = re.compile(r"\b(nan|-?inf|non-?finite|not finite)\b", re.IGNORECASE)

Steps = list[dict[str, float | None]]  # metrics of each; one that was not finite is None


class Diverged(Exception):
    """The policy, or what it is trained on, is no finite number any more; says where."""


@contextmanager
def held(lock: Path | None) -> Iterator[None]:
    """Waits for the lock of a file, if there is one, and holds it."""
    with ExitStack() as stack:
        if lock is not None:
            fcntl.flock(stack.enter_context(lock.open("a")), fcntl.LOCK_EX)
        yield


def measured_run(
    settings: Settings, folder: Path, problems: int, samples: int, *, lock: Path | None = None
) -> dict[str, Any]:
    """Trains in `folder`; the run's part of a row of results.

    Args:
        settings: Of the run.
        folder: Emptied of what an interrupted call left there.
        problems: Held-out problems of each evaluation.
        samples: Sampled answers to each at the end of the run; one along it.
        lock: A file whose lock is held while the host trains, for machines that are shared.

    Raises:
        RunError: The host failed, for a reason that is not the policy's numbers.
    """
    folder, _ = quickstart.claim_folder(settings, folder, overwrite=True)
    phases = quickstart.Phases()
    status, reason = "done", None
    start = replace(settings, kl_type="none", kl_coef=None, seed=0, updates=1, save_every=0)
    with live_line(settings, folder) as line:
        line.phase("evaluating the policy before training")
        reference = quickstart.policy_folder(settings, folder / "log.txt")
        before = time.process_time()
        with phases.timed("reference"):
            evaluations = [{"step": 0, **reference_evaluation(start, reference, problems, samples)}]
        reference_cpu = time.process_time() - before
        try:
            with held(lock), phases.timed("training"):
                train(settings, folder, reference, line)
            with phases.timed("evaluation"):
                for step, policy in policies(settings, folder):
                    line.phase(f"evaluating the policy of step {step}")
                    # Curves along the run need fewer answers than what is compared at its end.
                    each = samples if step == settings.steps else 1
                    found = evaluation(settings, policy, reference, problems, each)
                    evaluations.append({"step": step, **found})
        except Diverged as error:
            status, reason = "diverged", str(error)
    return {
        "status": status,
        "reason": reason,
        "seconds": {phase: round(value, 1) for phase, value in phases.seconds.items()},
        "evaluations": evaluations,
        "training": columns(read_metrics(folder / "metrics.jsonl")),
        "reference_cpu_seconds": round(reference_cpu, 1),
    }


@contextmanager
def live_line(settings: Settings, folder: Path) -> Iterator[StepLine]:
    """On a terminal the run under way; else into a file, since a log has the driver's lines."""
    with (folder / "progress.txt").open("w") as progress:
        console = Console() if sys.stdout.isatty() else Console(file=progress, width=120)
        with StepLine(console, settings.steps) as line:
            yield line


def train(settings: Settings, folder: Path, model: Path | str, line: StepLine) -> None:
    """The quickstart's training.

    Raises:
        Diverged: It failed, or ended, with numbers that are not finite.
        RunError: It failed otherwise.
    """
    quickstart.write_prompts(settings, folder / "prompts.jsonl")
    with finite(lambda: read_metrics(folder / "metrics.jsonl")):
        quickstart.train(settings, folder, model, line, quickstart.Phases())


@contextmanager
def finite(steps: Callable[[], Steps]) -> Iterator[None]:
    """Around a training that leaves these steps.

    Raises:
        Diverged: It failed, or ended, with numbers that are not finite.
        RunError: It failed otherwise.
    """
    try:
        yield
    except quickstart.RunError as error:
        if (step := first_not_finite(steps())) is not None:
            raise Diverged(f"not finite from step {step} on; the host then failed") from error
        # In the error itself: a metric beside it may be nan for reasons of its own.
        errors = filter(quickstart.ERROR.search, str(error).splitlines())
        if told := [line for line in errors if NOT_FINITE.search(line)]:
            raise Diverged(f"the host failed: {told[-1].strip()}") from error
        raise
    if (step := first_not_finite(steps())) is not None:
        raise Diverged(f"not finite from step {step} on")


def read_metrics(path: Path) -> Steps:
    """The steps as they were written; a value that was not finite is None."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def first_not_finite(steps: Steps) -> int | None:
    bad = (s["step"] for s in steps if any(s.get(key, 0.0) is None for key in TELLING))
    found = next(bad, None)
    return None if found is None else int(found)


def columns(steps: Steps) -> Mapping[str, list[float | None]]:
    """Each kept metric's values over the steps, six digits of them."""

    def short(value: float | None) -> float | None:
        return None if value is None else float(f"{value:.6g}")

    there = [key for key in KEPT if any(key in step for step in steps)]
    return {key: [short(step.get(key)) for step in steps] for key in there}


def commit() -> tuple[str | None, bool]:
    """The checkout's commit, and whether a tracked file differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return None, False


def policies(settings: Settings, folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the policies that a run has left, in order."""
    side, trained = quickstart.host_side(settings), folder / quickstart.TRAINED
    every, last = settings.save_every, settings.steps
    along = range(every, last, every) if every else ()
    return [
        *((step, side.saved_policy(trained, step)) for step in along),
        (last, side.trained_policy(trained, settings)),
    ]


def evaluation(
    settings: Settings, policy: Path | str, reference: Path | str, problems: int, samples: int
) -> Metrics:
    """What the quickstart's evaluation measures, with `samples` answers to each problem.

    Raises:
        Diverged: A weight of the policy is not finite, or what comes of it.
    """
    import torch
    from transformers import AutoModelForCausalLM, logging

    from recipes.quickstart.data import MADE, load_problems
    from recipes.quickstart.evaluate import evaluate

    logging.disable_progress_bar()
    torch.set_num_threads(settings.recipe.threads)
    weights = AutoModelForCausalLM.from_pretrained(policy).parameters()
    if not all(torch.isfinite(weight).all() for weight in weights):
        raise Diverged(f"{Path(policy).name}: a weight is not finite")
    source = {"count": problems} if settings.data in MADE else {}
    rows = load_problems(settings.data, "test", gsm8k_path=settings.gsm8k, **source)
    try:
        found = evaluate(
            policy,
            reference,
            quickstart.asked(rows[:problems], settings),
            max_new_tokens=settings.recipe.max_new_tokens,
            batch_size=BATCH if settings.recipe.threads == 1 else 16,
            samples=samples,
            kl_samples=1,
            seed=SEED,
        )
    except RuntimeError as error:  # torch's, of sampling
        if NOT_FINITE.search(str(error)):
            raise Diverged(f"{Path(policy).name} cannot be sampled: {error}") from error
        raise
    if bad := [key for key, value in found.items() if is_not_finite(value)]:
        raise Diverged(f"{Path(policy).name}: {', '.join(bad)} is not finite")
    return found


def is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


@cache
def reference_evaluation(
    settings: Settings, reference: Path | str, problems: int, samples: int
) -> Metrics:
    """Of the policy that all runs start from: once for each driver, if `settings` say no more."""
    return evaluation(settings, reference, reference, problems, samples)
