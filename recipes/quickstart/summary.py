"""What a run leaves behind: summary.json, curves.png, and a short table on the screen."""

import json
import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from recipes.quickstart.progress import Metrics, kl
from recipes.quickstart.settings import Settings
from recipes.shared.settings import STOCK

Summary = dict[str, Any]

# The keys of a run's settings that a baseline has in common with it.
COMMON = ("host", "kl_coef", "steps", "seed", "model", "data", "gsm8k", "ranks")
WINDOW = 5  # steps that a curve's rolling mean goes back


def summary(
    settings: Settings,
    host_version: str,
    metrics: Sequence[Metrics],
    before: dict[str, Any],
    after: dict[str, Any],
    seconds: dict[str, float],
) -> Summary:
    """summary.json; accuracies are greedy, over the held-out split."""
    return {
        **settings.as_dict(),
        "host_version": host_version,
        "klplug_active": any(step.get("klplug/active", 0.0) > 0 for step in metrics),
        "accuracy_before": before["accuracy"],
        "accuracy_after": after["accuracy"],
        "sampled_accuracy_before": before["sampled_accuracy"],
        "sampled_accuracy_after": after["sampled_accuracy"],
        "kl_last": after["kl_nats_per_answer"],
        "kl_last_standard_error": after["kl_standard_error"],
        "response_tokens_before": before["response_tokens"],
        "response_tokens_after": after["response_tokens"],
        "reward_first": metrics[0].get("reward"),
        "reward_last": metrics[-1].get("reward"),
        "test_problems": after["problems"],
        "seconds": round(sum(seconds.values()), 1),
        "seconds_by_phase": {phase: round(value, 1) for phase, value in seconds.items()},
    }


def read_summary(folder: Path) -> Summary | None:
    """A folder's summary; None where there is none, or a torn one."""
    try:
        return json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None


def read_metrics(path: Path) -> list[Metrics]:
    """The lines of a metrics.jsonl; null is what was no finite number."""
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return [{k: math.nan if v is None else v for k, v in line.items()} for line in lines]


def baselines(own: Summary, runs: Path) -> dict[Path, Summary]:
    """Stock runs with the same settings but for the kl_type; of several equal ones, the newest.

    Returns:
        By folder.
    """
    if own["kl_type"] in STOCK:
        return {}
    folders = sorted(runs.glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    found = {path.parent: other for path in folders if (other := read_summary(path.parent))}
    stock = {folder: other for folder, other in found.items() if other.get("kl_type") in STOCK}
    # A run without KL has no coefficient: any baseline's will do.
    common = [key for key in COMMON if not (key == "kl_coef" and own[key] is None)]
    matching = {f: o for f, o in stock.items() if all(o.get(k) == own[k] for k in common)}
    newest = {other["kl_type"]: folder for folder, other in matching.items()}
    return {folder: matching[folder] for folder in newest.values()}


def next_steps(own: Summary, folder: Path, stock: Sequence[Path]) -> str:
    """What to do with a run that has ended."""
    lines = ["next:"]
    if not stock and own["kl_type"] not in STOCK:
        lines.append(f"  make quickstart HOST={own['host']} KL_TYPE=stock:k3    the host's own KL")
    folders = shlex.join(os.path.relpath(path) for path in (folder, *stock))
    lines += [
        f"  .venv-{own['host']}/bin/klplug report {folders}    the runs as one page",
        f"  .venv-{own['host']}/bin/klplug audit YOUR_SCRIPT    what gradient your own run follows",
    ]
    return "\n".join(lines)


def table(rows: Sequence[Summary]) -> Table:
    """Accuracy before and after, KL and length, a row a run."""
    made = Table(title=f"held-out split, {rows[0]['test_problems']} problems", title_justify="left")
    made.add_column("kl_type")
    for heading in ("kl_coef", "accuracy before", "after", "KL (nats/answer)", "tokens/answer"):
        made.add_column(heading, justify="right")
    for row in rows:
        coef = "" if row["kl_coef"] is None else f"{row['kl_coef']:g}"
        error = row["kl_last_standard_error"]
        kl_last = f"{row['kl_last']:.3f}" + ("" if error is None else f" ± {error:.3f}")
        length = f"{row['response_tokens_before']:.1f} → {row['response_tokens_after']:.1f}"
        made.add_row(
            row["kl_type"],
            coef,
            f"{row['accuracy_before']:.1%}",
            f"{row['accuracy_after']:.1%}",
            kl_last,
            length,
        )
    return made


def rolling_mean(values: Sequence[float], width: int = WINDOW) -> list[float]:
    """The mean of each value and those up to width - 1 before it, nan left out."""
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    kept = ([value for value in window if math.isfinite(value)] for window in windows)
    return [sum(window) / len(window) if window else math.nan for window in kept]


PANELS: dict[str, Callable[[Metrics], float]] = {
    "reward": lambda step: step.get("reward", math.nan),
    "KL to the reference (nats/token)": kl,
    "tokens per answer": lambda step: step.get("response_length", math.nan),
    "gradient norm": lambda step: step.get("actor_grad_norm", math.nan),
}


def curves(
    settings: Settings,
    metrics: Sequence[Metrics],
    path: Path,
    beside: Mapping[str, Sequence[Metrics]],
) -> None:
    """Four panels over the steps: reward, KL, length, gradient norm; dots, and a rolling mean.

    Args:
        settings: of the run.
        metrics: its steps.
        path: of the picture.
        beside: steps of baselines, by kl_type: their rolling means, dashed.
    """
    from matplotlib.figure import Figure

    steps = [step["step"] for step in metrics]
    figure = Figure(figsize=(9, 6), layout="constrained")
    coef = "" if settings.kl_coef is None else f", kl_coef {settings.kl_coef:g}"
    title = f"{settings.host}, {settings.model}: {settings.kl_type}{coef}"
    figure.suptitle(f"{title} (line: mean of the last {WINDOW} steps)", fontsize=11)
    for axes, (title, value) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        values = [value(step) for step in metrics]
        axes.plot(steps, values, ".", color="0.6")
        axes.plot(steps, rolling_mean(values), linewidth=1.6, label=settings.kl_type)
        for kl_type, others in beside.items():
            means = rolling_mean([value(step) for step in others])
            axes.plot([step["step"] for step in others], means, "--", label=kl_type)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    if beside:
        figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
