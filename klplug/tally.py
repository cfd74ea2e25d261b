"""What a KL term reports: 0-d tensors, made without a device sync, that merge exactly.

A term keeps sums and maxima over its counted tokens. Micro-batches and ranks are merged as those,
and only then divided: a maximum by max, an effective sample size from its two sums.

The gradient's yardstick is the *principled* one: what the same term would have with ``c = lr``, the
one coefficient of KL(pi||ref).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from klplug.estimators import k3
from klplug.numerics import count, masked_, squarable, total, total_of_squares

PREFIX = "klplug/"

TOP = 0.01
"""The share of tokens whose part in the gradient is reported."""

SAMPLE = 2**14
"""Beyond so many entries the threshold of the largest is read off a sample of about that size."""


@dataclass(frozen=True)
class Tally:
    """Sums and maxima over counted tokens, each a 0-d tensor.

    Attributes:
        sums: added over micro-batches and ranks.
        maxima: joined by max over micro-batches and ranks.
    """

    sums: dict[str, Tensor]
    maxima: dict[str, Tensor]

    @staticmethod
    def merged(tallies: Iterable[Tally]) -> Tally:
        """One tally of all tokens of all ``tallies`` (at least one)."""
        first, *others = tallies
        sums, maxima = dict(first.sums), dict(first.maxima)
        for other in others:
            for name, value in other.sums.items():
                sums[name] = sums[name] + value.to(sums[name].device)
            for name, value in other.maxima.items():
                maxima[name] = torch.maximum(maxima[name], value.to(maxima[name].device))
        return Tally(sums, maxima)

    def metrics(self) -> dict[str, Tensor]:
        """The metrics by their stable names, all finite, 0 where no token was counted.

        ``klplug/active``: 1, proof in a log that klplug computed the term.
        ``klplug/k1``, ``k2``, ``k3``, ``abs``: masked means of the estimates, nats per token.
        ``klplug/exact_kl``: with vocab=exact, the masked mean over the whole vocabulary.
        ``klplug/coef_mean``, ``coef_max``: mean and largest ``|c|``; without vocab=exact, as are
        the gradient's below.
        ``klplug/ess``: effective sample size of the weights as a share of the tokens,
        ``(sum w)^2 / (n sum w^2)``, 1 where all weights are equal.
        ``klplug/capped_share``, ``bounded_share``, ``overflow_share``: shares of tokens whose
        weight met the cap, whose c met the bound, whose exponent met the dtype's maximum.
        ``klplug/gradient_cosine``, ``gradient_norm_ratio``, ``top_share``: the term's gradient
        beside the principled one; see ``gradient_metrics``.
        """
        tokens = self.sums["tokens"]
        # Not clamp(min=1): a host that averages over ranks hands in sums of less than a token.
        n = torch.where(tokens > 0, tokens, 1.0)
        weight_square = self.sums["weight_square"]
        ess = self.sums["weight"].square() / (weight_square * n)
        values = {
            "active": torch.ones_like(tokens),
            "k1": self.sums["k1"] / n,
            "k2": self.sums["k2"] / n,
            "k3": self.sums["k3"] / n,
            "abs": self.sums["abs"] / n,
            "ess": torch.where(weight_square > 0, ess, 0.0),
            "capped_share": self.sums["capped"] / n,
            "bounded_share": self.sums["bounded"] / n,
            "overflow_share": self.sums["overflow"] / n,
        }
        if "coef" in self.sums:
            values["coef_mean"] = self.sums["coef"] / n
            values["coef_max"] = self.maxima["coef"]
            values |= gradient_metrics(self.sums)
        if "exact" in self.sums:
            values["exact_kl"] = self.sums["exact"] / n
        return {PREFIX + name: value for name, value in values.items()}


@dataclass(frozen=True)
class Diagnosis:
    """What the metrics of one term are made of; every tensor is (B, T).

    Where there is no weight it is 1; where there are no flags nothing acted. Flags are 1 where
    something did, and anything where masked; the others are zero there.

    Attributes:
        coefficient: c; ``None`` where sampled tokens have none, or not the whole of it.
        gradient: what multiplies each token's score.
        principled: what would with ``c = lr``.
        k3: its values, where they are at hand.
        exact: the divergence over the whole vocabulary, where it is.
    """

    mask: Tensor
    log_ratio: Tensor
    coefficient: Tensor | None
    gradient: Tensor
    principled: Tensor
    overflowed: Tensor
    k3: Tensor | None = None
    exact: Tensor | None = None
    weight: Tensor | None = None
    capped: Tensor | None = None
    bounded: Tensor | None = None

    def tally(self) -> Tally:
        # Often one tensor has several of the parts: each sum is taken of it once.
        size, squares = functools.cache(torch.abs), functools.cache(total_of_squares)
        tokens = count(self.mask)
        never = torch.zeros_like(tokens)
        weight = weight_square = tokens
        if self.weight is not None:
            weight, weight_square = total(squarable(self.weight)), squares(self.weight)
        together = squares(self.gradient)
        if self.gradient is not self.principled:
            together = total(squarable(self.gradient).mul_(squarable(self.principled)))

        def share(flags: Tensor | None) -> Tensor:
            return never if flags is None else total(masked_(flags, self.mask))

        of_coefficient, maxima = {}, {}
        if self.coefficient is not None:
            largest = size(self.coefficient)
            of_coefficient = {
                "coef": total(largest),
                "gradient_square": squares(self.gradient),
                "principled_square": squares(self.principled),
                "gradient_principled": together,
                "gradient_size": total(size(self.gradient)),
                "top_size": top_total(size(self.gradient), tokens),
            }
            maxima["coef"] = largest.amax() if largest.numel() else largest.new_zeros(())
        if self.exact is not None:
            of_coefficient["exact"] = total(self.exact)
        return Tally(
            sums={
                "tokens": tokens,
                "k1": total(self.log_ratio),
                "k2": squares(self.log_ratio) / 2,
                "k3": total(k3(self.log_ratio) if self.k3 is None else self.k3),
                "abs": total(size(self.log_ratio)),
                **of_coefficient,
                "weight": weight,
                "weight_square": weight_square,
                "capped": share(self.capped),
                "bounded": share(self.bounded),
                "overflow": share(self.overflowed),
            },
            maxima=maxima,
        )


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

    ``gradient_cosine``: between the term's gradient and the principled one, over tokens; 1 where
    neither has any. ``gradient_norm_ratio``: its norm over the principled one's; 0 where there is
    nothing to compare with. ``top_share``: of all |gradient|, what the top 1 % of tokens have.
    """
    gradient, principled = sums["gradient_square"].sqrt(), sums["principled_square"].sqrt()
    nothing = (gradient == 0) & (principled == 0)
    some = (gradient > 0) & (principled > 0)
    one, zero = torch.ones_like(gradient), torch.zeros_like(gradient)
    cosine = sums["gradient_principled"] / torch.where(some, gradient, one)
    cosine = cosine / torch.where(some, principled, one)
    ratio = gradient / torch.where(principled > 0, principled, one)
    share = sums["top_size"] / torch.where(sums["gradient_size"] > 0, sums["gradient_size"], one)
    return {
        "gradient_cosine": torch.where(nothing, one, torch.where(some, cosine, zero)),
        "gradient_norm_ratio": torch.where(nothing, one, torch.where(some, ratio, zero)),
        "top_share": share,
    }
