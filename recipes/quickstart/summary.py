"""What a run leaves behind: summary.json, curves.png, and a short table on the screen."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from recipes.quickstart.progress import Metrics, kl
from recipes.quickstart.settings import STOCK, Settings

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


def baselines(own: Summary, runs: Path) -> list[Summary]:
    """Stock runs with the same settings but for the kl_type; of several equal ones, the newest."""
    if own["kl_type"] in STOCK:
        return []
    folders = sorted(runs.glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    found = [other for path in folders if (other := read_summary(path.parent)) is not None]
    stock = [other for other in found if other.get("kl_type") in STOCK]
    # A run without KL has no coefficient: any baseline's will do.
    common = [key for key in COMMON if not (key == "kl_coef" and own[key] is None)]
    matching = [other for other in stock if all(other.get(k) == own[k] for k in common)]
    return list({other["kl_type"]: other for other in matching}.values())


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


def curves(settings: Settings, metrics: Sequence[Metrics], path: Path) -> None:
    """Four panels over the steps: reward, KL, length, gradient norm; dots, and a rolling mean."""
    from matplotlib.figure import Figure

    panels = {
        "reward": [step.get("reward", math.nan) for step in metrics],
        "KL to the reference (nats/token)": [kl(step) for step in metrics],
        "tokens per answer": [step.get("response_length", math.nan) for step in metrics],
        "gradient norm": [step.get("actor_grad_norm", math.nan) for step in metrics],
    }
    steps = [step["step"] for step in metrics]
    figure = Figure(figsize=(9, 6), layout="constrained")
    coef = "" if settings.kl_coef is None else f", kl_coef {settings.kl_coef:g}"
    title = f"{settings.host}, {settings.model}: {settings.kl_type}{coef}"
    figure.suptitle(f"{title} (line: mean of the last {WINDOW} steps)", fontsize=11)
    for axes, (title, values) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        axes.plot(steps, values, ".", color="0.6")
        axes.plot(steps, rolling_mean(values), linewidth=1.6)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
