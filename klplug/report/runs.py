"""Runs from folders: which logs belong together, what they call things, which are only seeds."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from klplug.report.logs import Log, is_log, read


@dataclass(frozen=True)
class Metric:
    """One quantity, and the tags that hosts log it under; the first that is there counts.

    OpenRLHF's ``train/`` before a tag is left off.
    """

    name: str
    title: str
    panel: str
    tags: tuple[str, ...]


_HOST_KL = ("kl", "actor/kl_loss", "actor/reward_kl_penalty")
METRICS = (
    Metric("reward", "reward", "reward", ("reward", "critic/score/mean", "critic/rewards/mean")),
    Metric("kl_k1", "KL, k1", "kl", ("klplug/k1",)),
    Metric("kl_k2", "KL, k2", "kl", ("klplug/k2",)),
    Metric("kl_k3", "KL, k3", "kl", ("klplug/k3",)),
    Metric("kl_abs", "KL, abs", "kl", ("klplug/abs",)),
    Metric("kl_host", "KL, the host's", "kl", _HOST_KL),
    Metric("entropy", "entropy", "entropy", ("actor/entropy", "entropy", "entropy_loss")),
    Metric("length", "tokens per answer", "length", ("response_length", "response_length/mean")),
    Metric("grad_norm", "gradient norm", "grad_norm", ("actor_grad_norm", "actor/grad_norm")),
    Metric("ess", "ESS", "ess", ("klplug/ess",)),
    Metric("capped_share", "capped share", "capped_share", ("klplug/capped_share",)),
    Metric("cosine", "gradient cosine", "cosine", ("klplug/gradient_cosine",)),
    Metric("top_share", "top 1 %", "top_share", ("klplug/top_share",)),
)
TITLES = {metric.name: metric.title for metric in METRICS}
KL_ORDER = ("kl_k3", "kl_k1", "kl_k2", "kl_host")  # for one number: the unbiased and steady first

# What quickstart settings of one run's seeds may differ in.
_SEED = "seed"
_SEED_IN_NAME = re.compile(r"[-_.=]?seed[-_=]?\d+", re.IGNORECASE)

Series = dict[int, float]


@dataclass(frozen=True)
class Run:
    """One training run: a folder, and its metrics by name and step."""

    folder: Path
    label: str
    group: str
    metrics: dict[str, Series]

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return max(step for series in self.metrics.values() for step in series)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone: one colour, one band."""

    label: str
    runs: tuple[Run, ...]

    def series(self, metric: str) -> list[Series]:
        """One per seed that has the metric."""
        return [run.metrics[metric] for run in self.runs if metric in run.metrics]


class NoLogs(ValueError):
    """A folder has nothing to report on."""


def groups(folders: Sequence[Path]) -> tuple[list[Group], list[str]]:
    """Runs in ``folders`` by what they differ in beside the seed, and what was not readable.

    Raises:
        NoLogs: a folder that isn't there, or has no log in it.
    """
    runs: dict[Path, Run] = {}
    problems: list[str] = []
    for folder in folders:
        for place, logs in _log_folders(folder).items():
            run, told = _run(place, logs)
            problems += told
            if run is not None:
                runs[place] = run
    together: dict[str, list[Run]] = defaultdict(list)
    for run in runs.values():
        together[run.group].append(run)
    made = []
    for alike in together.values():
        label = alike[0].label
        if sum(others[0].label == label for others in together.values()) > 1:
            label = f"{label} ({alike[0].folder.name})"
        made.append(Group(label, tuple(alike)))
    return made, problems


def _log_folders(folder: Path) -> dict[Path, list[Path]]:
    if not folder.exists():
        raise NoLogs(f"{folder}: no such folder")
    if folder.is_file():
        found = [folder] if is_log(folder) else []
    else:
        # A W&B folder has links to its latest run.
        found = sorted(p for p in folder.rglob("*") if is_log(p) and p.is_file())
        found = list({path.resolve(): path for path in found}.values())
    if not found:
        raise NoLogs(
            f"{folder}: no log in it: neither TensorBoard's events.out.tfevents.*, nor the "
            "quickstart's metrics.jsonl, nor a .wandb file of an offline W&B run"
        )
    places: dict[Path, list[Path]] = defaultdict(list)
    for path in sorted(found, key=lambda path: (len(path.parts), path)):
        # A log below another's folder is the same run's, as tensorboard/ beside metrics.jsonl.
        above = [place for place in places if path.parent.is_relative_to(place)]
        places[above[0] if above else path.parent].append(path)
    return places


def _run(folder: Path, logs: Sequence[Path]) -> tuple[Run | None, list[str]]:
    log = Log()
    for path in logs:
        read(path, log)
    scalars = {tag.removeprefix("train/"): series for tag, series in log.scalars.items()}
    metrics: dict[str, Series] = {}
    for metric in METRICS:
        tag = next((tag for tag in metric.tags if tag in scalars), None)
        if tag is not None:
            metrics[metric.name] = dict(sorted(scalars[tag].items()))
    if not metrics:
        if scalars:
            known = ", ".join(tag for metric in METRICS for tag in metric.tags)
            log.problems.append(f"{folder}: none of the scalars that are looked for: {known}")
        return None, log.problems
    label, group = _names(folder)
    return Run(folder, label, group, metrics), log.problems


def _names(folder: Path) -> tuple[str, str]:
    """A run's label, and the key that its other seeds have too."""
    try:
        settings = json.loads((folder / "settings.json").read_text())
        coefficient = settings["kl_coef"]
        strength = "" if coefficient is None else f" {coefficient:g}"
        label = f"{settings['host']}: {settings['kl_type']}{strength}"
    except (OSError, ValueError, KeyError, TypeError):
        plain = _SEED_IN_NAME.sub("", str(folder))
        return Path(plain).name or folder.name, plain
    settings.pop(_SEED, None)
    return label, json.dumps(settings, sort_keys=True)


def rolling_mean(series: Series, width: int) -> Series:
    """The mean of each value and those up to ``width - 1`` steps logged before it, nan left out."""
    steps, means = list(series), {}
    for index, step in enumerate(steps):
        window = [series[s] for s in steps[max(0, index + 1 - width) : index + 1]]
        kept = [value for value in window if math.isfinite(value)]
        means[step] = sum(kept) / len(kept) if kept else math.nan
    return means
