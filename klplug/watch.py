"""Warnings in the log of a run: metrics that stay beyond a threshold, each said once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rule:
    """A threshold that a metric is not to stay beyond."""

    metric: str
    threshold: float
    below: bool
    means: str

    def broken(self, value: float) -> bool:
        return value < self.threshold if self.below else value > self.threshold


RULES = (
    Rule(
        "klplug/gradient_cosine",
        0.9,
        True,
        "this kl_type's gradient points away from that of KL(pi||ref): k2_as_loss has it",
    ),
    Rule(
        "klplug/ess",
        0.5,
        True,
        "half of the samples' weight is lost: the policy is far from the one that sampled. "
        "Fewer updates per rollout, or a smaller cap, help",
    ),
    Rule(
        "klplug/top_share",
        0.5,
        False,
        "one token in a hundred makes half of the KL's gradient: bound=... limits each",
    ),
    Rule(
        "klplug/overflow_share",
        0.0,
        False,
        "an exponent is at the dtype's maximum: bound=... keeps the batch's direction",
    ),
)


@dataclass
class Watch:
    """Says once in the log when a metric has been beyond its threshold for ``patience`` steps."""

    patience: int = 20
    rules: tuple[Rule, ...] = RULES
    _streak: dict[str, int] = field(default_factory=dict)

    def tell(self, metrics: Mapping[str, float]) -> None:
        """Print the warnings that are due."""
        for line in self.see(metrics):
            print(line, flush=True)

    def see(self, metrics: Mapping[str, float]) -> list[str]:
        """The warnings that are due after one more step's metrics; each is given once."""
        due = []
        for rule in self.rules:
            value = metrics.get(rule.metric)
            if value is None:
                continue
            streak = self._streak.get(rule.metric, 0) + 1 if rule.broken(value) else 0
            self._streak[rule.metric] = streak
            if streak == self.patience:
                due.append(
                    f"klplug: WARNING: {rule.metric} is {value:.3g}, "
                    f"{'below' if rule.below else 'above'} {rule.threshold:g} for "
                    f"{self.patience} steps: {rule.means}"
                )
        if due:
            said = [rule for rule in self.rules if self._streak.get(rule.metric) == self.patience]
            self.rules = tuple(rule for rule in self.rules if rule not in said)
        return due
