"""Runs from folders: which logs belong together, what they call things, which are only seeds."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from klplug.hosting.host import hosts
from klplug.report.logs import CONSOLE, EVENTS, WANDB, Log, kind, read


@dataclass(frozen=True)
class Metric:
    """One quantity, and the tags that trainers log it under; the first that is there counts.

    A ``train/`` before a tag is left off. ``bounds`` are those of the quantity itself. A line, and
    the end of a run, are means of ``steps`` logged ones.
    """

    name: str
    title: str
    own: tuple[str, ...] = ()
    bounds: tuple[float, float] = (-math.inf, math.inf)
    kl: bool = False
    steps: int = 5

    @property
    def tags(self) -> tuple[str, ...]:
        """klplug's own, then the hosts'."""
        theirs = (tag for host in hosts().values() for tag in host.tags.get(self.name, ()))
        return (*self.own, *theirs)


_SHARE, _POSITIVE = (0.0, 1.0), (0.0, math.inf)
METRICS = (
    Metric("reward", "reward"),
    Metric("kl", "KL, estimate", ("klplug/kl",), kl=True),
    Metric("kl_k1", "KL, k1", ("klplug/k1",), kl=True),
    Metric("kl_k2", "KL, k2", ("klplug/k2",), _POSITIVE, kl=True),
    Metric("kl_k3", "KL, k3", ("klplug/k3",), _POSITIVE, kl=True),
    Metric("kl_abs", "KL, abs", ("klplug/abs",), _POSITIVE, kl=True),
    Metric("kl_host", "KL, the trainer's own", kl=True),
    Metric("entropy", "entropy"),
    Metric("length", "tokens per answer", bounds=_POSITIVE),
    Metric("grad_norm", "gradient norm", bounds=_POSITIVE),
    Metric("weight_mean", "mean weight", ("klplug/weight_mean",), _POSITIVE),
    Metric("ess", "effective sample size", ("klplug/ess",), _SHARE),
    Metric("capped_share", "share of weights at the cap", ("klplug/capped_share",), _SHARE),
    Metric("nonfinite_share", "tokens left out", ("klplug/nonfinite_share",), _SHARE),
    Metric("cosine", "cosine with KL(pi‖ref)'s gradient", ("klplug/gradient_cosine",), (-1.0, 1.0)),
    Metric("top_share", "gradient of the top 1 %", ("klplug/top_share",), _SHARE),
    Metric("seconds", "seconds per step", bounds=_POSITIVE),
    Metric("throughput", "tokens per second and GPU", bounds=_POSITIVE),
)
KL_ORDER = ("kl", "kl_k3", "kl_k1", "kl_k2", "kl_host")  # for one number
VALIDATION = re.compile(r"(?:val-core|val|eval)/(?!.*(?:global_step|epoch)$).+")

# What quickstart settings of one run's seeds may differ in.
SEED = "seed"
_SEED_IN_NAME = re.compile(r"[-_.=]?seed[-_=]?\d+", re.IGNORECASE)
# A folder that is named by when its trainer was started, as ppo_1128T09:30, or by W&B.
_STARTED = re.compile(r".*\d{4}T\d\d:\d\d|(offline-)?run-\d{8}_\d{6}-\w+")

Series = dict[int, float]


@dataclass(frozen=True)
class Run:
    """One training run: a folder or file, its metrics by name and step, and what it says of itself.

    Attributes:
        settings: from ``settings.json``, or a W&B run's configuration.
        summary: what ``summary.json`` holds.
        seconds: from the first line of a log to the last, where it has a clock. The time before it
            was resumed is not counted.
    """

    folder: Path
    label: str
    group: str
    metrics: dict[str, Series]
    settings: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None

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

    @property
    def kl_name(self) -> str | None:
        """The metric that is this run's KL where one number is wanted."""
        return next((name for name in KL_ORDER if self.series(name)), None)


def metrics_of(found: Sequence[Group]) -> list[Metric]:
    """What was logged by any run: the list above, validation scores beside the reward."""
    logged = {name for group in found for run in group.runs for name in run.metrics}
    known = [metric for metric in METRICS if metric.name in logged]
    names = sorted(logged - {metric.name for metric in METRICS})
    after = sum(metric.name == "reward" for metric in known)
    # A model is evaluated now and then: a mean of five would be of most of the run.
    validation = [Metric(name, name, (name,), steps=1) for name in names]
    return known[:after] + validation + known[after:]


