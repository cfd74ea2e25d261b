"""What the rows of a grid say: a run's accuracy, KL and so on, each a number of its row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # figures are drawn where nothing is installed that driving needs
    from recipes.reproduce.drive import Row

LOST = 0.5  # of the first rollout's reward: a rollout below it is lost
K1 = "k1_as_loss,ratio=none"
K2, WHOLE, EXACT = "k2_as_loss", "k2_as_loss,horizon=sequence", "k2_as_loss,vocab=exact"
FROZEN, UNWEIGHTED = "k1_in_reward", "k2_as_loss,ratio=none"
BOUNDED, DIVIDED = "k2_as_loss,bound=2", "k1_in_reward,reward_norm=group"
# What tier 1 has of kl_type, in the order of tables and figures, and of kl_coef.
ORDER = ("none", K1, "stock:k3", "k3_in_reward", "k1_in_reward", K2, WHOLE)
COEFFICIENTS = (0.05, 0.5, 2.0)


def end(name: str, diverged: float = math.nan) -> Callable[[Row], float]:
    """A measure of the last evaluation, and what it is of a run that diverged."""

    def value(row: Row) -> float:
        if row["status"] == "diverged":
            return diverged
        found: Any = row["evaluations"][-1]
        for key in name.split("/"):
            found = found[key]
        return math.nan if found is None else float(found)

    return value


def lost(row: Row) -> float:
    """The share of rollouts whose mean reward is below half of the first one's."""
    rewards = [reward or 0.0 for reward in row["training"].get("reward", [])]
    missing = row["settings"]["steps"] - len(rewards)  # a run that diverged has fewer
    return (sum(r < LOST * rewards[0] for r in rewards) + missing) / row["settings"]["steps"]


def gradient_norm(row: Row) -> float:
    """The median over the steps."""
    norms = [norm for norm in row["training"].get("actor_grad_norm", []) if norm is not None]
    return statistics.median(norms) if norms else math.nan


def swing(row: Row) -> float:
    """Standard deviation of the mean log-ratio over the last third of the rollouts, nats per token.

    Not of the host's `kl`, another quantity for each estimator. nan of a run that diverged.
    """
    logged = row["training"].get("klplug/k1", [])
    last = [value for value in logged if value is not None][-(row["settings"]["steps"] // 3) :]
    if row["status"] == "diverged" or len(last) < 2:
        return math.nan
    return statistics.stdev(last)


def cpu_seconds(row: Row) -> float:
    """Of the whole run, its evaluations included, for each rollout."""
    return float(row["cpu_seconds"] / row["settings"]["steps"])


@dataclass(frozen=True)
class Measure:
    """A column of a table."""

    heading: str
    of: Callable[[Row], float]
    form: str

    def over(self, rows: Iterable[Row]) -> str:
        """The mean, and the lowest and highest seed; of the finite ones."""
        values = [value for value in map(self.of, rows) if math.isfinite(value)]
        if not values:
            return ""
        ends = statistics.fmean(values), min(values), max(values)
        mean, low, high = map(self.form.format, ends)
        return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def pass_at(k: int) -> Measure:
    return Measure(f"pass@{k}", end(f"pass_at/{k}", diverged=0.0), "{:.1%}")


# pass@1 at temperature 1.
ACCURACY = Measure("accuracy", end("sampled_accuracy", diverged=0.0), "{:.1%}")
GREEDY = Measure("greedy", end("accuracy", diverged=0.0), "{:.1%}")
PASS_16 = pass_at(16)
ROLLOUTS_LOST = Measure("rollouts lost", lost, "{:.0%}")
KL = Measure("KL(pi‖ref)", end("kl_nats_per_answer"), "{:.3g}")
KL_ERROR = Measure("its error", end("kl_standard_error"), "{:.2g}")
FORWARD_KL = Measure("KL(ref‖pi)", end("forward_kl_nats_per_answer"), "{:.3g}")
ENTROPY = Measure("entropy", end("entropy_nats_per_answer"), "{:.3g}")
TOKENS = Measure("tokens", end("response_tokens"), "{:.1f}")
GRADIENT_NORM = Measure("gradient norm", gradient_norm, "{:.2g}")
SWING = Measure("swing", swing, "{:.2g}")
CPU_SECONDS = Measure("CPU-seconds a rollout", cpu_seconds, "{:.1f}")


def seeds(rows: Collection[Row]) -> str:
    diverged = sum(row["status"] == "diverged" for row in rows)
    return f"{len(rows)}" + (f", {diverged} diverged" if diverged else "")


class Runs:
    """The rows of a grid, looked up by what was varied."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    def of(self, kl_type: str, updates: int = 4, kl_coef: float = 0.5) -> dict[int, Row]:
        """Seed to row."""
        coef = None if kl_type == "none" else kl_coef
        asked = {"kl_type": kl_type, "updates": updates, "kl_coef": coef}
        found = (r for r in self.rows if all(r["settings"][k] == v for k, v in asked.items()))
        return {row["settings"]["seed"]: row for row in found}

    def log(self, of: Callable[[Row], float]) -> Callable[[Row], float]:
        """A measure's logarithm.

        Of a run that diverged it is the largest of the runs with as many updates.
        """

        def value(row: Row) -> float:
            if row["status"] != "diverged":
                return math.log(found) if (found := of(row)) > 0 else math.nan
            updates = row["settings"]["updates"]
            beside = (of(r) for r in self.rows if r["settings"]["updates"] == updates)
            return max((math.log(found) for found in beside if found > 0), default=math.nan)

        return value

    def log_kl(self, row: Row) -> float:
        return self.log(KL.of)(row)
