"""Warnings in the log of a run: metrics that stay beyond a threshold, each said once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

NONFINITE = "klplug/nonfinite/"


@dataclass(frozen=True)
class Rule:
    """A threshold that a metric is not to stay beyond."""

    metric: str
    threshold: float
    below: bool
    means: str
    patience: int | None = None

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
        "klplug/weight_mean",
        0.5,
        True,
        "its expectation is 1, so the KL acts with that share of kl_coef. Weights of long answers "
        "(level=prefix, level=sequence) fall together; ratio=none, level=token or fewer updates "
        "per rollout keep the strength",
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
    Rule(
        "klplug/nonfinite_share",
        0.0,
        False,
        "a token's number is nan or infinite. It is left out of the KL or of its metrics, or has "
        "the KL's limit",
        patience=1,
    ),
)


@dataclass
class Watch:
    """Says once in the log when a metric has been beyond its threshold for ``patience`` steps."""

    patience: int = 20
    rules: tuple[Rule, ...] = RULES
    _streak: dict[str, int] = field(default_factory=dict)
    _said: set[str] = field(default_factory=set)

    def tell(self, metrics: Mapping[str, float]) -> None:
        """Print the warnings that are due."""
        for line in self.see(metrics):
            print(line, flush=True)

    def see(self, metrics: Mapping[str, float]) -> list[str]:
        """The warnings that are due after one more step's metrics; each is given once."""
        due = []
        for rule in self.rules:
            value = metrics.get(rule.metric)
            if value is None or rule.metric in self._said:
                continue
            streak = self._streak.get(rule.metric, 0) + 1 if rule.broken(value) else 0
            self._streak[rule.metric] = streak
            patience = self.patience if rule.patience is None else rule.patience
            if streak == patience:
                self._said.add(rule.metric)
                for_long = f" for {patience} steps" if patience > 1 else ""
                due.append(
                    f"klplug: WARNING: {rule.metric} is {value:.3g}, "
                    f"{'below' if rule.below else 'above'} {rule.threshold:g}{for_long}: "
                    f"{rule.means}"
                )
        return due + self._tensors(metrics)

    def _tensors(self, metrics: Mapping[str, float]) -> list[str]:
        """By name, the tensors that had a number that is none; each once."""
        bad = [key for key, value in metrics.items() if key.startswith(NONFINITE) and value > 0]
        new = [key for key in bad if key not in self._said]
        self._said.update(new)
        names = [key.removeprefix(NONFINITE) for key in new]
        return [
            f"klplug: WARNING: {name} has a nan or an infinite number at a counted token"
            for name in names
        ]