class NoLogs(ValueError):
    """A folder has nothing to report on."""


def groups(folders: Sequence[Path]) -> tuple[list[Group], list[str]]:
    """Runs in ``folders`` by what they differ in beside the seed, and what is wrong with them.

    Raises:
        NoLogs: a folder that isn't there, or has no log in it.
    """
    runs: dict[Path, Run] = {}
    problems: list[str] = []
    for folder in folders:
        for place, log in _joined(_log_places(folder), folder).items():
            if place.resolve() in runs:  # a run is one, whatever path it is named by
                continue
            run, told = _run(place, log)
            problems += told
            if run is not None:
                runs[place.resolve()] = run
    together: dict[str, list[Run]] = defaultdict(list)
    for run in runs.values():
        together[run.group].append(run)
    made = []
    for alike in together.values():
        first = alike[0]
        same = [others[0].folder for others in together.values() if others[0].label == first.label]
        label = first.label if len(same) == 1 else f"{first.label} ({_apart(first.folder, same)})"
        made.append(Group(label, tuple(alike)))
        last = max(run.steps for run in alike)
        problems += [
            f"{run.folder}: ends at step {run.steps}, another seed of the same at {last}"
            for run in alike
            if run.steps < last
        ]
    return made, problems


def _apart(place: Path, places: Sequence[Path]) -> Path:
    """The end of a path, as many of its names as tell all the paths apart."""
    for count in range(1, len(place.parts)):
        if len({path.parts[-count:] for path in places}) == len(places):
            return Path(*place.parts[-count:])
    return place


def _log_places(folder: Path) -> dict[Path, list[Path]]:
    """The logs of each run: of a folder all its event files and the like, else each file alone."""
    if not folder.exists():
        raise NoLogs(f"{folder}: no such folder")
    found = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    # A W&B folder has links to its latest run.
    logs = list({path.resolve(): path for path in found if kind(path) is not None}.values())
    if not logs:
        raise NoLogs(
            f"{folder}: no log in it. Looked for: events.out.tfevents.* of TensorBoard, .wandb "
            "files of offline W&B runs. Also JSON lines, CSV and a console's log, with steps"
        )
    places: dict[Path, list[Path]] = defaultdict(list)
    for path in sorted(logs, key=lambda path: (_rank(path), len(path.parts), path)):
        # A log below another's folder is the same run's, as tensorboard/ beside metrics.jsonl.
        above = [place for place in places if path.parent.is_relative_to(place)]
        if _rank(path) == 0:
            places[above[0] if above else path.parent].append(path)
        elif not above:
            # A trainer's JSON lines and a console's log: one file is one run.
            places[path].append(path)
    return places


def _joined(places: dict[Path, list[Path]], asked: Path) -> dict[Path, Log]:
    """What each run logged: a resumed one may have a folder for each time that it was started.

    It stands under the folder above these. Where several of them begin at the first step they are
    several runs. Nothing tells which of them was resumed.
    """
    logs: dict[Path, Log] = {}
    started: dict[Path, list[Path]] = defaultdict(list)
    for place, files in places.items():
        # A trainer that is started again may write beside what it wrote.
        written: dict[tuple[Path, bool], Log] = defaultdict(Log)
        for path in files:
            own = Log()
            read(path, own)
            before = written[path.parent, path.name.startswith(EVENTS)]
            before.join(own, resumed=own.follows(before))
        logs[place] = log = Log()
        for own in written.values():
            log.join(own, resumed=False)
        if _STARTED.fullmatch(place.name) and place.parent.is_relative_to(asked):
            started[place.parent].append(place)
    for above, parts in started.items():
        parts.sort(key=lambda part: (min(logs[part].times, default=0.0), logs[part].first, part))
        first = logs[parts[0]].first
        if all(logs[part].first > first for part in parts[1:]):
            logs[above] = whole = Log()
            for part in parts:
                whole.join(logs.pop(part), resumed=True)
    return logs


