"""What a configuration's gradient is like while it trains, from tensors at hand.

The yardstick is the *principled* force: what the same term would have with ``c = lr``, the one
coefficient of KL(pi||ref). Sums merge over micro-batches and ranks, and are divided once; the top
tokens are those of each micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from klplug.totals import total

TOP = 0.01
"""The share of tokens whose part in the gradient is reported."""

SAMPLE = 2**14


def top_total(size: Tensor, tokens: Tensor) -> Tensor:
    """The sum of the largest ``TOP`` of ``tokens`` entries of ``size``; 0-d, no device sync.

    The sum of the k largest is the least of ``k t + sum(max(x - t, 0))`` over thresholds t, reached
    at the k-th largest (Rockafellar and Uryasev 2000). Beyond ``SAMPLE`` entries t is that of an
    evenly spaced sample, for sorting costs more than all other metrics: near the minimum that
    shifts the sum upwards by a second order, at most to all there is.

    Args:
        size: (B, T), not negative, zero where masked.
        tokens: how many are counted, 0-d.
    """
    sample = size.reshape(-1)[:: size.numel() // SAMPLE | 1]
    most = sample.topk(min(len(sample), int(TOP * len(sample)) + 1)).values
    if not len(most):
        return tokens
    # The mask's count is on the device, so the rank is taken there too.
    k = (TOP * tokens).ceil()
    rank = (k * (len(sample) / size.numel())).ceil().clamp(1, len(most)).long() - 1
    threshold = most.gather(0, rank.unsqueeze(0))
    above = total((size - threshold).clamp_(min=0))
    return torch.minimum(k * threshold.squeeze(0) + above, total(size))


def gradient_metrics(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``gradient_cosine``, ``gradient_norm_ratio`` and ``top_share`` from merged sums.

    ``gradient_cosine``: between the term's force and the principled one, over tokens; 1 where
    neither has any. ``gradient_norm_ratio``: its norm over the principled one's; 0 where there is
    nothing to compare with. ``top_share``: of all |force|, what the top 1 % of tokens have.
    """
    force, principled = sums["force_square"].sqrt(), sums["principled_square"].sqrt()
    nothing = (force == 0) & (principled == 0)
    some = (force > 0) & (principled > 0)
    one, zero = torch.ones_like(force), torch.zeros_like(force)
    cosine = sums["force_principled"] / torch.where(some, force, one)
    cosine = cosine / torch.where(some, principled, one)
    ratio = force / torch.where(principled > 0, principled, one)
    share = sums["top_size"] / torch.where(sums["force_size"] > 0, sums["force_size"], one)
    return {
        "gradient_cosine": torch.where(nothing, one, torch.where(some, cosine, zero)),
        "gradient_norm_ratio": torch.where(nothing, one, torch.where(some, ratio, zero)),
        "top_share": share,
    }


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
