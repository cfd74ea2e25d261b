"""What a KL term reports: 0-d tensors, made without a device sync, that merge exactly.

A term keeps sums and maxima over its counted tokens. Micro-batches and ranks are merged as those,
and only then divided: a maximum by max, an effective sample size from its two sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from klplug.diagnostics import gradient_metrics

PREFIX = "klplug/"


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
        ``klplug/coef_mean``, ``coef_max``: mean and largest ``|c|``.
        ``klplug/ess``: effective sample size of the weights as a share of the tokens,
        ``(sum w)^2 / (n sum w^2)``, 1 where all weights are equal.
        ``klplug/capped_share``, ``bounded_share``, ``overflow_share``: shares of tokens whose
        weight met the cap, whose c met the bound, whose exponent met the dtype's maximum.
        ``klplug/gradient_cosine``, ``gradient_norm_ratio``, ``top_share``: the term's gradient
        beside the principled one; see ``klplug.diagnostics``.
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
            "coef_mean": self.sums["coef"] / n,
            "coef_max": self.maxima["coef"],
            "ess": torch.where(weight_square > 0, ess, 0.0),
            "capped_share": self.sums["capped"] / n,
            "bounded_share": self.sums["bounded"] / n,
            "overflow_share": self.sums["overflow"] / n,
            **gradient_metrics(self.sums),
        }
        return {PREFIX + name: value for name, value in values.items()}