def _rank(path: Path) -> int:
    """0 for logs that have a folder to themselves, then by how much they say."""
    if path.name.startswith(EVENTS) or path.name == "metrics.jsonl" or path.suffix == WANDB:
        return 0
    return 2 if path.suffix in CONSOLE else 1


def _run(place: Path, log: Log) -> tuple[Run | None, list[str]]:
    scalars = {tag.removeprefix("train/"): series for tag, series in log.scalars.items()}
    metrics: dict[str, Series] = {}
    for metric in METRICS:
        tag = next((tag for tag in metric.tags if tag in scalars), None)
        if tag is not None:
            metrics[metric.name] = dict(sorted(scalars[tag].items()))
    # A trainer that has no reference logs a KL of 0.
    if not any(metrics.get("kl_host", {}).values()):
        metrics.pop("kl_host", None)
    for tag in sorted(filter(VALIDATION.fullmatch, scalars)):
        metrics[tag] = dict(sorted(scalars[tag].items()))
    if not metrics:
        if scalars:
            known = ", ".join(tag for metric in METRICS for tag in metric.tags)
            log.problems.append(f"{place}: none of the scalars that are looked for: {known}")
        elif not log.problems:
            log.problems.append(f"{place}: no scalar in it")
        return None, log.problems
    settings = _object(place / "settings.json") or log.config
    label, group = _names(place, settings)
    seconds = max(log.times) - min(log.times) - log.paused if log.times else None
    summary = _object(place / "summary.json")
    run = Run(place, label, group, metrics, settings, summary, seconds)
    told = [*not_finite(metrics), *stopped(metrics, run.steps)]
    return run, log.problems + [f"{place}: {problem}" for problem in told]


def not_finite(metrics: dict[str, Series]) -> list[str]:
    """Metrics that end without a number, by the step from which on they have none.

    A hole that closes again is not told: trainers skip what they have no sample for.
    """
    told: dict[str, list[str]] = defaultdict(list)
    for name, series in metrics.items():
        first = None
        for step, value in series.items():
            first = None if math.isfinite(value) else step if first is None else first
        if first is not None:
            told[f"from step {first} to the last, {max(series)}"].append(_tag(name))
    return [f"no finite number {of}: {', '.join(names)}" for of, names in told.items()]


def stopped(metrics: dict[str, Series], end: int) -> list[str]:
    """Metrics that a run went on without, by the last step that has them.

    Without them for longer than ever before, that is: a model is evaluated now and then.
    """
    told: dict[int, list[str]] = defaultdict(list)
    for name, series in metrics.items():
        steps = list(series)
        gaps = [later - step for step, later in pairwise(steps)]
        if gaps and end - steps[-1] > max(gaps):
            told[steps[-1]].append(_tag(name))
    return [
        f"not logged after step {step}, and the run ends at {end}: {', '.join(names)}"
        for step, names in told.items()
    ]


def _tag(name: str) -> str:
    """What a metric is logged as first of all."""
    return next((tag for m in METRICS if m.name == name for tag in m.tags), name)


def _object(path: Path) -> dict[str, Any]:
    try:
        made = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return made if isinstance(made, dict) else {}


def _names(place: Path, settings: dict[str, Any]) -> tuple[str, str]:
    """A run's label, and the key that its other seeds have too."""
    if {"host", "kl_type", "kl_coef"} <= settings.keys():
        coefficient = settings["kl_coef"]
        strength = "" if coefficient is None else f" {coefficient:g}"
        label = f"{settings['host']}: {settings['kl_type']}{strength}"
        others = {key: value for key, value in settings.items() if key != SEED}
        return label, json.dumps(others, sort_keys=True)
    plain = _SEED_IN_NAME.sub("", str(place))
    name = Path(plain).stem if place.is_file() else Path(plain).name
    return name or place.resolve().name, plain


def rolling_mean(series: Series, width: int) -> Series:
    """The mean of each value and those up to ``width - 1`` steps logged before it, nan left out."""
    steps, means = list(series), {}
    for index, step in enumerate(steps):
        window = [series[s] for s in steps[max(0, index + 1 - width) : index + 1]]
        kept = [value for value in window if math.isfinite(value)]
        means[step] = sum(kept) / len(kept) if kept else math.nan
    return means
